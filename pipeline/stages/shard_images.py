"""The images of a shard of URLs: fetched by threads, checked, decoded and resized one at a time.

The fetch is the guarded one of ``pipeline.web``, the checks of image headers and the decoder are those of
``pipeline.images``; the resize, and so every stored byte, is img2dataset's.
"""

import importlib
import io
import os
import random
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from pipeline.images.decode import FORMATS, ImageError, check, decode_srgb, encode_bmp, read_header
from pipeline.web.client import Fetch
from schemas.config import CrawlConfig

_FETCH_COLUMNS = ("status", "reason", "detail", "http_status", "attempts", "final_url", "content_type",
                  "body_bytes", "sha256", "seconds")  # fmt: skip
# Bodies that wait for the decoder, and fetches under way, for each thread.
_FETCHES_A_THREAD = 2


class Fetcher(Protocol):
    """What brings the bytes of a URL: the web, or the files of a source."""

    is_in_order: bool
    threads: int

    def fetch(self, url: str, spool: Path | None = None) -> Fetch:
        """Return how a URL ended, with its body if it was ok; ``spool`` is the folder for big bodies."""
        ...


class ShardImages:
    """The images of a shard by row number: the number of its URL in the list.

    Args:
        folder: local, for big bodies that wait and for the stored images; its owner removes it.
        resizer: of ``make_resizer``.
    """

    def __init__(
        self, urls: Sequence[str], folder: Path, fetcher: Fetcher, resizer: Any, config: CrawlConfig
    ) -> None:
        self.decode_s = 0.0
        self._urls, self._folder, self._fetcher = urls, folder, fetcher
        self._resizer, self._config = resizer, config
        # The columns of SAMPLES that the crawl adds to each row.
        self.columns: dict[int, dict[str, Any]] = {}
        self._stored = folder / "images"
        # Offset and size of each stored JPEG.
        self._places: dict[int, tuple[int, int]] = {}

    def download(self) -> None:
        """Fetch every URL, and store what is an image. Raises errors that no URL caused, such as a full disk."""
        # From one thread, so that a worker holds the pixels of one image at most.
        with self._stored.open("wb") as file, closing(self._fetched()) as fetched:
            for number, fetch in fetched:
                start = time.perf_counter()
                columns: dict[str, Any] = {}
                try:
                    if fetch.reason is None:
                        jpeg = self._resize(fetch, columns)
                        self._places[number] = (file.tell(), file.write(jpeg))
                        fetch.end()
                except ImageError as error:
                    fetch.end(error.reason, error.detail)
                finally:
                    fetch.close()
                    self.decode_s += time.perf_counter() - start
                self.columns[number] = {name: getattr(fetch, name) for name in _FETCH_COLUMNS} | columns

    def _fetched(self) -> Generator[tuple[int, Fetch]]:
        """Yield each row's number and its fetch, in the order in which they end.

        The threads are daemons and are not waited for: an interrupted crawl leaves fetches behind that take up to
        ``timeout_s`` to end.
        """
        waiting: SimpleQueue[int | None] = SimpleQueue()
        ended: SimpleQueue[tuple[int, Fetch | BaseException]] = SimpleQueue()
        is_over = threading.Event()

        def work() -> None:
            while (number := waiting.get()) is not None and not is_over.is_set():
                try:
                    ended.put((number, self._fetcher.fetch(self._urls[number], self._folder)))
                except BaseException as error:
                    ended.put((number, error))

        numbers = list(range(len(self._urls)))
        if not self._fetcher.is_in_order:
            # Lists are often sorted by host: a fixed shuffle spreads the requests over hosts.
            random.Random(0).shuffle(numbers)
        rows = iter(numbers)
        for number in islice(rows, _FETCHES_A_THREAD * self._fetcher.threads):
            waiting.put(number)
        for _ in range(self._fetcher.threads):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in numbers:
                number, fetch = ended.get()
                if isinstance(fetch, BaseException):
                    raise fetch
                yield number, fetch
                for following in islice(rows, 1):
                    waiting.put(following)
        finally:
            is_over.set()
            for _ in range(self._fetcher.threads):
                waiting.put(None)

    def _resize(self, fetch: Fetch, columns: dict[str, Any]) -> bytes:
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
        jpeg, width, height, *_, error = self._resizer(io.BytesIO(bmp))
        if error is not None:
            raise ImageError("image_truncated", error)
        columns.update(width=width, height=height, image_bytes=len(jpeg))
        return jpeg

    def jpeg(self, number: int) -> bytes:
        """Return the stored image of a row."""
        offset, size = self._places[number]
        with self._stored.open("rb") as file:
            file.seek(offset)
            return file.read(size)


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
