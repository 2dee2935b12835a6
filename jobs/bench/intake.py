"""The intake: a list of URLs becomes url shards; then the same list, grown by 1%, is read again."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from jobs.arrow_alone import import_arrow_alone
from jobs.bench.fixtures.corpus import list_config, write_url_list
from jobs.bench.fixtures.machine import Stopwatch, peak_bytes
from pipeline.corpus.records import Records
from pipeline.intake.read_lists import read_lists
from pipeline.storage.scratch import temporary_folder
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig

# Every tenth row of the list repeats an earlier URL with a caption of its own.
_DUPLICATE_EVERY = 10
_NUMBER_SQL = f"if(n % {_DUPLICATE_EVERY} = {_DUPLICATE_EVERY - 1}, n - {_DUPLICATE_EVERY // 2}, n)"
_URL_SQL = (
    f"printf('https://images.host%d.example/photos/%06d/%09d_large.jpg', {_NUMBER_SQL} % 997, "
    f"{_NUMBER_SQL} // 1000, {_NUMBER_SQL})"
)


def measure_intake(rows: int) -> dict[str, Any]:
    """Read a list of ``rows`` rows, and read it again when it has 1% more; each in a process of its own."""
    grown = rows + max(rows // 100, 1)
    with (
        temporary_folder() as folder,
        ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as process,
    ):
        list_file = folder / "list.parquet"
        config = list_config(folder, list_file)
        write_url_list(list_file, rows, _URL_SQL)
        size = list_file.stat().st_size
        first = process.submit(_read, config).result()
        write_url_list(list_file, grown, _URL_SQL)
        again = process.submit(_read, config).result()
    assert first["rows_new"] == rows - rows // _DUPLICATE_EVERY, first
    assert first["rows_new"] + again["rows_new"] == grown - grown // _DUPLICATE_EVERY, again
    return {"rows": rows, "list_bytes": size, "first": first, "grown": again}


def _read(config: CapfiltConfig) -> dict[str, Any]:
    """Take the list in, as a run does; in a process of its own."""
    import_arrow_alone()
    before = peak_bytes()
    with Stopwatch() as watch:
        [outcome] = read_lists(config, Records(Storage(config.corpus.path)), "bench")
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
