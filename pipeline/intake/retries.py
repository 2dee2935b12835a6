"""URLs to try again: further url shards of the URLs whose last try ended with one of some reasons."""

import contextlib
import hashlib
from collections.abc import Collection, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.records import Records
from pipeline.intake.url_shard_writer import IntakeOutcome, UrlShardWriter
from pipeline.prefetch import prefetch_map
from pipeline.storage.scratch import temporary_folder
from schemas.config import CapfiltConfig
from schemas.records import IntakeRecord, OutputFile, ShardRecord
from schemas.statuses import TRANSIENT
from schemas.tables import URLS

# Shards read ahead: object storage answers late, and ten thousand rows take some megabytes.
_AHEAD = 4


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
    return {
        name: sum(rows.num_rows for rows in _failed_rows(shards, records.intakes(name), records, reasons))
        for name, shards in _crawled(config, records).items()
    }


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
        signature = _Signature()
        with temporary_folder() as folder:
            writer = UrlShardWriter(records, name, earlier, folder, config.corpus.samples_per_shard)
            for rows in _failed_rows(crawled, earlier, records, reasons):
                signature.add(rows)
                writer.add(rows)
            writer.cut()
        if not writer.shards:
            return IntakeOutcome(source=name, record=None)
        batch = writer.commit(
            kind="retry",
            run_id=run_id,
            signature=signature.digest(),
            rows_in=signature.rows,
            rows_new=signature.rows,
            rows_duplicate=0,
            rows_known=0,
        )
        if batch is not None:
            return IntakeOutcome(source=name, record=batch)


class _Signature:
    """The digest of [all uids, all shards that they failed in], as ``digest_json`` gives it, of rows that stream."""

    def __init__(self) -> None:
        self.rows = 0
        self._uids = hashlib.sha256(b"[[")
        # The shards come in runs: each with its number of rows.
        self._failed_in: list[tuple[str, int]] = []

    def add(self, rows: pa.Table) -> None:
        """Append rows of one shard."""
        if not rows.num_rows:
            return
        uids = ",".join(f'"{uid}"' for uid in rows["uid"].to_pylist())
        self._uids.update(f"{',' if self.rows else ''}{uids}".encode())
        self._failed_in.append((rows["retry_of"][0].as_py(), rows.num_rows))
        self.rows += rows.num_rows

    def digest(self) -> str:
        """Return the digest of all rows."""
        digest = self._uids.copy()
        shards = ",".join(",".join([f'"{shard}"'] * rows) for shard, rows in self._failed_in)
        digest.update(f"],[{shards}]]".encode())
        return digest.hexdigest()


def _failed_rows(
    crawled: dict[str, ShardRecord],
    earlier: Sequence[IntakeRecord],
    records: Records,
    reasons: Collection[str],
) -> Iterator[pa.Table]:
    """Yield the rows to try again, by shard: columns of URLS without shard and key, ``retry_of`` set."""
    retries = {
        shard: file for batch in earlier if batch.kind == "retry" for shard, file in batch.shards.items()
    }
    last_retry = _last_retries(records, retries)
    wanted = pa.array(sorted(reasons))

    def failed(shard: str) -> pa.Table:
        table = _read(records, crawled[shard].outputs["parquet"].path, [*URLS.names, "reason"])
        table = table.filter(pc.is_in(table["reason"], wanted))
        # The last try of a URL decides about it: that of the last retry that has it, else that of its first shard.
        is_last = [last_retry.get(uid, shard) == shard for uid in table["uid"].to_pylist()]
        table = table.filter(pa.array(is_last, pa.bool_()))
        return table.select(["uid", "source", "url", "captions", "input_rows", "extra"]).append_column(
            "retry_of", table["shard"]
        )

    shards = [shard for shard in sorted(crawled, key=int) if _counts_any(crawled[shard], reasons)]
    with contextlib.closing(prefetch_map(failed, shards, ahead=_AHEAD, threads=_AHEAD)) as tables:
        yield from tables


def _last_retries(records: Records, retries: dict[str, OutputFile]) -> dict[str, str]:
    """Return by uid the last retry shard that has it."""
    last: dict[str, str] = {}
    for shard in sorted(retries, key=int):
        uids = _read(records, retries[shard].path, ["uid"])["uid"]
        last.update(dict.fromkeys(uids.to_pylist(), shard))
    return last


def _counts_any(record: ShardRecord, reasons: Collection[str]) -> bool:
    return any(name.partition("/")[2] in reasons for name in record.counts)


def _read(records: Records, path: str, columns: list[str]) -> pa.Table:
    with records.storage.open(path) as file:
        return pq.read_table(file, columns=columns)
