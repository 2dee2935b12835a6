"""The intake: a list becomes url shards; grown by 1%, it is read again; URLs that all failed are queued again."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pyarrow as pa

from jobs.arrow_alone import import_arrow_alone
from jobs.bench.fixtures.corpus import list_config, publish_rows, write_url_list
from jobs.bench.fixtures.machine import Stopwatch, peak_bytes
from pipeline.corpus.commit import ShardCommit
from pipeline.corpus.records import Records
from pipeline.intake.read_lists import read_lists
from pipeline.intake.retries import queue_retries
from pipeline.intake.url_shard_writer import IntakeOutcome
from pipeline.shards.shard_reader import committed_table
from pipeline.storage.scratch import temporary_folder
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig
from schemas.records import ShardTask
from schemas.tables import SAMPLES

# Every tenth row of the list repeats an earlier URL with a caption of its own.
_DUPLICATE_EVERY = 10
_NUMBER_SQL = f"if(n % {_DUPLICATE_EVERY} = {_DUPLICATE_EVERY - 1}, n - {_DUPLICATE_EVERY // 2}, n)"
_URL_SQL = (
    f"printf('https://images.host%d.example/photos/%06d/%09d_large.jpg', {_NUMBER_SQL} % 997, "
    f"{_NUMBER_SQL} // 1000, {_NUMBER_SQL})"
)


def measure_intake(rows: int) -> dict[str, Any]:
    """Read a list of ``rows`` rows, read it again when it has 1% more, and queue all URLs of a crawl that failed.

    Each in a process of its own.
    """
    grown = rows + max(rows // 100, 1)
    with (
        temporary_folder() as folder,
        ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as process,
    ):
        list_file = folder / "list.parquet"
        config = list_config(folder, list_file)
        write_url_list(list_file, rows, _URL_SQL)
        size = list_file.stat().st_size
        first = process.submit(_measured, read_lists, config).result()
        write_url_list(list_file, grown, _URL_SQL)
        again = process.submit(_measured, read_lists, config).result()
        process.submit(_fail_all, config).result()
        retried = process.submit(_measured, queue_retries, config).result()
    assert first["rows_new"] == rows - rows // _DUPLICATE_EVERY, first
    assert first["rows_new"] + again["rows_new"] == grown - grown // _DUPLICATE_EVERY, again
    return {"rows": rows, "list_bytes": size, "first": first, "grown": again, "retried": retried}


def _fail_all(config: CapfiltConfig) -> None:
    """Commit a crawl in which no URL answered."""
    records = Records(Storage(config.corpus.path))
    for (source, shard), urls in records.url_shards().items():
        task = ShardTask(
            corpus=config.corpus.path, stage="crawl", source=source, kind="web", shard=shard, run_id="bench",
            fingerprint="bench", inputs={"urls": urls},
        )  # fmt: skip
        rows = committed_table(records, urls.outputs["parquet"])
        ended = {"status": "failed", "reason": "timeout"}
        columns = [
            rows[field.name] if field.name in rows.column_names
            else pa.repeat(pa.scalar(ended.get(field.name), field.type), len(rows))
            for field in SAMPLES
        ]  # fmt: skip
        with ShardCommit(records, task) as commit:
            publish_rows(commit, pa.table(columns, schema=SAMPLES), images=0)


def _measured(
    take: Callable[[CapfiltConfig, Records, str], list[IntakeOutcome]], config: CapfiltConfig
) -> dict[str, Any]:
    """Return what an intake of one source made, as in a run, and what it took of this process."""
    import_arrow_alone()
    before = peak_bytes()
    with Stopwatch() as watch:
        [outcome] = take(config, Records(Storage(config.corpus.path)), "bench")
    record = outcome.record
    assert record is not None
    return {
        **{name: getattr(record, name) for name in ("rows_in", "rows_new", "rows_duplicate", "rows_known")},
        "shards": len(record.shards),
        "seconds": round(watch.seconds, 2),
        "cpu_s": round(watch.cpu_s, 2),
        "rows_per_s": round(record.rows_in / watch.seconds),
        "idle_bytes": before,
        "peak_bytes": peak_bytes(),
    }
