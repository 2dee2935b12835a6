"""img2dataset's Downloader over one shard, with capfilt's own fetch and decoder in its place.

img2dataset's Downloader, Resizer and WebDatasetSampleWriter do the work; around them stand the guarded fetch
(``pipeline.web``) and the checks of image headers (``pipeline.images``). The Downloader is given row numbers instead
of URLs: the opener that answers its ``urlopen`` fetches the row's URL, and the decoder it calls takes that fetch's
body. So every outcome keeps its row, and big bodies wait on disk instead of in the Downloader's queue.
"""

import atexit
import contextlib
import importlib
import io
import multiprocessing.util
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

from pipeline.images.decode import FORMATS, ImageError, check, decode_srgb, encode_bmp, read_header
from pipeline.web.client import Fetch, Web
from schemas.config import CrawlConfig

_FETCH_COLUMNS = ("status", "reason", "detail", "http_status", "attempts", "final_url", "content_type",
                  "body_bytes", "sha256", "seconds")  # fmt: skip
_SCHEME = "row:"
# One shard at a time in a process: urllib has one opener.
_OPENER_LOCK = threading.Lock()


class ShardImages:
    """The images of a shard, fetched, checked and decoded for img2dataset, which addresses them by row number."""

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

        Lists are often sorted by host: a fixed shuffle spreads the requests over hosts.
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
        """Check a fetched body's header, decode it, and resize it with img2dataset's Resizer. Raises ImageError."""
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
        # Decoded here, not by the Resizer: its OpenCV fills missing parts of a damaged file with grey.
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

        Raises RuntimeError unless tar, Parquet and fetches agree on every row: where writing a sample fails,
        img2dataset continues without the row, and its statistics do not show it.
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
        # Not the call operator: it catches and hides exceptions.
        _call_in_thread(lambda: downloader.download_shard((0, str(path))))


def _call_in_thread(call: Callable[[], object]) -> None:
    """Call something in another thread and wait for it; KeyboardInterrupt is raised here and abandons the call.

    img2dataset's thread pool waits forever for its own source of rows where KeyboardInterrupt is raised in its loop.
    Abandoned, it ends soon: without our opener every further row fails at once. Where the interpreter ends sooner,
    multiprocessing must not close the pool, which would wait in the same way; its threads are daemons.
    """
    done: Future[object] = Future()

    def complete() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=complete, daemon=True).start()
    try:
        done.result()
    except KeyboardInterrupt:
        atexit.unregister(multiprocessing.util._exit_function)  # type: ignore[attr-defined]
        raise


def make_resizer(config: CrawlConfig) -> Any:
    """Return img2dataset's Resizer with the config's settings; image headers are checked before it is called."""
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
    """Import img2dataset without the side effects of its dependencies.

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
