"""The filter stage: the probability that each candidate caption of a shard matches its image, by BLIP's filter.

It repeats the rows of the rank stage with one column more. CLIP's scores do not enter the probabilities: a shard whose
scores alone have changed takes them from the file that this one replaces.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.corpus.commit import ShardCommit, ShardStats, histogram
from pipeline.corpus.fingerprint import stage_fingerprint
from pipeline.corpus.records import Records
from pipeline.images.preprocess import stack_pinned
from pipeline.models.blip.matcher import Matcher
from pipeline.models.device import device_name
from pipeline.models.weights import filter_weights
from pipeline.prefetch import decode_threads
from pipeline.shards.candidate_rows import (
    ImageCandidates,
    Rows,
    count_judged,
    distinct_texts,
    image_batches,
    publish_rows,
    scored_rows,
)
from pipeline.shards.shard_reader import CrawledShard, committed_table, open_crawled
from schemas.config import CapfiltConfig
from schemas.errors import CorruptShardError
from schemas.records import ShardRecord, ShardTask
from schemas.tables import MATCHES

# In a file's metadata: the digest of all that decides its probabilities, but for the texts.
_MATCH_OF = b"match_of"
_EDGES = tuple(round(0.01 * step, 2) for step in range(101))
# By uid, origin, number and text.
Probabilities = dict[tuple[Any, ...], float | None]
_IDENTITY = ("uid", "origin", "candidate", "text")


class FilterWorker:
    """Judge the candidates of one shard per call; the weights are loaded once.

    Two calls may run at once: one has the device while the other reads, decodes or writes.
    """

    def __init__(self, config: CapfiltConfig, records: Records) -> None:
        assert config.filter is not None, "a corpus without [filter] has no such stage"
        self.config, self.section = config, config.filter
        self.records = records
        weights = filter_weights(self.section)
        self.models = (weights.digest,)
        self.matcher = Matcher(self.section, weights)
        self.gpu_lock = Lock()

    def __call__(self, task: ShardTask) -> ShardRecord:
        """Make and commit the shard's match probabilities; return the record that stands."""
        with ShardCommit(self.records, task) as commit, ExitStack() as stack:
            stats = commit.stats
            stats.models = self.models
            stats.device = device_name(self.matcher.device)
            with stats.timed("read"):
                shard = stack.enter_context(open_crawled(self.records, task.inputs["crawl"]))
                candidates = scored_rows(self.records, shard, task)
                match_of = self._match_of(task)
                earlier = self._earlier(task, match_of)
            rows = [row for key in shard.keys for row in candidates.get(key, ())]
            if all(_identity(row) in earlier for row in rows):
                for row in rows:
                    row["match_probability"] = earlier[_identity(row)]
            else:
                self._judge(shard, candidates, stats)
            _count(rows, shard.samples.num_rows, stats)
            stats.note_device_batch(self.matcher.batch.images)
            return publish_rows(commit, rows, MATCHES.with_metadata({_MATCH_OF: match_of}))

    def _match_of(self, task: ShardTask) -> bytes:
        """Return the digest of weights, ``[filter]`` and images."""
        # Of the crawl its tar alone: its rows hold seconds, and equal corpora shall have equal files.
        images = {"crawl": {"tar": task.inputs["crawl"].outputs["tar"].sha256}}
        return stage_fingerprint(self.config, "filter", task.kind, images, self.models).encode()

    def _earlier(self, task: ShardTask, match_of: bytes) -> Probabilities:
        """Return the probabilities of the file that this one replaces, if they are of the same images and weights."""
        if task.replaces is None:
            return {}
        try:
            table = committed_table(self.records, task.replaces.outputs["parquet"])
        except CorruptShardError:
            return {}
        if (table.schema.metadata or {}).get(_MATCH_OF) != match_of:
            return {}
        rows = table.select([*_IDENTITY, "match_probability"]).to_pylist()
        return {_identity(row): row["match_probability"] for row in rows}

    def _judge(self, shard: CrawledShard, candidates: Rows, stats: ShardStats) -> None:
        """Write ``match_probability`` into the candidates' rows."""
        on_gpu, size = self.matcher.device.type == "cuda", self.section.batch_size
        threads = decode_threads(self.config.cluster.filter.cpus, feeds_gpu=on_gpu)
        batches = image_batches(shard, candidates, self.matcher.prepare, stats, size=size, threads=threads)
        with stats.on_device(self.gpu_lock, partial(self._judge_batch, stats), batches) as judged:
            for _ in judged:
                pass

    def _judge_batch(self, stats: ShardStats, batch: Sequence[ImageCandidates[Tensor]]) -> None:
        images = [image for image in batch if image.pixels is not None]
        if not images:
            return
        texts = [distinct_texts(image.candidates) for image in images]
        with stats.timed("gpu"):
            pixels_BCHW = stack_pinned([image.pixels for image in images if image.pixels is not None])
            probabilities = self.matcher.match(pixels_BCHW, texts)
        for image, image_texts, of_image in zip(images, texts, probabilities, strict=True):
            by_text = dict(zip(image_texts, of_image, strict=True))
            for row in image.candidates:
                row["match_probability"] = by_text.get(row["text"])


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in _IDENTITY)


def _count(rows: Sequence[dict[str, Any]], num_images: int, stats: ShardStats) -> None:
    scored = count_judged(rows, "match_probability", num_images, stats)
    by_origin: dict[str, list[float]] = {"synthetic": [], "web": []}
    for row in scored:
        by_origin[row["origin"]].append(row["match_probability"])
    for origin, values in by_origin.items():
        # Where the head's two classes are equal, the text is a match.
        stats.counts[f"matches/{origin}"] = int((np.asarray(values) >= 0.5).sum())
    stats.histograms = {f"{origin}_match": histogram(values, _EDGES) for origin, values in by_origin.items()}
