"""URLs to try again: further url shards of the URLs whose last try ended with one of some reasons."""

from collections.abc import Collection, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.records import Records
from pipeline.digests import digest_json
from pipeline.intake.url_shard_writer import IntakeOutcome, UrlShardWriter
from pipeline.storage.scratch import temporary_folder
from schemas.config import CapfiltConfig
from schemas.records import IntakeRecord, ShardRecord
from schemas.statuses import TRANSIENT
from schemas.tables import URLS


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
        with temporary_folder() as folder:
            writer = UrlShardWriter(records, name, earlier, folder, config.corpus.samples_per_shard)
            writer.add(rows)
            writer.cut()
        batch = writer.commit(
            kind="retry",
            run_id=run_id,
            signature=digest_json([rows["uid"].to_pylist(), rows["retry_of"].to_pylist()]),
            rows_in=rows.num_rows,
            rows_new=rows.num_rows,
            rows_duplicate=0,
            rows_known=0,
        )
        if batch is not None:
            return IntakeOutcome(source=name, record=batch)


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
