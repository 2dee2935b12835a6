"""The images of a shard of URLs: fetched by threads, checked, decoded and resized by as many as the worker has cpus.

The fetch is the guarded one of ``pipeline.web``; the checks of image headers, the decoder and the resize are those of
``pipeline.images``.
"""

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from pipeline.images.decode import EncodedImage, ImageError, ImageHeader, check
from pipeline.images.resize import Resizer
from pipeline.prefetch import run_steps
from pipeline.web.bodies import Body, BodyMemory
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


@dataclass(slots=True)
class _Fetched:
    """A row whose URL was fetched; ``image`` where it brought one into memory."""

    number: int
    fetch: Fetch
    image: EncodedImage | None = None
    columns: dict[str, Any] = field(default_factory=dict)


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
        self._path, self._storing = folder / "images", threading.Lock()
        # Offset and size of each stored JPEG.
        self._places: dict[int, tuple[int, int]] = {}

    def download(self) -> None:
        """Fetch every URL, and store what is an image. Raises errors that no URL caused, such as a full disk."""
        with self._memory, self._path.open("wb") as file:
            fetching = self._fetch, self._fetcher.threads
            decoding = partial(self._store, file), self._decode_threads
            run_steps(self._order(), [fetching, decoding], _ROWS_A_THREAD * self._fetcher.threads)

    def _order(self) -> list[int]:
        numbers = list(range(len(self._urls)))
        if not self._fetcher.is_in_order:
            # Lists are often sorted by host: a fixed shuffle spreads the requests over hosts.
            random.Random(0).shuffle(numbers)
        return numbers

    def _fetch(self, number: int) -> "_Fetched":
        """Fetch a row's URL, and judge the header of a body in memory: only what will be decoded waits for the decoder.

        A body in a file is not read before it is decoded: those that wait would be in memory without a bound.
        """
        fetched = _Fetched(number, self._fetcher.fetch(self._urls[number], self._memory))
        fetch = fetched.fetch
        try:
            if isinstance(fetch.body, Body):
                fetched.image = self._judge(fetch.body.take(), fetched.columns)
        except ImageError as error:
            fetch.close()
            fetch.end(error.reason, error.detail)
        return fetched

    def _judge(self, data: bytes, columns: dict[str, Any]) -> EncodedImage:
        """Return an image whose header is within the limits. Raises ImageError."""
        image = EncodedImage(data)
        header = image.header
        columns.update(format=header.format, original_width=header.width, original_height=header.height)
        check(header, self._config)
        return image

    def _store(self, file: BinaryIO, fetched: "_Fetched") -> None:
        """Decode, resize and store the image of a row, where it has one, and make the row."""
        start = time.perf_counter()
        number, fetch, columns = fetched.number, fetched.fetch, fetched.columns
        jpeg = None
        try:
            if fetch.body is not None:
                image = fetched.image or self._judge(fetch.body.read(), columns)
                jpeg = self._resize(image, columns)
                fetch.end()
        except ImageError as error:
            fetch.end(error.reason, error.detail)
        finally:
            fetch.close()
        for name in _FETCH_COLUMNS:
            columns[name] = getattr(fetch, name)
        self.columns[number] = columns
        with self._storing:
            if jpeg is not None:
                self._places[number] = file.tell(), file.write(jpeg)
            self.decode_s += (time.perf_counter() - start) / self._decode_threads

    def _resize(self, image: EncodedImage, columns: dict[str, Any]) -> bytes:
        """Return an image as it is stored. Raises ImageError."""
        with self._big(image.header):
            jpeg, width, height = self._stored(image)
        columns.update(width=width, height=height, image_bytes=len(jpeg))
        return jpeg

    def _stored(self, image: EncodedImage) -> tuple[bytes, int, int]:
        """Decode, resize and encode; return the JPEG, its width and its height. Raises ImageError."""
        header, config = image.header, self._config
        scale = 1
        if config.jpeg_scaling:
            scale = image.jpeg_scale(self._resizer.spare_scale(header.width, header.height))
        pixels = image.srgb(config.max_pixels, scale)
        return self._resizer(pixels, (header.width / scale, header.height / scale) if scale > 1 else None)

    def _big(self, header: ImageHeader) -> contextlib.AbstractContextManager[object]:
        is_big = header.width * header.height > self._config.max_pixels * _BIG
        return self._one_big_image if is_big else contextlib.nullcontext()

    @contextlib.contextmanager
    def stored(self) -> Iterator[Callable[[int], bytes]]:
        """Open the stored images for the block: yield a function that returns the image of a row."""
        with self._path.open("rb") as file:

            def read(number: int) -> bytes:
                offset, size = self._places[number]
                return os.pread(file.fileno(), size, offset)

            yield read
