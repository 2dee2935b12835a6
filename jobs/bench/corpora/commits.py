"""What a commit costs where the stages do no work: CPU milliseconds of the driver and of the workers, on Ray.

The runner, the records, the storage and Ray are those of a run; the shards have one URL each. The driver is this
process from the start of a run to its end, Ray's part in it included; Ray is up, and a few shards have gone through.
A worker's figure is of the thread that works on the shard, Ray Data's part in it included; the other threads of its
process are Ray's, and take as much where it waits.
"""

from typing import Any

from rich.console import Console

from jobs.bench.fixtures.corpus import write_url_list
from jobs.bench.fixtures.idle_stages import load_idle_worker, worker_cpu_ms
from jobs.bench.fixtures.machine import Stopwatch
from jobs.bench.fixtures.many_shards import LIST, RECIPE, recipe_config
from jobs.cluster.session import ray_session
from jobs.interrupts import Interrupts
from jobs.run import RunOptions, run
from pipeline.config import load_config
from pipeline.corpus.records import Records
from pipeline.intake.read_lists import read_lists
from pipeline.storage.scratch import temporary_folder
from pipeline.storage.storage import Storage
from schemas.stages import Stage

_STAGES: tuple[Stage, ...] = ("crawl", "caption", "rank", "select")
_WARM_UP_SHARDS = 8
_RUN = "20260101T000000-bench"
# Of a worker: its first ones, with which it loads libraries.
_SKIPPED = 4


def measure_commits(shards: list[int]) -> dict[str, Any]:
    """Run idle stages over so many shards, one corpus after another, on a Ray of their own."""
    config = load_config(RECIPE)
    with Interrupts() as interrupts, ray_session(config, _STAGES, interrupts):
        return {"corpora": [_measured(number) for number in shards]}


def _measured(shards: int) -> dict[str, Any]:
    with temporary_folder() as folder:
        corpus = str(folder / "corpus")
        write_url_list(folder / LIST, shards + _WARM_UP_SHARDS)
        config = recipe_config(folder, corpus, samples_per_shard=1)
        records = Records(Storage(corpus))
        read_lists(config, records, _RUN)
        _run(config, _WARM_UP_SHARDS)
        with Stopwatch() as driver:
            _run(config, None)
        commits = len(records.list_shards(_STAGES)) - _WARM_UP_SHARDS * len(_STAGES)
        assert commits == shards * len(_STAGES), f"{commits} commits"
        thread_ms, others_ms = worker_cpu_ms(corpus, _SKIPPED)
        return {
            "shards": shards,
            "commits": commits,
            "driver_ms": round(1000 * driver.cpu_s / commits, 2),
            "worker_ms": round(thread_ms, 2),
            "other_threads_ms": round(others_ms, 2),
            "commits_per_s": round(commits / driver.seconds, 1),
        }


def _run(config: Any, limit: int | None) -> None:
    options = RunOptions(quiet=True, limit=limit, stages=_STAGES, load=load_idle_worker)
    result = run(config, options, Console(stderr=True))
    assert result.record.shards_failed == 0, result.quarantined
