"""The intake: a list of URLs becomes url shards; then the same list, grown by 1%, is read again."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.bench.fixtures.machine import Stopwatch, peak_bytes
from pipeline.corpus.records import Records
from pipeline.corpus.scratch import temporary_folder
from pipeline.corpus.storage import Storage
from pipeline.intake.read_lists import read_lists
from schemas.config import CapfiltConfig

# Every tenth row of the list repeats an earlier URL with a caption of its own.
_DUPLICATE_EVERY = 10
_CHUNK_ROWS = 100_000


def measure_intake(rows: int) -> dict[str, Any]:
    """Read a list of ``rows`` rows, and read it again when it has 1% more; each in a process of its own."""
    grown = rows + max(rows // 100, 1)
    with (
        temporary_folder() as folder,
        ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as process,
    ):
        config = CapfiltConfig.model_validate(
            {
                "corpus": {"path": str(folder / "corpus")},
                "source": [{"name": "bench", "input": [str(folder / "list.parquet")]}],
            }
        )
        _write_list(folder / "list.parquet", rows)
        size = (folder / "list.parquet").stat().st_size
        first = process.submit(_read, config).result()
        _write_list(folder / "list.parquet", grown)
        again = process.submit(_read, config).result()
    assert first["rows_new"] == rows - rows // _DUPLICATE_EVERY, first
    assert first["rows_new"] + again["rows_new"] == grown - grown // _DUPLICATE_EVERY, again
    return {"rows": rows, "list_bytes": size, "first": first, "grown": again}


def _write_list(path: Path, rows: int) -> None:
    schema = pa.schema([("url", pa.string()), ("caption", pa.string())])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, rows, _CHUNK_ROWS):
            numbers = range(start, min(start + _CHUNK_ROWS, rows))
            urls = [_url(number) for number in numbers]
            captions = [
                f"what a page says beside its picture number {number}, more or less" for number in numbers
            ]
            writer.write_table(pa.table([urls, captions], schema=schema))


def _url(number: int) -> str:
    if number % _DUPLICATE_EVERY == _DUPLICATE_EVERY - 1:
        number -= _DUPLICATE_EVERY // 2
    return f"https://images.host{number % 997}.example/photos/{number // 1000:06}/{number:09}_large.jpg"


def _read(config: CapfiltConfig) -> dict[str, Any]:
    """Take the list in; runs in a process of its own."""
    before = peak_bytes()
    with Stopwatch() as watch:
        [outcome] = read_lists(config, Records(Storage(config.corpus.path)), "bench")
    record = outcome.record
    assert record is not None
    return {
        "rows_in": record.rows_in,
        "rows_new": record.rows_new,
        "rows_duplicate": record.rows_duplicate,
        "rows_known": record.rows_known,
        "shards": len(record.shards),
        "seconds": round(watch.seconds, 2),
        "cpu_s": round(watch.cpu_s, 2),
        "rows_per_s": round(record.rows_in / watch.seconds),
        "idle_bytes": before,
        "peak_bytes": peak_bytes(),
    }
