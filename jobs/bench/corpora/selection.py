"""The selection: curated shards written from a raw shard and its scores."""

from typing import Any

from jobs.bench.fixtures.corpus import SyntheticCorpus
from jobs.bench.fixtures.machine import Cost, Stopwatch, cost_summary, costs_by_variant
from jobs.bench.fixtures.pictures import jpegs, mean_bytes
from pipeline.corpus.records import Records
from pipeline.stages.selection import SelectWorker
from pipeline.storage.scratch import temporary_folder
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig
from schemas.records import ShardTask

_ROUNDS = 3


def measure_select(images: int) -> dict[str, Any]:
    """Select ``images`` images, a few times over, in a process of its own."""
    pictures = jpegs((512, 384))
    with temporary_folder() as folder:
        corpus = SyntheticCorpus(folder, images, samples_per_shard=99_996, pictures=pictures)
        [shard] = corpus.shards
        inputs = corpus.crawl_to_rank(shard)
        # The same input under other names: a shard that is committed would be done.
        names = [f"{number:05d}" for number in range(_ROUNDS + 1)]
        tasks = [corpus.task("select", name, **inputs) for name in names]
        costs = costs_by_variant({"select": _select}, [(corpus.config, task) for task in tasks])["select"]
    assert all(cost.images == images for cost in costs), costs
    return {
        "images": images,
        "rounds": _ROUNDS,
        "bytes_per_picture": mean_bytes(pictures),
        "select": cost_summary(costs),
    }


def _select(config: CapfiltConfig, task: ShardTask) -> Cost:
    """Select one shard as a run does; runs in a process of its own."""
    worker = SelectWorker(config, Records(Storage(task.corpus)))
    with Stopwatch() as watch:
        record = worker(task)
    return watch.cost(
        record.counts["kept"], **{part: record.seconds[part] for part in ("read", "select", "write")}
    )
