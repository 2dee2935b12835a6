"""Whole shards through the caption and rank workers: their rate as a share of the engine's own.

The workers take raw shards and leave Parquet and records, two shards at once, as an actor of a run has them do; the
device serves one of them at a time. The seconds by part are the clock's, as the records have them, summed over the
shards: ``gpu`` is the engine's, and ``wait`` is for the other shard. The bare engine's rate is that of ``gpu`` alone.

Full size is random weights as BLIP-large and CLIP ViT-L/14 are published; demo is the demo's own small models, beside
which decoding and writing take a larger share. A CPU computes in float32 on one thread, a GPU in bfloat16.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, Literal

from jobs.bench.fixtures.compute import one_thread
from jobs.bench.fixtures.corpus import SyntheticCorpus
from jobs.bench.fixtures.machine import Stopwatch, median_ratio
from jobs.bench.fixtures.models import (
    END_CHANCE,
    blip_large,
    end_after,
    image_features,
    save_captioner,
    save_ranker,
)
from jobs.bench.fixtures.pictures import jpegs
from jobs.demo.weights_training.models import CAPTIONER_DIR, RANKER_DIR
from pipeline.models.device import device_name, worker_device
from pipeline.stages.caption import CaptionWorker
from pipeline.stages.rank import RankWorker
from pipeline.storage.scratch import temporary_folder
from schemas.config import CapfiltConfig, InferencePrecision
from schemas.records import ShardRecord, ShardTask
from schemas.stages import Stage

Size = Literal["full", "demo"]

_PARTS = ("read", "decode", "gpu", "write", "wait", "total")
_CALLS_AT_ONCE = 2
_BATCH_SIZES = {"cpu": 32, "cuda": 256}


class Stages:
    """The caption and rank workers, on a corpus whose raw shards are made here."""

    def __init__(
        self, corpus: SyntheticCorpus, captioner: Path, ranker: Path, batch_size: int, precision: str = "auto"
    ) -> None:
        values = corpus.config.model_dump(mode="json")
        settings = {"batch_size": batch_size, "precision": precision}
        values["caption"] |= {"model": str(captioner), **settings}
        values["rank"] |= {"model": f"local-dir:{ranker}", "pretrained": "", **settings}
        self.config = CapfiltConfig.model_validate(values)
        self.corpus = corpus
        self.caption = CaptionWorker(self.config, corpus.records)
        self.rank = RankWorker(self.config, corpus.records)
        self._crawled = [corpus.crawl(shard) for shard in corpus.shards]
        # A name of its own each time: a shard that is committed would be done.
        self._names = (f"{number:05d}" for number in count())

    def run(self) -> dict[str, dict[str, float]]:
        """Caption and rank all shards; return the seconds of each stage's parts, summed, and of the whole."""
        inputs = [{"crawl": record} for record in self._crawled]
        captioned, caption_s = self._through("caption", self.caption, inputs)
        inputs = [
            {"crawl": crawl, "caption": record}
            for crawl, record in zip(self._crawled, captioned, strict=True)
        ]
        _, rank_s = self._through("rank", self.rank, inputs)
        return {"caption": caption_s, "rank": rank_s}

    def _through(
        self, stage: Stage, worker: Callable[[ShardTask], ShardRecord], inputs: list[dict[str, ShardRecord]]
    ) -> tuple[list[ShardRecord], dict[str, float]]:
        tasks = [self.corpus.task(stage, next(self._names), **records) for records in inputs]
        with Stopwatch() as watch, ThreadPoolExecutor(_CALLS_AT_ONCE) as calls:
            records = list(calls.map(worker, tasks))
        assert [record.images for record in records] == [crawl.images for crawl in self._crawled], (
            "images were lost"
        )
        parts = {part: sum(record.seconds[part] for record in records) for part in _PARTS}
        return records, parts | {"whole": watch.seconds}


def measure_shard(
    images: int, shards: int, rounds: int, size: Size, precision: InferencePrecision
) -> dict[str, Any]:
    """Caption and rank ``shards`` shards of ``images`` images, ``rounds`` times.

    Args:
        images: of a shard, rounded up to a multiple of three: every fourth URL of the synthetic corpus failed.
    """
    device = worker_device()
    images = -(-images // 3) * 3
    with one_thread(device), temporary_folder() as folder:
        models = (CAPTIONER_DIR, RANKER_DIR)
        if size == "full":
            model = blip_large(device)
            end_after(model, image_features(model, 1), END_CHANCE)
            models = save_captioner(model, folder / "captioner"), save_ranker(folder / "ranker")
        corpus = SyntheticCorpus(folder, images * shards, images // 3 * 4, jpegs((512, 384)))
        stages = Stages(corpus, *models, _BATCH_SIZES[device.type], precision)
        # The first round compiles and captures on a GPU: not counted.
        counted = [stages.run() for _ in range(rounds + 1)][1:]
    return {
        "size": size,
        "device": device_name(device),
        "dtype": str(stages.caption.captioner.dtype).removeprefix("torch."),
        "precision": precision,
        "images": images,
        "shards": shards,
        "rounds": rounds,
        "batch_size": _BATCH_SIZES[device.type],
        **{
            stage: _summary([seconds[stage] for seconds in counted], images * shards)
            for stage in ("caption", "rank")
        },
    }


def _summary(rounds: list[dict[str, float]], images: int) -> dict[str, Any]:
    seconds = {part: [times[part] for times in rounds] for part in rounds[0]}
    return {
        "images_per_s": round(images / median(seconds["whole"]), 3),
        "bare_images_per_s": round(images / median(seconds["gpu"]), 3),
        "bare_share": median_ratio(seconds["gpu"], seconds["whole"], 4),
        "seconds": {part: round(median(seconds[part]), 3) for part in _PARTS},
    }
