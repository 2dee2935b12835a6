"""The crawl stage: a shard of URLs becomes a tar of images and one sample row for every URL.

A shard is crawled here, or imported from the output of img2dataset's own command line.
"""

import contextlib
import ctypes
import json
import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.corpus.commit import LENGTH_EDGES, ShardCommit, ShardStats, histogram
from pipeline.corpus.living_workers import LivingWorkers
from pipeline.corpus.records import Records
from pipeline.images.resize import Resizer
from pipeline.intake.pictures.fetch import FileFetcher, ListFetcher
from pipeline.intake.pictures.formats import FORMATS
from pipeline.prefetch import decode_threads
from pipeline.shards.shard_files import write_parquet, write_tar
from pipeline.shards.shard_reader import retried_elsewhere
from pipeline.stages.img2dataset_shard import import_shard
from pipeline.stages.shard_images import Fetcher, ShardImages
from pipeline.text import count_words
from pipeline.web.client import Web
from schemas.config import CapfiltConfig
from schemas.records import OutputFile, ShardRecord, ShardTask
from schemas.statuses import REASONS, SAMPLE_STATUSES
from schemas.tables import SAMPLES_FILE, URLS

# Shorter side, in pixels, as stored.
SIZE_EDGES = (*(float(size) for size in range(0, 1025, 16)), 2048.0, 4096.0, 8192.0)
_META_COLUMNS = ("uid", "source", "shard", "key", "url", "sha256", "format",
                 "original_width", "original_height", "width", "height")  # fmt: skip
# One encoder: making one takes longer than it encodes.
_json = json.JSONEncoder(ensure_ascii=False).encode
_RETRIED = {"status": REASONS["retried"].status, "reason": "retried", "attempts": 0, "seconds": 0.0}


# glibc's mallopt parameters, and one megabyte.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _MB = -1, -3, 1 << 20


def _return_freed_memory() -> None:
    """Have glibc return big buffers to the system when they are freed.

    By default its threshold for that grows with the buffers it sees, so a few big images left a worker at
    1.19 GB over the hostile site, where fixed thresholds hold it at 0.83 GB. Buffers of up to a million pixels are
    reused: to ask the system for each costs a tenth of an image's CPU.
    """
    with contextlib.suppress(OSError, AttributeError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 4 * _MB)
        mallopt(_M_TRIM_THRESHOLD, 32 * _MB)


class CrawlWorker:
    """Crawl one shard of URLs per call, or import one that img2dataset's command line has crawled."""

    def __init__(self, config: CapfiltConfig, records: Records) -> None:
        _return_freed_memory()
        self._config = config.crawl
        self._sources = {source.name: source for source in config.source}
        self._records = records
        self._web = Web(config.crawl, config.cluster.crawl.max_workers)
        # Of all runs on this corpus: a host does not care which of them asks.
        self._crawlers = LivingWorkers(records.storage, "crawl", self._web.share_limits)
        self._decode_threads = decode_threads(config.cluster.crawl.cpus, feeds_gpu=False)
        crawl = config.crawl
        self._resizer = Resizer(
            crawl.image_size_px,
            crawl.resize_mode,
            only_if_bigger=crawl.resize_only_if_bigger,
            quality=crawl.encode_quality,
        )

    def __call__(self, task: ShardTask) -> ShardRecord:
        """Crawl the task's URLs and commit the shard."""
        urls = task.inputs["urls"].outputs
        with ShardCommit(self._records, task) as commit:
            with self._records.storage.local_copy(urls["parquet"].path) as path:
                rows = pq.read_table(path, schema=URLS).to_pylist()
            if "adopted" in urls:
                return self._import(commit, rows, urls["adopted"])
            with self._crawlers.at_work():
                return self._crawl(commit, rows)

    def _crawl(self, commit: ShardCommit, rows: list[dict[str, Any]]) -> ShardRecord:
        stats, folder, task = commit.stats, commit.folder, commit.task
        # A failure of this shard that was queued again belongs to a later shard now: where this shard is crawled
        # anew, it must not fetch that URL too, or the corpus would hold it twice.
        may_be_retried = task.has_retries or task.replaces is not None
        retried = retried_elsewhere(self._records, task.source, task.shard) if may_be_retried else ()
        passed_on = [{**row, **_RETRIED} for row in rows if row["uid"] in retried]
        rows = [row for row in rows if row["uid"] not in retried]
        with self._fetcher(task.source) as fetcher:
            urls = [row["url"] for row in rows]
            images = ShardImages(urls, folder, fetcher, self._resizer, self._config, self._decode_threads)
            with stats.timed("fetch"):
                images.download()
        # The two overlap: the decoder's seconds are taken out of those of the fetch.
        stats.seconds["decode"] = images.decode_s
        stats.seconds["fetch"] -= images.decode_s
        with stats.timed("write"):
            samples = [{**row, **images.columns[number]} for number, row in enumerate(rows)]
            tar = folder / "samples.tar"
            with images.stored() as jpeg:
                offsets = write_tar(tar, tar_samples(samples, jpeg))
            samples = [{**sample, "offset": offsets.get(sample["key"])} for sample in samples]
        parquet = _write_rows(commit, sorted(samples + passed_on, key=operator.itemgetter("key")))
        assert len(offsets) == stats.rows_out, f"{len(offsets)} images in the tar, {stats.rows_out} rows ok"
        return commit.publish({"tar": (tar, len(offsets)), "parquet": parquet})

    def _fetcher(self, source_name: str) -> contextlib.AbstractContextManager[Fetcher]:
        source = self._sources[source_name]
        if source.format in FORMATS:
            return FileFetcher(source, self._config, self._records.storage)
        return contextlib.nullcontext(
            ListFetcher(self._config, self._web) if self._config.allow_files else self._web
        )

    def _import(self, commit: ShardCommit, rows: list[dict[str, Any]], listed_tar: OutputFile) -> ShardRecord:
        with commit.stats.timed("read"):
            samples, tar = import_shard(rows, listed_tar, self._records.storage, self._config.max_pixels)
        return commit.publish({"parquet": _write_rows(commit, samples)}, imported={"tar": tar})


def _write_rows(commit: ShardCommit, samples: list[dict[str, Any]]) -> tuple[Path, int]:
    """Count the samples and write them as Parquet."""
    count_samples(commit.stats, samples)
    path = commit.folder / "samples.parquet"
    with commit.stats.timed("write"):
        return path, write_parquet(path, samples, SAMPLES_FILE)


def count_samples(stats: ShardStats, samples: Sequence[dict[str, Any]]) -> None:
    """Count a shard's samples by status and reason, and fill its histograms."""
    for sample in samples:
        stats.count(sample["status"], sample["reason"])
    stored = [sample for sample in samples if sample["status"] == "ok"]
    stats.rows_in, stats.rows_out, stats.images = len(samples), len(stored), len(stored)
    assert sum(stats.counts.get(status, 0) for status in SAMPLE_STATUSES) == len(samples)
    words = [count_words(caption) for sample in stored for caption in sample["captions"] or ()]
    stats.histograms = {
        "short_side_px": histogram([min(s["width"], s["height"]) for s in stored], SIZE_EDGES),
        "caption_words": histogram(words, LENGTH_EDGES),
    }


def tar_samples(
    samples: Sequence[dict[str, Any]], image: Callable[[int], bytes]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the stored samples for the tar, in order of key; ``image`` returns the JPEG of a row."""
    stored = [(sample["key"], number) for number, sample in enumerate(samples) if sample["status"] == "ok"]
    for key, number in sorted(stored):
        sample = samples[number]
        caption = (sample["captions"] or [""])[0]
        meta = _json({name: sample[name] for name in _META_COLUMNS})
        yield key, {"jpg": image(number), "txt": caption.encode(), "json": meta.encode()}
