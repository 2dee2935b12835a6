"""The images of a shard of URLs: fetched by threads, checked, decoded and resized by as many as the worker has cpus.

The fetch is the guarded one of ``pipeline.web``; the checks of image headers, the decoder and the resize are those of
``pipeline.images``.
"""

import contextlib
import random
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.images.decode import FORMATS, ImageError, ImageHeader, check, decode_srgb, read_header
from pipeline.images.resize import Resizer
from pipeline.prefetch import pipelined
from pipeline.web.bodies import BodyMemory
from pipeline.web.client import Fetch
from schemas.config import CrawlConfig

_FETCH_COLUMNS = ("status", "reason", "detail", "http_status", "attempts", "final_url", "content_type",
                  "body_bytes", "sha256", "seconds")  # fmt: skip
# Rows under way (fetched, decoded, or waiting between the two) for each thread that fetches.
_ROWS_A_THREAD = 2
# Images over this part of ``max_pixels`` are decoded one at a time, so that memory hardly grows with the threads.
_BIG = 1 / 8


class Fetcher(Protocol):
    """What brings the bytes of a URL: the web, or the files of a source."""

    is_in_order: bool
    threads: int

    def fetch(self, url: str, memory: BodyMemory) -> Fetch:
        """Return how a URL ended, with its body if it was ok; a body in memory is part of ``memory``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ended:
    """How a row ended: the columns of SAMPLES that the crawl adds, and the image to store."""

    number: int
    columns: dict[str, Any]
    jpeg: bytes | None
    decode_s: float


class ShardImages:
    """The images of a shard by row number: the number of its URL in the list.

    Args:
        folder: local, for the stored images; its owner removes it.
        decode_threads: how many images are decoded and resized at a time.
    """

    def __init__(
        self,
        urls: Sequence[str],
        folder: Path,
        fetcher: Fetcher,
        resizer: Resizer,
        config: CrawlConfig,
        decode_threads: int,
    ) -> None:
        self.decode_s = 0.0
        self._urls, self._fetcher = urls, fetcher
        self._resizer, self._config, self._decode_threads = resizer, config, decode_threads
        self._memory, self._one_big_image = BodyMemory(), threading.Lock()
        # The columns of SAMPLES that the crawl adds to each row.
        self.columns: dict[int, dict[str, Any]] = {}
        self._stored = folder / "images"
        # Offset and size of each stored JPEG.
        self._places: dict[int, tuple[int, int]] = {}

    def download(self) -> None:
        """Fetch every URL, and store what is an image. Raises errors that no URL caused, such as a full disk."""
        fetching, decoding = (self._fetch, self._fetcher.threads), (self._judge, self._decode_threads)
        rows = pipelined(self._order(), [fetching, decoding], _ROWS_A_THREAD * self._fetcher.threads)
        with self._memory, self._stored.open("wb") as file, closing(rows):
            for row in rows:
                self.columns[row.number] = row.columns
                if row.jpeg is not None:
                    self._places[row.number] = (file.tell(), file.write(row.jpeg))
                self.decode_s += row.decode_s / self._decode_threads

    def _order(self) -> list[int]:
        numbers = list(range(len(self._urls)))
        if not self._fetcher.is_in_order:
            # Lists are often sorted by host: a fixed shuffle spreads the requests over hosts.
            random.Random(0).shuffle(numbers)
        return numbers

    def _fetch(self, number: int) -> tuple[int, Fetch]:
        return number, self._fetcher.fetch(self._urls[number], self._memory)

    def _judge(self, numbered: tuple[int, Fetch]) -> _Ended:
        """Make the row of a fetch that ended, and the image to store where it brought one."""
        number, fetch = numbered
        start = time.perf_counter()
        columns: dict[str, Any] = {}
        jpeg = None
        try:
            if fetch.reason is None:
                jpeg = self._resize(fetch, columns)
                fetch.end()
        except ImageError as error:
            fetch.end(error.reason, error.detail)
        finally:
            fetch.close()
        columns |= {name: getattr(fetch, name) for name in _FETCH_COLUMNS}
        return _Ended(number=number, columns=columns, jpeg=jpeg, decode_s=time.perf_counter() - start)

    def _resize(self, fetch: Fetch, columns: dict[str, Any]) -> bytes:
        """Check a fetched body's header, decode it, and resize it. Raises ImageError."""
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
        with self._big(header):
            image = decode_srgb(data, formats=FORMATS, max_pixels=config.max_pixels)
            jpeg, width, height = self._resizer(image)
        columns.update(width=width, height=height, image_bytes=len(jpeg))
        return jpeg

    def _big(self, header: ImageHeader) -> contextlib.AbstractContextManager[object]:
        is_big = header.width * header.height > self._config.max_pixels * _BIG
        return self._one_big_image if is_big else contextlib.nullcontext()

    def jpeg(self, number: int) -> bytes:
        """Return the stored image of a row."""
        offset, size = self._places[number]
        with self._stored.open("rb") as file:
            file.seek(offset)
            return file.read(size)
