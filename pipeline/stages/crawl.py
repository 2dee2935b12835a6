"""The crawl: a shard of URLs becomes a tar of images and one sample row for every URL.

img2dataset's Downloader, Resizer and WebDatasetSampleWriter do the work; around them stand the guarded fetch
(web.py) and the judging of headers (images.py). The Downloader is given row numbers instead of URLs: the
opener that answers its ``urlopen`` fetches the row's URL, and the decoder it calls takes that fetch's body.
So every outcome keeps its row, and big bodies wait on disk instead of in the Downloader's queue.
"""

import contextlib
import ctypes
import importlib
import io
import json
import operator
import os
import random
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
import urllib.response
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from email.message import Message
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.commit import LENGTH_EDGES, ShardCommit, ShardStats, histogram
from pipeline.corpus.records import Records
from pipeline.corpus.shard_files import rows_to_table, write_parquet, write_tar
from pipeline.corpus.shard_reader import retried_elsewhere
from pipeline.images.decode import FORMATS, ImageError, check, decode_srgb, encode_bmp, read_header
from pipeline.stages.img2dataset_shard import adopt_shard
from pipeline.text import count_words
from pipeline.web.client import Fetch, Web
from schemas.config import CapfiltConfig, CrawlConfig
from schemas.records import OutputFile, ShardRecord, ShardTask
from schemas.statuses import REASONS, SAMPLE_STATUSES
from schemas.tables import SAMPLES, URLS

# Shorter side, in pixels, as stored.
SIZE_EDGES = (*(float(size) for size in range(0, 1025, 16)), 2048.0, 4096.0, 8192.0)
_META_COLUMNS = ("uid", "source", "shard", "key", "url", "sha256", "format",
                 "original_width", "original_height", "width", "height")  # fmt: skip
_FETCH_COLUMNS = ("status", "reason", "detail", "http_status", "attempts", "final_url", "content_type",
                  "body_bytes", "sha256", "seconds")  # fmt: skip
_RETRIED = {"status": REASONS["retried"].status, "reason": "retried", "attempts": 0, "seconds": 0.0}
_SCHEME = "row:"
# One shard at a time in a process: urllib has one opener.
_OPENER_LOCK = threading.Lock()


# mallopt's names for them, and one megabyte.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _MB = -1, -3, 1 << 20


def _give_freed_memory_back() -> None:
    """Have glibc return big buffers to the system when they are freed.

    By default its threshold for that grows with the buffers it sees, so a few big images left a worker at
    1.19 GB over the hostile site, where fixed thresholds hold it at 0.71 GB.
    """
    with contextlib.suppress(OSError, AttributeError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _MB)
        mallopt(_M_TRIM_THRESHOLD, 32 * _MB)


class CrawlWorker:
    """Crawls one shard of URLs a call, or takes over one that img2dataset's command line has crawled."""

    def __init__(self, config: CapfiltConfig, records: Records) -> None:
        _give_freed_memory_back()
        self._config = config.crawl
        self._records = records
        self._web = Web(config.crawl, config.cluster.crawl.max_workers)
        self._resizer = make_resizer(config.crawl)

    def __call__(self, task: ShardTask) -> ShardRecord:
        """Crawl the task's URLs and commit the shard."""
        urls = task.inputs["urls"].outputs
        with ShardCommit(self._records, task) as commit:
            with self._records.storage.local_copy(urls["parquet"].path) as path:
                rows = pq.read_table(path, schema=URLS).to_pylist()
            if "adopted" in urls:
                return self._adopt(commit, rows, urls["adopted"])
            return self._crawl(commit, rows)

    def _crawl(self, commit: ShardCommit, rows: list[dict[str, Any]]) -> ShardRecord:
        stats, folder, task = commit.stats, commit.folder, commit.task
        # Where this shard is crawled anew after its failures were queued again: they are the later shard's
        # now, as a URL that both fetched would be in the corpus twice.
        retried = retried_elsewhere(self._records, task.source, task.shard)
        passed_on = [{**row, **_RETRIED} for row in rows if row["uid"] in retried]
        rows = [row for row in rows if row["uid"] not in retried]
        images = ShardImages([row["url"] for row in rows], folder, self._web, self._resizer, self._config)
        with stats.timed("fetch"):
            download(images, self._config)
        # The two overlap: what the decoder took is told apart from what was waited for.
        stats.seconds["decode"] = images.decode_s
        stats.seconds["fetch"] -= images.decode_s
        with stats.timed("write"), images.stored() as stored_image:
            samples = [{**row, **images.columns(number)} for number, row in enumerate(rows)]
            tar = folder / "samples.tar"
            stored = write_tar(tar, tar_samples(samples, stored_image))
        parquet = _write_rows(commit, sorted(samples + passed_on, key=operator.itemgetter("key")))
        assert stored == stats.rows_out, f"{stored} images in the tar, {stats.rows_out} rows ok"
        return commit.publish({"tar": (tar, stored), "parquet": parquet})

    def _adopt(self, commit: ShardCommit, rows: list[dict[str, Any]], adopted: OutputFile) -> ShardRecord:
        with commit.stats.timed("read"):
            samples, tar = adopt_shard(rows, adopted, self._records.storage, self._config.max_pixels)
        return commit.publish({"parquet": _write_rows(commit, samples)}, imported={"tar": tar})


def _write_rows(commit: ShardCommit, samples: list[dict[str, Any]]) -> tuple[Path, int]:
    """Count the samples and write them as Parquet."""
    count_samples(commit.stats, samples)
    path = commit.folder / "samples.parquet"
    with commit.stats.timed("write"):
        return path, write_parquet(path, rows_to_table(samples, SAMPLES), SAMPLES)


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
        meta = json.dumps({name: sample[name] for name in _META_COLUMNS}, ensure_ascii=False)
        yield key, {"jpg": image(number), "txt": caption.encode(), "json": meta.encode()}


# -- img2dataset ---------------------------------------------------------------------------------------------


class ShardImages:
    """The images of a shard: fetched, judged and decoded for img2dataset, which knows them by row number."""

    def __init__(
        self, urls: Sequence[str], folder: Path, web: Web, resizer: Any, config: CrawlConfig
    ) -> None:
        self.folder = folder
        self.decode_s = 0.0
        self._urls, self._web, self._resizer, self._config = urls, web, resizer, config
        self._fetches: dict[int, Fetch] = {}
        self._columns: dict[int, dict[str, Any]] = {}

    def list_rows(self) -> Path:
        """Write the Downloader's input, row numbers for URLs, and return its path.

        Lists are often sorted by host: a fixed shuffle spreads the turns at each.
        """
        numbers = list(range(len(self._urls)))
        random.Random(0).shuffle(numbers)
        table = pa.table({"url": [f"{_SCHEME}{number}" for number in numbers]})
        path = self.folder / "rows.arrow"
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
        return path

    def fetch(self, number: int) -> None:
        """Fetch the URL of a row. Raises URLError where that failed."""
        fetch = self._web.fetch(self._urls[number], self.folder)
        self._fetches[number], self._columns[number] = fetch, {}
        if fetch.reason is not None:
            raise urllib.error.URLError(fetch.reason)

    def store(self, stream: BinaryIO, _boxes: None = None) -> tuple[Any, ...]:
        """Turn the row that the stream names into a JPEG; img2dataset calls it as it would call its Resizer.

        It calls from one thread, so that a worker holds the pixels of one image at most.
        """
        number, start = int(stream.read()), time.perf_counter()
        fetch = self._fetches[number]
        try:
            stored = self._resize(fetch, self._columns[number])
            fetch.end()
            return stored
        except ImageError as error:
            fetch.end(error.reason, error.detail)
            return None, None, None, None, None, error.reason
        finally:
            fetch.close()
            self.decode_s += time.perf_counter() - start

    def _resize(self, fetch: Fetch, columns: dict[str, Any]) -> tuple[Any, ...]:
        """Judge a fetched body, hand it to img2dataset's Resizer, and note what it is. Raises ImageError."""
        assert fetch.body is not None
        data, config = fetch.body.read(), self._config
        header = read_header(data)
        columns.update(format=header.format, original_width=header.width, original_height=header.height)
        check(
            header,
            formats=config.formats,
            max_pixels=config.max_pixels,
            min_size_px=config.min_size_px,
            max_aspect_ratio=config.max_aspect_ratio,
        )
        # Decoded here, and whole: OpenCV, which the Resizer decodes with, fills up with grey what a file lacks.
        bmp = encode_bmp(decode_srgb(data, formats=FORMATS, max_pixels=config.max_pixels))
        jpeg, width, height, *originals, error = self._resizer(io.BytesIO(bmp))
        if error is not None:
            raise ImageError("image_truncated", error)
        columns.update(width=width, height=height, image_bytes=len(jpeg))
        return jpeg, width, height, *originals, None

    def columns(self, number: int) -> dict[str, Any]:
        """Return the columns of SAMPLES that the crawl adds to a row."""
        fetch = self._fetches[number]
        return {name: getattr(fetch, name) for name in _FETCH_COLUMNS} | self._columns[number]

    @contextlib.contextmanager
    def stored(self) -> Iterator[Callable[[int], bytes]]:
        """Open what img2dataset wrote; yield a function that returns the JPEG of a row.

        Raises RuntimeError unless tar, Parquet and fetches tell the same of every row: where writing a sample
        fails, img2dataset goes on, the row is missing, and its statistics do not say so.
        """
        table = pq.read_table(self.folder / "00000.parquet", columns=["key", "url", "status"])
        rows = {row["key"]: int(row["url"].removeprefix(_SCHEME)) for row in table.to_pylist()}
        statuses = dict(zip(rows.values(), table["status"].to_pylist(), strict=True))
        with tarfile.open(self.folder / "00000.tar") as tar:
            members = {rows.get(info.name[:-4]): info for info in tar if info.name.endswith(".jpg")}
            ok = {number for number, fetch in self._fetches.items() if fetch.status == "ok"}
            written = {number for number, status in statuses.items() if status == "success"}
            lost = set(range(len(self._urls))) - (self._fetches.keys() & statuses.keys())
            lost |= (ok ^ written) | (ok ^ {number for number in members if number is not None})
            if lost:
                raise RuntimeError(
                    f"img2dataset lost {len(lost)} of {len(self._urls)} rows: {sorted(lost)[:10]}; "
                    "what it printed above says why"
                )

            def image(number: int) -> bytes:
                file = tar.extractfile(members[number])
                assert file is not None
                return file.read()

            yield image


def download(images: ShardImages, config: CrawlConfig) -> None:
    """Run img2dataset's Downloader over a shard, into the shard's folder."""
    from img2dataset.downloader import Downloader
    from img2dataset.writer import WebDatasetSampleWriter

    path = images.list_rows()
    downloader = Downloader(
        sample_writer_class=WebDatasetSampleWriter,
        resizer=images.store,
        thread_count=config.threads,
        save_caption=False,
        extract_exif=False,
        output_folder=str(images.folder),
        column_list=["url"],
        timeout=config.timeout_s,
        number_sample_per_shard=100_000,
        oom_shard_count=5,
        compute_hash=None,
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,
        user_agent_token=None,
        disallowed_header_directives=None,
    )
    with _installed(_RowOpener(images.fetch)):
        # Not the call operator: that one swallows what goes wrong.
        _call_in_thread(lambda: downloader.download_shard((0, str(path))))


def _call_in_thread(call: Callable[[], object]) -> None:
    """Call something in another thread and wait for it; KeyboardInterrupt is raised here and abandons the call.

    img2dataset's thread pool waits forever for its own source of rows where KeyboardInterrupt is raised in its loop.
    Abandoned, it ends soon: without our opener every further row fails at once.
    """
    done: Future[object] = Future()

    def complete() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=complete, daemon=True).start()
    done.result()


def make_resizer(config: CrawlConfig) -> Any:
    """Return img2dataset's Resizer as the config wants it; what a header tells is judged before it."""
    _import_img2dataset(config.max_pixels)
    from img2dataset.resizer import Resizer

    return Resizer(
        image_size=config.image_size_px,
        resize_mode=config.resize_mode,
        resize_only_if_bigger=config.resize_only_if_bigger,
        encode_quality=config.encode_quality,
        encode_format="jpg",
    )


def _import_img2dataset(max_pixels: int) -> None:
    """Import img2dataset with what it must not do switched off.

    Its albumentations calls home, its OpenCV has no useful limit of pixels, its webdataset imports torch where
    there is one (600 MB of memory in a worker that never computes with it), and its distributor imports Ray.
    """
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(max_pixels))
    hidden = {"torch", "ray"} - sys.modules.keys()
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        importlib.import_module("img2dataset")
    finally:
        for name in hidden:
            del sys.modules[name]


class _RowOpener(urllib.request.OpenerDirector):
    """Answers urlopen("row:17") with the number, once the row is fetched; its body stays with the fetch."""

    def __init__(self, fetch: Callable[[int], None]) -> None:
        super().__init__()
        self._fetch = fetch

    def open(self, fullurl: Any, data: Any = None, timeout: Any = None) -> Any:
        number = fullurl.full_url.removeprefix(_SCHEME)
        self._fetch(int(number))
        return urllib.response.addinfourl(io.BytesIO(number.encode()), Message(), fullurl.full_url, 200)


@contextlib.contextmanager
def _installed(opener: urllib.request.OpenerDirector) -> Iterator[None]:
    """Answer this process's urlopen with the opener."""
    with _OPENER_LOCK:
        urllib.request.install_opener(opener)
        try:
            yield
        finally:
            urllib.request.install_opener(None)
