"""A batch of the intake: numbered Parquet files of URLs (url shards), which one intake record then commits."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.corpus.records import Records
from pipeline.digests import sha256_file
from pipeline.shards.shard_files import write_parquet
from schemas.json_record import utc_now
from schemas.records import IntakeRecord, OutputFile
from schemas.tables import URLS


@dataclass(frozen=True, slots=True, kw_only=True)
class IntakeOutcome:
    """What an intake did for one source; ``record`` is the batch it made, None where nothing was new."""

    source: str
    record: IntakeRecord | None

    def __str__(self) -> str:
        batch = self.record
        if batch is None:
            return f"{self.source}: nothing new to take in"
        shards = f"new shards: {len(batch.shards):,}"
        if batch.kind == "retry":
            return f"{self.source}: {batch.rows_new:,} to be tried again; {shards}"
        return (
            f"{self.source}: {batch.rows_in:,} rows: {batch.rows_new:,} new, "
            f"{batch.rows_duplicate:,} duplicate, {batch.rows_known:,} known, "
            f"{batch.rows_without_url:,} without a URL; {shards}"
        )


class UrlShardWriter:
    """Cut the rows of a source's next batch into shards of a size, put them on storage, and commit the batch.

    Args:
        earlier: the source's batches so far; the new shards' numbers follow those of these batches.
        folder: local, for files that are not finished.
        rows_per_shard: None: only ``cut`` ends a shard.
    """

    def __init__(
        self,
        records: Records,
        source: str,
        earlier: Sequence[IntakeRecord],
        folder: Path,
        rows_per_shard: int | None,
    ) -> None:
        self.records = records
        self.source = source
        self.batch = len(earlier)
        self.attempt = uuid.uuid4().hex[:12]
        self.folder = folder
        self.next = max((int(shard) for batch in earlier for shard in batch.shards), default=-1) + 1
        self.rows_per_shard = rows_per_shard
        self.shards: dict[str, OutputFile] = {}
        # By shard that URLs failed in, the shards of this batch that try them again.
        self.taken_over: dict[str, list[str]] = {}
        self._waiting: list[pa.Table] = []
        self._rows = 0

    def add(self, table: pa.Table) -> None:
        """Append rows: columns of URLS without shard, and without key and retry_of where to be set."""
        self._waiting.append(table)
        self._rows += table.num_rows
        if self.rows_per_shard is None or self._rows < self.rows_per_shard:
            return
        rows = pa.concat_tables(self._waiting)
        start = 0
        while rows.num_rows - start >= self.rows_per_shard:
            self._write(rows.slice(start, self.rows_per_shard))
            start += self.rows_per_shard
        self._waiting = [rows.slice(start)]
        self._rows = rows.num_rows - start

    def cut(self) -> str | None:
        """End the shard here; return its name, or None if it has no rows."""
        if not self._rows:
            return None
        name = self._write(pa.concat_tables(self._waiting))
        self._waiting, self._rows = [], 0
        return name

    def commit(self, **fields: Any) -> IntakeRecord | None:
        """Create the batch's record; None, and the shards are deleted, if another driver's batch has its number.

        ``fields``: those of the record that say where its rows come from and what became of them.
        """
        record = IntakeRecord(
            source=self.source,
            batch=self.batch,
            attempt=self.attempt,
            shards=self.shards,
            taken_over={shard: tuple(retries) for shard, retries in self.taken_over.items()},
            finished_at=utc_now(),
            **fields,
        )
        if self.records.commit_intake(record):
            return record
        self.discard()
        return None

    def discard(self) -> None:
        """Delete the shards that were put on storage."""
        for file in self.shards.values():
            self.records.storage.delete(file.path)

    def _write(self, rows: pa.Table) -> str:
        name = f"{self.next:05d}"
        self.next += 1
        columns = {column: rows.column(column) for column in rows.column_names}
        columns["shard"] = pa.array([name] * rows.num_rows, pa.string())
        if "key" not in columns:
            columns["key"] = pa.array([f"{name}{index:05d}" for index in range(rows.num_rows)], pa.string())
        if "retry_of" not in columns:
            columns["retry_of"] = pa.nulls(rows.num_rows, pa.string())
        for shard in columns["retry_of"].unique().drop_null().to_pylist():
            self.taken_over.setdefault(shard, []).append(name)
        local = self.folder / f"{name}.parquet"
        write_parquet(local, pa.table(columns), URLS)
        path = f"urls/{self.source}/{name}.{self.attempt}.parquet"
        self.shards[name] = OutputFile(
            path=path, bytes=local.stat().st_size, sha256=sha256_file(local), rows=rows.num_rows
        )
        self.records.storage.put(local, path)
        local.unlink()
        return name
