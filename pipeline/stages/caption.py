"""The caption stage: one crawled shard in, a table of ``num_captions`` captions for each of its images out."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.corpus.commit import LENGTH_EDGES, ShardCommit, ShardStats, histogram
from pipeline.corpus.records import Records
from pipeline.models.blip.captioner import BlipCaptioner, ImageBatch, TokenBatch
from pipeline.models.device import device_name
from pipeline.models.weights import captioner_weights
from pipeline.prefetch import decode_threads, in_batches, prefetch_map
from pipeline.shards.candidate_rows import publish_rows
from pipeline.shards.shard_reader import CrawledShard, open_crawled
from pipeline.text import clean_caption, count_words, mark_duplicates
from schemas.config import CapfiltConfig
from schemas.records import ShardRecord, ShardTask
from schemas.tables import CAPTIONS

Batch = tuple[list[dict[str, Any]], ImageBatch]


class CaptionWorker:
    """Caption one shard per call; the weights are loaded once.

    Two calls may run at once: one has the device while the other reads, decodes or writes.
    """

    def __init__(self, config: CapfiltConfig, records: Records) -> None:
        self.config = config
        self.records = records
        self.weights = captioner_weights(config.caption)
        self.models = (self.weights.digest,)
        self.captioner = BlipCaptioner(config.caption, self.weights, config.corpus.seed)
        self.gpu_lock = Lock()

    def __call__(self, task: ShardTask) -> ShardRecord:
        """Make and commit the shard's captions; return the record that stands."""
        with ShardCommit(self.records, task) as commit, ExitStack() as stack:
            stats = commit.stats
            stats.models = self.models
            stats.device = device_name(self.captioner.device)
            with stats.timed("read"):
                shard = stack.enter_context(open_crawled(self.records, task.inputs["crawl"]))
            work, batches = partial(self._generate, stats), self._batches(shard, stats)
            with stats.on_device(self.gpu_lock, work, batches, ahead=2) as generated:
                # While the device samples one batch, another is loaded and the text of a third is decoded.
                rows = [row for batch in generated for row in self._rows(*batch)]
            self._count(rows, shard.samples.num_rows, stats)
            stats.note_device_batch(self.captioner.batch.images)
            return publish_rows(commit, rows, CAPTIONS)

    def _batches(self, shard: CrawledShard, stats: ShardStats) -> Iterator[Batch]:
        """Yield batches in order of key; images that do not decode are left out."""

        def prepare(sample: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
            return sample, self.captioner.prepare(shard.image_bytes(sample["key"]))

        size = self.config.caption.batch_size
        samples = shard.samples.select(["uid", "source", "shard", "key"]).to_pylist()
        threads = decode_threads(
            self.config.cluster.caption.cpus, feeds_gpu=self.captioner.device.type == "cuda"
        )
        prepared = prefetch_map(prepare, samples, ahead=2 * size, threads=threads)
        decodable = ((sample, pixels) for sample, pixels in prepared if pixels is not None)
        for batch in in_batches(decodable, size, partial(stats.timed, "decode")):
            kept, pixels = zip(*batch, strict=True)
            with stats.timed("decode"):
                images = self.captioner.load(pixels, [sample["uid"] for sample in kept])
            yield list(kept), images

    def _generate(self, stats: ShardStats, batch: Batch) -> tuple[list[dict[str, Any]], TokenBatch]:
        samples, images = batch
        with stats.timed("gpu"):
            return samples, self.captioner.generate(images)

    def _rows(self, samples: list[dict[str, Any]], tokens: TokenBatch) -> list[dict[str, Any]]:
        """Return the rows of one batch of images."""
        rows = []
        for sample, raw in zip(samples, self.captioner.decode_text(tokens), strict=True):
            texts = [clean_caption(caption.text, self.config.caption.prompt) for caption in raw]
            for index, (caption, text, earlier) in enumerate(
                zip(raw, texts, mark_duplicates(texts), strict=True)
            ):
                rows.append(
                    sample
                    | {
                        "origin": "synthetic",
                        "candidate": index,
                        "raw_text": caption.text,
                        "text": text,
                        "seed": caption.seed,
                        "num_tokens": caption.num_tokens,
                        "duplicate_of": earlier,
                    }
                )
        return rows

    def _count(self, rows: list[dict[str, Any]], num_images: int, stats: ShardStats) -> None:
        num_captions = self.config.caption.num_captions
        duplicates = sum(row["duplicate_of"] is not None for row in rows)
        stats.rows_in = num_images
        stats.rows_out = len(rows)
        stats.images = len(rows) // num_captions
        stats.count("ok", rows=stats.images)
        if undecodable := num_images - stats.images:
            stats.count("failed", "undecodable", rows=undecodable)
        assert stats.images * num_captions == len(rows), (
            "an image has more or fewer captions than the config says"
        )
        stats.counts["duplicate"] = duplicates
        stats.histograms = {
            "caption_words": histogram(np.array([count_words(row["text"]) for row in rows]), LENGTH_EDGES),
            "caption_tokens": histogram(np.array([row["num_tokens"] for row in rows]), LENGTH_EDGES),
        }
