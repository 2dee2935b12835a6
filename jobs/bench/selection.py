"""The selection: curated shards written from a raw shard and its scores."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median
from typing import Any

from jobs.bench.fixtures.corpus import SyntheticCorpus
from jobs.bench.fixtures.machine import Stopwatch, peak_bytes
from jobs.bench.fixtures.pictures import jpeg
from pipeline.corpus.records import Records
from pipeline.corpus.scratch import temporary_folder
from pipeline.corpus.storage import Storage
from pipeline.stages.selection import SelectWorker
from schemas.config import CapfiltConfig
from schemas.records import ShardTask

_STORED_PX = (512, 384)
_PICTURES = 16
_ROUNDS = 3


def measure_select(images: int) -> dict[str, Any]:
    """Select ``images`` images, a few times over, in a process of its own."""
    pictures = [jpeg(seed, _STORED_PX) for seed in range(_PICTURES)]
    with temporary_folder() as folder, ProcessPoolExecutor(1, get_context("spawn")) as process:
        corpus = SyntheticCorpus(folder, images, samples_per_shard=99_996, pictures=pictures)
        [shard] = corpus.shards
        crawl = corpus.crawl(shard)
        rank = corpus.rank(shard, crawl, corpus.caption(shard, crawl))
        # The same input under other names: a shard that is committed would be done. The first round warms up.
        tasks = [
            corpus.task("select", f"{number:05d}", crawl=crawl, rank=rank) for number in range(_ROUNDS + 1)
        ]
        rounds = [process.submit(_select, corpus.config, task).result() for task in tasks]
    assert all(done["images"] == images and done["kept"] == images for done in rounds), rounds
    counted = rounds[1:]
    total = sum(done["seconds"] for done in counted)
    return {
        "images": images,
        "rounds": _ROUNDS,
        "bytes_per_picture": sum(map(len, pictures)) // len(pictures),
        "select": {
            "images_per_s": round(median(images / done["seconds"] for done in counted), 1),
            "cpu_ms_per_image": round(median(1000 * done["cpu_s"] / images for done in counted), 3),
            "peak_bytes": max(done["peak_bytes"] for done in rounds),
            "share": {
                part: round(sum(done["parts"][part] for done in counted) / total, 3)
                for part in ("read", "select", "write")
            },
        },
    }


def _select(config: CapfiltConfig, task: ShardTask) -> dict[str, Any]:
    """Select one shard as a run does; runs in a process of its own."""
    worker = SelectWorker(config, Records(Storage(task.corpus)))
    with Stopwatch() as watch:
        record = worker(task)
    return {
        "images": record.images,
        "kept": record.counts["kept"],
        "seconds": watch.seconds,
        "cpu_s": watch.cpu_s,
        "peak_bytes": peak_bytes(),
        "parts": dict(record.seconds),
    }
