"""Lists of URLs become url shards: every distinct URL exactly once, numbered for good.

A batch is one reading of a source's lists. Its shards lie under ``urls/<source>/<shard>.<attempt>.parquet``
before its record is created; a crash leaves orphans, and of two drivers one wins and the other starts over.
Earlier batches are never changed: what a list has gained becomes further shards.
"""

import itertools
import operator
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.records import Records
from pipeline.corpus.scratch import temporary_folder
from pipeline.corpus.storage import FileInfo
from pipeline.digests import digest_json
from pipeline.intake.dedup import Pairs
from pipeline.intake.img2dataset_folders import Img2datasetShard, find_img2dataset_shards
from pipeline.intake.lists.files import caption_files, count_rows, find_files
from pipeline.intake.retries import TRANSIENT
from pipeline.intake.url_shard_writer import UrlShardWriter, known_uids, next_number
from schemas.config import CapfiltConfig, SourceConfig
from schemas.errors import CapfiltError
from schemas.records import IntakeRecord, ShardRecord, utc_now
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Input:
    """The files of a source as they are now; ``adoptable`` are img2dataset's shards, by Parquet.

    ``files`` are the lists and what belongs to them: a change of any is a change of the source.
    """

    source: SourceConfig
    lists: tuple[str, ...]
    files: tuple[FileInfo, ...]
    adoptable: dict[str, Img2datasetShard]

    @property
    def signature(self) -> str:
        """Digest what decides whether there is anything to read."""
        return digest_json(
            {
                "files": [[file.path, file.bytes, file.version] for file in self.files],
                "url_column": self.source.url_column,
                "uid_column": self.source.uid_column,
            }
        )

    def unread(self, earlier: Sequence[IntakeRecord]) -> list[str]:
        """Return the lists to read: none if all are as they were, else all; of img2dataset's the new ones."""
        if self.signature in {batch.signature for batch in earlier}:
            return []
        if self.source.format != "img2dataset":
            return list(self.lists)
        taken = {path for batch in earlier for path in batch.files}
        return [path for path in self.adoptable if path not in taken]


def read_lists(config: CapfiltConfig, records: Records, run_id: str) -> list[IntakeOutcome]:
    """Take in what the sources' lists have gained; a source whose files are unchanged is not read.

    Of each batch, rows_in = rows_new + rows_duplicate + rows_known + rows_without_url. A malformed URL is
    taken in: the crawl gives it a status. Raises CapfiltError, before any work, where an input is missing or
    one of its files lacks a column.
    """
    inputs = [_find_input(source, records) for source in config.source]
    for found in inputs:
        if lists := found.unread(records.intakes(found.source.name)):
            Pairs(found.source, records.storage, lists).check()
    return [_take_in(found, config, records, run_id) for found in inputs]


def unread_rows(config: CapfiltConfig, records: Records) -> dict[str, int]:
    """Return, by source, how many rows its lists hold beyond those taken in; changes nothing.

    Where a list was changed rather than lengthened this is an estimate: its URLs are compared only by a run.
    Raises CapfiltError, as ``read_lists`` does, where a list cannot be read or lacks a column.
    """
    rows = {}
    for source in config.source:
        found, earlier = _find_input(source, records), records.intakes(source.name)
        if not (lists := found.unread(earlier)):
            continue
        Pairs(source, records.storage, lists).check()
        form = "parquet" if source.format == "img2dataset" else source.format
        held = sum(count_rows(records.storage, path, form, source.url_column) for path in lists)
        taken = sum(batch.rows_in for batch in earlier if batch.kind == "lists")
        rows[source.name] = max(held - taken, 0)
    return rows


def _find_input(source: SourceConfig, records: Records) -> _Input:
    key = f"source.{source.name}.input"
    if source.format != "img2dataset":
        files = find_files(source.input, records.storage, key)
        captions = caption_files(files, source.format, records.storage)
        lists = [file for file in files if file.path not in {beside.path for beside in captions}]
        return _Input(
            source=source,
            lists=tuple(file.path for file in lists),
            files=(*lists, *captions),
            adoptable={},
        )
    shards = find_img2dataset_shards(source.input, records.storage, key)
    return _Input(
        source=source,
        lists=tuple(shard.parquet.path for shard in shards),
        files=tuple(file for shard in shards for file in (shard.tar, shard.parquet)),
        adoptable={shard.parquet.path: shard for shard in shards},
    )


def _take_in(found: _Input, config: CapfiltConfig, records: Records, run_id: str) -> IntakeOutcome:
    """Make a source's next batch, again from the start when another driver made one meanwhile."""
    name = found.source.name
    while True:
        earlier = records.intakes(name)
        lists = found.unread(earlier)
        if not lists:
            return IntakeOutcome(source=name, record=None)
        batch = _make_batch(found, lists, earlier, config.corpus.samples_per_shard, records, run_id)
        if batch is not None:
            return IntakeOutcome(source=name, record=batch)


def _make_batch(
    found: _Input,
    lists: list[str],
    earlier: list[IntakeRecord],
    samples_per_shard: int,
    records: Records,
    run_id: str,
) -> IntakeRecord | None:
    """Read the lists, write the shards, commit; None: another driver's batch got the number."""
    name, attempt = found.source.name, uuid.uuid4().hex[:12]
    pairs = Pairs(found.source, records.storage, lists)
    identified = pairs.identify(known_uids(earlier, records.storage))
    adopted: dict[str, Img2datasetShard] = {}
    with temporary_folder() as folder:
        writer = UrlShardWriter(
            records.storage,
            name,
            attempt,
            folder,
            first=next_number(earlier),
            rows_per_shard=None if found.adoptable else samples_per_shard,
        )
        for file, tables in itertools.groupby(pairs.fresh(identified), key=operator.itemgetter(0)):
            for _, table in tables:
                writer.add(table)
            if found.adoptable and (shard := writer.cut()):
                adopted[shard] = found.adoptable[file]
        writer.cut()
    if _find_input(found.source, records).signature != found.signature:
        writer.discard()
        raise CapfiltError(f"source.{name}.input: the files changed while they were read; run again")
    with_url, known = len(identified.known_N), int(identified.known_N.sum())
    rows_new = sum(file.rows for file in writer.shards.values())
    record = IntakeRecord(
        source=name,
        batch=len(earlier),
        kind="img2dataset" if found.adoptable else "lists",
        run_id=run_id,
        attempt=attempt,
        signature=found.signature,
        shards=writer.shards,
        rows_in=identified.rows_in,
        rows_new=rows_new,
        rows_duplicate=with_url - known - rows_new,
        rows_known=known,
        rows_without_url=identified.rows_in - with_url,
        finished_at=utc_now(),
        files=tuple(lists),
        adopted={shard: foreign.tar.path for shard, foreign in adopted.items()},
        adopted_bytes={shard: foreign.tar.bytes for shard, foreign in adopted.items()},
    )
    if records.commit_intake(record):
        return record
    writer.discard()
    return None


# -- retries -------------------------------------------------------------------------------------------------


def queue_retries(
    config: CapfiltConfig, records: Records, run_id: str, reasons: Collection[str] = TRANSIENT
) -> list[IntakeOutcome]:
    """Queue, as further shards, the URLs whose latest try ended with one of the reasons.

    A URL that waits in a retry shard already is left alone, so that a second call, or a second driver, adds
    nothing.
    """
    crawled = _crawled(config, records)
    return [_queue_source(name, shards, config, records, run_id, reasons) for name, shards in crawled.items()]


def count_retries(config: CapfiltConfig, records: Records, reasons: Collection[str]) -> dict[str, int]:
    """Return, by source, how many URLs ``queue_retries`` would queue; changes nothing."""
    crawled = _crawled(config, records)
    rows = {
        name: _failed_rows(shards, records.intakes(name), records, reasons)
        for name, shards in crawled.items()
    }
    return {name: table.num_rows for name, table in rows.items()}


def _crawled(config: CapfiltConfig, records: Records) -> dict[str, dict[str, ShardRecord]]:
    """Return the crawled shards by source."""
    crawled: dict[str, dict[str, ShardRecord]] = {source.name: {} for source in config.source}
    for (_, name, shard), record in records.shards(["crawl"]).items():
        if name in crawled:
            crawled[name][shard] = record
    return crawled


def _queue_source(
    name: str,
    crawled: dict[str, ShardRecord],
    config: CapfiltConfig,
    records: Records,
    run_id: str,
    reasons: Collection[str],
) -> IntakeOutcome:
    while True:
        earlier = records.intakes(name)
        rows = _failed_rows(crawled, earlier, records, reasons)
        if not rows.num_rows:
            return IntakeOutcome(source=name, record=None)
        attempt = uuid.uuid4().hex[:12]
        with temporary_folder() as folder:
            writer = UrlShardWriter(
                records.storage,
                name,
                attempt,
                folder,
                first=next_number(earlier),
                rows_per_shard=config.corpus.samples_per_shard,
            )
            writer.add(rows)
            writer.cut()
        record = IntakeRecord(
            source=name,
            batch=len(earlier),
            kind="retry",
            run_id=run_id,
            attempt=attempt,
            signature=digest_json([rows["uid"].to_pylist(), rows["retry_of"].to_pylist()]),
            shards=writer.shards,
            rows_in=rows.num_rows,
            rows_new=rows.num_rows,
            rows_duplicate=0,
            rows_known=0,
            finished_at=utc_now(),
        )
        if records.commit_intake(record):
            return IntakeOutcome(source=name, record=record)
        writer.discard()


def _failed_rows(
    crawled: dict[str, ShardRecord],
    earlier: Sequence[IntakeRecord],
    records: Records,
    reasons: Collection[str],
) -> pa.Table:
    """Return the rows to try again: columns of URLS without shard and key, ``retry_of`` set."""
    retries = [batch.shards for batch in earlier if batch.kind == "retry"]
    queued = {shard: file for shards in retries for shard, file in shards.items()}
    # The shards of a URL's tries are numbered in their order, so the last one read decides about it; a row that
    # an earlier one left to it (``retried``) says nothing.
    latest: dict[str, str] = {}
    failed: list[pa.Table] = []
    for shard in sorted(crawled.keys() | queued.keys(), key=int):
        if shard not in crawled:
            waiting = _read(records, queued[shard].path, ["uid"])
            latest.update(dict.fromkeys(waiting["uid"].to_pylist(), ""))
        elif shard in queued or _counts_any(crawled[shard], reasons):
            table = _read(records, crawled[shard].outputs["parquet"].path, [*URLS.names, "reason"])
            if shard in queued:
                latest.update(dict.fromkeys(table["uid"].to_pylist(), ""))
            table = table.filter(pc.is_in(table["reason"], pa.array(sorted(reasons))))
            latest.update(dict.fromkeys(table["uid"].to_pylist(), shard))
            failed.append(table)
    rows = pa.concat_tables(failed) if failed else URLS.empty_table()
    tries = zip(rows["uid"].to_pylist(), rows["shard"].to_pylist(), strict=True)
    rows = rows.filter(pa.array([latest[uid] == shard for uid, shard in tries], pa.bool_()))
    return rows.select(["uid", "source", "url", "captions", "input_rows", "extra"]).append_column(
        "retry_of", rows["shard"]
    )


def _counts_any(record: ShardRecord, reasons: Collection[str]) -> bool:
    return any(name.partition("/")[2] in reasons for name in record.counts)


def _read(records: Records, path: str, columns: list[str]) -> pa.Table:
    with records.storage.open(path) as file:
        return pq.read_table(file, columns=columns)
