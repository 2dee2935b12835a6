"""The rank stage: the CLIP score of every candidate caption of a shard, and of the best the score of a second CLIP."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.candidates import Candidate, choose
from pipeline.corpus.commit import SCORE_EDGES, ShardCommit, ShardStats, histogram
from pipeline.corpus.records import Records
from pipeline.images.preprocess import decode_pixels, stack_pinned
from pipeline.models.clip.ranker import ClipRanker
from pipeline.models.device import device_name
from pipeline.models.weights import ranker_weights
from pipeline.prefetch import decode_threads
from pipeline.shards.candidate_rows import (
    ImageCandidates,
    Rows,
    candidate_rows,
    count_judged,
    distinct_texts,
    image_batches,
    publish_rows,
)
from pipeline.shards.shard_reader import CrawledShard, open_crawled
from schemas.config import CapfiltConfig
from schemas.records import ShardRecord, ShardTask
from schemas.tables import CANDIDATES

# Its pixels are those for each CLIP.
_Image = ImageCandidates[tuple[Tensor, ...]]


class RankWorker:
    """Score one shard per call; the weights are loaded once.

    Two calls may run at once: one has the device while the other reads, decodes or writes.
    """

    def __init__(self, config: CapfiltConfig, records: Records) -> None:
        self.config = config
        self.records = records
        rank = config.rank
        weights = [ranker_weights(rank.model, rank.pretrained)]
        if rank.rerank is not None:
            weights.append(ranker_weights(rank.rerank.model, rank.rerank.pretrained, "rank.rerank"))
        self.models = tuple(model.digest for model in weights)
        self.rankers = [
            ClipRanker(model, rank.precision, rank.batch_size, where)
            for model, where in zip(weights, ("rank.model", "rank.rerank.model"), strict=False)
        ]
        self.gpu_lock = Lock()

    def __call__(self, task: ShardTask) -> ShardRecord:
        """Make and commit the shard's scores; return the record that stands."""
        with ShardCommit(self.records, task) as commit, ExitStack() as stack:
            stats = commit.stats
            stats.models = self.models
            stats.device = device_name(self.rankers[0].device)
            with stats.timed("read"):
                shard = stack.enter_context(open_crawled(self.records, task.inputs["crawl"]))
                candidates = candidate_rows(self.records, shard, task)
            work, batches = partial(self._score, stats), self._batches(shard, candidates, stats)
            with stats.on_device(self.gpu_lock, work, batches) as scored:
                # Scores are read from a batch while the device computes the next one.
                rows = [row for batch in scored for image in batch for row in image.candidates]
            _count(rows, shard.samples.num_rows, task.kind, stats)
            stats.note_device_batch(*(ranker.batch.images for ranker in self.rankers))
            return publish_rows(commit, rows, CANDIDATES)

    def _batches(self, shard: CrawledShard, candidates: Rows, stats: ShardStats) -> Iterator[list[_Image]]:
        # Decoded once for both CLIPs.
        preprocesses = [ranker.preprocess for ranker in self.rankers]
        prepare = partial(decode_pixels, preprocesses=preprocesses, path=self.config.rank.pixels)
        on_gpu = self.rankers[0].device.type == "cuda"
        threads = decode_threads(self.config.cluster.rank.cpus, feeds_gpu=on_gpu)
        size = self.config.rank.batch_size
        return image_batches(shard, candidates, prepare, stats, size=size, threads=threads)

    def _score(self, stats: ShardStats, batch: list[_Image]) -> list[_Image]:
        """Write score, truncated and, for the best of them, rerank_score into the candidates' rows."""
        images = [image for image in batch if image.pixels is not None]
        if not images:
            return batch
        with stats.timed("gpu"):
            self._score_with(0, "score", images, [distinct_texts(image.candidates) for image in images])
            rerank = self.config.rank.rerank
            if rerank is not None:
                best = [_best(image.candidates, rerank.first) for image in images]
                self._score_with(1, "rerank_score", images, best)
        return batch

    def _score_with(self, position: int, column: str, images: list[_Image], texts: list[list[str]]) -> None:
        pixels = [image.pixels[position] for image in images if image.pixels is not None]
        pixels_BCHW = stack_pinned(pixels)
        scores = self.rankers[position].score_pixels(pixels_BCHW, texts)
        for image, image_texts, image_scores in zip(images, texts, scores, strict=True):
            by_text = dict(zip(image_texts, image_scores, strict=True))
            for row in image.candidates:
                score = by_text.get(row["text"])
                if score is not None:
                    row[column] = score.similarity
                    row["truncated"] = row.get("truncated", False) or score.truncated


def _best(rows: Sequence[Mapping[str, Any]], first: int) -> list[str]:
    """Return the ``first`` distinct texts by score."""
    candidates = map(Candidate.of_row, rows)
    return [choice.candidate.text for choice in choose(candidates, top_k=first) if choice.reason is None]


def _count(rows: Sequence[dict[str, Any]], num_images: int, kind: str, stats: ShardStats) -> None:
    scored = count_judged(rows, "score", num_images, stats)
    stats.counts["truncated"] = sum(bool(row.get("truncated")) for row in scored)
    scores: dict[str, list[float]] = {"score": [], f"{kind}_score": []}
    best: dict[str, float] = {}
    for row in scored:
        scores["score" if row["origin"] == "synthetic" else f"{kind}_score"].append(row["score"])
        best[row["key"]] = max(row["score"], best.get(row["key"], -np.inf))
    stats.histograms = {
        name: histogram(values, SCORE_EDGES)
        for name, values in (scores | {"score_best": list(best.values())}).items()
    }
