"""Whole shards through the caption and rank workers, in turn with the bare engine on the same images.

The workers take raw shards and leave Parquet and records, two shards at once, as an actor of a run has them do.
The bare engine gets the images as pixels that lie in memory already, in the same batches. Needs no Ray, no
network and no weights: full size is random weights as BLIP-large and CLIP ViT-L/14 are published; demo is the
demo's own, small ones, beside which decoding and bookkeeping look large.

A CPU computes in float32 on one thread, and its rates are by the CPU seconds of all threads, so that nothing is
hidden by running beside something else; a GPU computes in bfloat16, by the clock. The seconds by part are the
clock's, as the records have them, summed over the shards; ``wait`` is for the other shard's turn.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import pyarrow as pa
import torch
from torch import Tensor

from jobs.bench.fixtures.compute import one_thread, seconds
from jobs.bench.fixtures.corpus import SyntheticCorpus
from jobs.bench.fixtures.models import END_CHANCE, blip_large, end_after, save_captioner, save_ranker
from jobs.bench.fixtures.pictures import jpeg
from jobs.demo.weights_training.models import CAPTIONER_DIR, RANKER_DIR
from pipeline.corpus.scratch import temporary_folder
from pipeline.corpus.shard_reader import committed_table
from pipeline.images.preprocess import decode_pixels, stack_pinned
from pipeline.models.device import device_name, worker_device
from pipeline.stages.caption import CaptionWorker
from pipeline.stages.rank import RankWorker
from schemas.config import CapfiltConfig
from schemas.records import ShardRecord
from schemas.stages import Stage

Size = Literal["full", "demo"]

_PICTURE_PX = (512, 384)
_PICTURES = 16
_PARTS = ("read", "decode", "gpu", "write", "wait", "total")
_CALLS_AT_ONCE = 2
_BATCH_SIZES = {"cpu": 32, "cuda": 256}


@dataclass(slots=True)
class _Shard:
    """One raw shard, and its images as the bare engine takes them."""

    crawl: ShardRecord
    uids: list[str]
    blip: list[Tensor]
    clip: list[Tensor]


def measure_shard(images: int, shards: int, rounds: int, size: Size) -> dict[str, Any]:
    """Caption and rank ``shards`` shards of ``images`` images each way in turn, ``rounds`` times.

    Args:
        images: of a shard, rounded up to a multiple of three: every fourth URL of the synthetic corpus failed.
    """
    device = worker_device()
    images = -(-images // 3) * 3
    with one_thread(device), temporary_folder() as folder:
        pictures = [jpeg(seed, _PICTURE_PX) for seed in range(_PICTURES)]
        corpus = SyntheticCorpus(
            folder, images * shards, samples_per_shard=images // 3 * 4, pictures=pictures
        )
        bench = _Bench(corpus, _config(corpus.config, folder, size, device))
        # A GPU compiles and captures for each size of a batch: a whole shard, not counted.
        bench.round(bench.shards[:1] if device.type == "cuda" else [])
        timed = [bench.round(bench.shards) for _ in range(rounds)]
    assert len(bench.shards) == shards, "the synthetic corpus has other shards than were asked for"
    total = images * shards
    return {
        "size": size,
        "device": device_name(device),
        "dtype": str(bench.caption.captioner.dtype).removeprefix("torch."),
        "images": images,
        "shards": shards,
        "rounds": rounds,
        "batch_size": bench.config.caption.batch_size,
        "mean_tokens": round(mean(tokens for measured in timed for tokens in measured["tokens"]), 2),
        **{name: all(measured[name] for measured in timed) for name in ("same_captions", "same_scores")},
        **{stage: _summary([measured[stage] for measured in timed], total) for stage in ("caption", "rank")},
    }


class _Bench:
    """The two workers over a synthetic corpus."""

    def __init__(self, corpus: SyntheticCorpus, config: CapfiltConfig) -> None:
        self.corpus = corpus
        self.config = config
        self.device = worker_device()
        self.caption = CaptionWorker(config, corpus.records)
        self.rank = RankWorker(config, corpus.records)
        self.shards = self._shards()
        self._made = 0

    def round(self, shards: Sequence[_Shard]) -> dict[str, Any]:
        """Caption and rank the shards both ways, and compare what comes out."""
        captioned, caption = self._through("caption", self.caption, shards, [{} for _ in shards])
        captions = [self._columns(record, "raw_text", "num_tokens") for record in captioned]
        bare: list[list[list[str]]] = []
        caption["bare_s"] = seconds(
            lambda: bare.extend(self._caption_bare(shard) for shard in shards), self.device
        )
        ranked, rank = self._through("rank", self.rank, shards, [{"caption": record} for record in captioned])
        scored = [self._columns(record, "text", "score") for record in ranked]
        # A text is scored once an image, and not at all if there is nothing of it.
        scores = [
            [{text: score for text, score in row if score is not None} for row in rows] for rows in scored
        ]
        bare_scores: list[list[list[float]]] = []
        rank["bare_s"] = seconds(
            lambda: bare_scores.extend(map(self._rank_bare, shards, scores)),
            self.device,
        )
        return {
            "caption": caption,
            "rank": rank,
            "same_captions": bare == [[[text for text, _ in row] for row in rows] for rows in captions],
            "same_scores": bare_scores == [[list(row.values()) for row in rows] for rows in scores],
            "tokens": [tokens for rows in captions for row in rows for _, tokens in row],
        }

    def _through(
        self, stage: Stage, worker: Callable[..., ShardRecord], shards: Sequence[_Shard], inputs: list[dict]
    ) -> tuple[list[ShardRecord], dict[str, Any]]:
        """Send the shards through a stage's worker; return its records and what they took."""
        tasks = []
        for shard, more in zip(shards, inputs, strict=True):
            # A name of its own each time: what is committed would be done.
            tasks.append(self.corpus.task(stage, f"{self._made:05d}", crawl=shard.crawl, **more))
            self._made += 1
        records: list[ShardRecord] = []
        with ThreadPoolExecutor(_CALLS_AT_ONCE) as calls:
            whole_s = seconds(lambda: records.extend(calls.map(worker, tasks)), self.device)
        assert all(record.images == len(shard.uids) for record, shard in zip(records, shards, strict=True))
        parts = {part: sum(record.seconds[part] for record in records) for part in _PARTS}
        return records, {"whole_s": whole_s, "parts": parts}

    def _columns(self, record: ShardRecord, *names: str) -> list[list[tuple[Any, ...]]]:
        """Return columns of a stage's rows, by image, in order of key."""
        table = committed_table(self.corpus.records, record.outputs["parquet"], ["key", *names])
        images: dict[str, list[tuple[Any, ...]]] = {}
        for key, *values in zip(*(table[name].to_pylist() for name in ("key", *names)), strict=True):
            images.setdefault(key, []).append(tuple(values))
        return [images[key] for key in sorted(images)]

    def _caption_bare(self, shard: _Shard) -> list[list[str]]:
        captioner, size = self.caption.captioner, self.config.caption.batch_size
        captions: list[list[str]] = []
        for start in range(0, len(shard.uids), size):
            batch = slice(start, start + size)
            sampled = captioner.generate(captioner.load(shard.blip[batch], shard.uids[batch]))
            captions += [[caption.text for caption in row] for row in captioner.decode_text(sampled)]
        return captions

    def _rank_bare(self, shard: _Shard, rows: list[dict[str, float]]) -> list[list[float]]:
        [ranker], size = self.rank.rankers, self.config.rank.batch_size
        texts = [list(row) for row in rows]
        similarities: list[list[float]] = []
        for start in range(0, len(texts), size):
            batch = slice(start, start + size)
            scores = ranker.score_pixels(stack_pinned(shard.clip[batch]), texts[batch])
            similarities += [[score.similarity for score in row] for row in scores]
        return similarities

    def _shards(self) -> list[_Shard]:
        """Make the raw shards, and decode the few pictures that they consist of."""
        recipes = [self.caption.captioner.preprocess, self.rank.rankers[0].preprocess]
        decoded = [decode_pixels(data, recipes, "exact") for data in self.corpus.pictures]
        pixels = [image for image in decoded if image is not None]
        shards = []
        for name in self.corpus.shards:
            crawl = self.corpus.crawl(name)
            samples = committed_table(self.corpus.records, crawl.outputs["parquet"], ["uid", "key", "status"])
            stored = samples.filter(pa.compute.equal(samples["status"], "ok")).sort_by("key")
            chosen = [pixels[number % len(pixels)] for number in range(stored.num_rows)]
            shards.append(
                _Shard(
                    crawl=crawl,
                    uids=stored["uid"].to_pylist(),
                    blip=[blip for blip, _ in chosen],
                    clip=[clip for _, clip in chosen],
                )
            )
        return shards


def _config(config: CapfiltConfig, folder: Path, size: Size, device: torch.device) -> CapfiltConfig:
    """Return the corpus's config with the models of a size, made where there are none."""
    captioner, ranker = (CAPTIONER_DIR, RANKER_DIR) if size == "demo" else _save_full(folder, device)
    values, batch_size = config.model_dump(mode="json"), _BATCH_SIZES[device.type]
    values["caption"] |= {"model": str(captioner), "batch_size": batch_size}
    values["rank"] |= {"model": f"local-dir:{ranker}", "pretrained": "", "batch_size": batch_size}
    return CapfiltConfig.model_validate(values)


def _save_full(folder: Path, device: torch.device) -> tuple[Path, Path]:
    model = blip_large(device)
    pixels_BCHW = torch.randn(1, 3, 384, 384, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        end_after(model, model.vision_model(pixels_BCHW).last_hidden_state, END_CHANCE)
    return save_captioner(model, folder / "captioner"), save_ranker(folder / "ranker")


def _summary(rounds: Sequence[dict[str, Any]], images: int) -> dict[str, Any]:
    whole_s = [measured["whole_s"] for measured in rounds]
    bare_s = [measured["bare_s"] for measured in rounds]
    return {
        "images_per_s": round(images / median(whole_s), 3),
        "bare_images_per_s": round(images / median(bare_s), 3),
        "bare_share": round(median(bare / whole for bare, whole in zip(bare_s, whole_s, strict=True)), 4),
        "seconds": {
            part: round(median(measured["parts"][part] for measured in rounds), 3) for part in _PARTS
        },
    }
