"""The crawl's fetch for pictures in files: the bytes of one place, within the same bounds as an answer of the web.

Only files in the folders that the config names are opened, whatever a corpus's url shards say: somebody else may have
written them.
"""

import contextlib
import hashlib
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Generic, TypeVar
from urllib.parse import unquote, urlsplit

from pipeline.intake.pictures import folder, tables, tars
from pipeline.intake.pictures.places import SCHEME, InputFolders, Place, parse_place
from pipeline.regular_files import NotRegularFileError, open_regular
from pipeline.shards.tar_samples import IMAGE
from pipeline.storage.objects.reader import RangeReader
from pipeline.storage.storage import Storage
from pipeline.web.bodies import BodyMemory
from pipeline.web.client import Fetch, Web
from schemas.config import CrawlConfig, SourceConfig
from schemas.errors import CapfiltError
from schemas.statuses import SampleError

_CHUNK = 1 << 20
# Tars and tables that stay open: the rows of a shard come in the order of the files.
_OPEN_FILES = 2

Opened = TypeVar("Opened")


class _NoPictureError(SampleError):
    """Says why a place gives no bytes."""


class FileFetcher(contextlib.AbstractContextManager["FileFetcher", None]):
    """Fetches the places of one source's pictures. Thread-safe, but for tables, whose rows come in order.

    Use as a context manager: copies of remote tars and tables are deleted at its end.
    """

    is_in_order = True

    def __init__(self, source: SourceConfig, crawl: CrawlConfig, storage: Storage) -> None:
        self._folders = InputFolders(source.input, f"source.{source.name}.input")
        self._format, self._column = source.format, source.url_column
        self._max_bytes, self._storage = crawl.max_body_bytes, storage
        self.threads = 1 if source.format == tables.FORMAT else crawl.threads
        self._tars = _OpenFiles(self._open_tar)
        self._tables = _OpenFiles(self._open_table)

    def __exit__(self, *_: object) -> None:
        self._tars.close()
        self._tables.close()

    def fetch(self, url: str, _memory: BodyMemory | None = None) -> Fetch:
        """Return the bytes of a place, or the reason why there are none."""
        return _fetch(lambda fetch: self._open(url, fetch), self._max_bytes)

    def _open(self, url: str, fetch: Fetch) -> IO[bytes]:
        try:
            place = parse_place(url)
            path = self._folders.url_of(place)
        except (ValueError, KeyError) as error:
            raise _NoPictureError(
                "forbidden_file", "not in a folder that the source's input names"
            ) from error
        fetch.final_url = _as_text(path)
        if not url.startswith(f"{self._format}:"):
            raise _NoPictureError("forbidden_file", f"the source's format is {self._format} now")
        match self._format:
            case folder.FORMAT:
                return io.BytesIO(self._storage.read(path, self._max_bytes))
            case tars.FORMAT:
                return self._open_member(path, place)
        return self._open_cell(path, place)

    def _open_member(self, path: str, place: Place) -> IO[bytes]:
        with self._tars.holding(path) as (file, members):
            if place.item not in members:
                raise _NoPictureError("missing_member", "the tar has no such sample")
            member = members[place.item]
            if member is None:
                raise _NoPictureError("missing_member", "the sample has no image")
            offset, size = member
            if size > self._max_bytes:
                raise _NoPictureError("body_too_large", f"{size:,} bytes")
            return io.BufferedReader(_Slice(os.dup(file), offset, size))

    def _open_cell(self, path: str, place: Place) -> IO[bytes]:
        with self._tables.holding(path) as images:
            data = images.read(int(place.item)) if place.item.isdecimal() else None
        if data is None:
            raise _NoPictureError("missing_member", "the row holds no image's bytes")
        return io.BytesIO(data)

    @contextlib.contextmanager
    def _open_tar(self, path: str) -> Iterator[tuple[int, dict[str, tuple[int, int] | None]]]:
        with self._storage.local_copy(path) as local, local.open("rb") as file:
            samples = tars.samples_of(local, path)
            yield file.fileno(), {key: places[IMAGE] for key, places in samples}

    @contextlib.contextmanager
    def _open_table(self, path: str) -> Iterator[tables.TableImages]:
        with self._storage.local_copy(path) as local:
            yield tables.TableImages(local, self._column, path)


class ListFetcher:
    """Fetches the entries of lists that may name files: those in ``crawl.allow_files`` are read, URLs are fetched."""

    is_in_order = False

    def __init__(self, crawl: CrawlConfig, web: Web) -> None:
        self._folders = [Path(folder).resolve() for folder in crawl.allow_files]
        self._max_bytes, self._web = crawl.max_body_bytes, web
        self.threads = crawl.threads

    def fetch(self, url: str, memory: BodyMemory | None = None) -> Fetch:
        """Return what a file holds, or what the web answers."""
        path = _path_of(url)
        if path is None:
            return self._web.fetch(url, memory)
        return _fetch(lambda fetch: self._open(path, fetch), self._max_bytes)

    def _open(self, path: str, fetch: Fetch) -> IO[bytes]:
        """Open a file in one of the folders; a relative path is tried in each. Links must stay inside."""
        inside = [
            real
            for allowed in self._folders
            if (real := (allowed / path).resolve()).is_relative_to(allowed) and real != allowed
        ]
        if not inside:
            raise _NoPictureError("forbidden_file", "not in a folder of crawl.allow_files")
        real = next((real for real in inside if real.exists()), inside[0])
        fetch.final_url = _as_text(str(real))
        return open_regular(real)


def _path_of(entry: str) -> str | None:
    """Return the path that an entry of a list is, or None where it is a URL of another scheme than file."""
    if not SCHEME.match(entry):
        return entry.strip()
    parts = urlsplit(entry.strip())
    if parts.scheme.lower() != "file" or parts.netloc not in ("", "localhost"):
        return None
    return unquote(parts.path)


def _as_text(path: str) -> str:
    """Return a path for a column of text: bytes that are not UTF-8 become escapes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _fetch(opened: Callable[[Fetch], IO[bytes]], max_bytes: int) -> Fetch:
    """Open a body, measure it, and say how that ended; nothing that a file does raises."""
    fetch = Fetch(attempts=1)
    try:
        body = fetch.body = opened(fetch)
        fetch.body_bytes, fetch.sha256 = _measured(body, max_bytes)
        fetch.end()
    except _NoPictureError as error:
        fetch.end(error.reason, error.detail)
    except NotRegularFileError as error:
        fetch.end("forbidden_file", str(error.strerror))
    except (OSError, ValueError, CapfiltError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        fetch.end("unreadable_file", text or type(error).__name__)
    if fetch.reason is not None:
        fetch.close()
    return fetch


def _measured(body: IO[bytes], max_bytes: int) -> tuple[int, str]:
    """Return a body's size and sha256, and seek back to its start; it is read again by the decoder."""
    digest, size = hashlib.sha256(), 0
    while chunk := body.read(_CHUNK):
        size += len(chunk)
        if size > max_bytes:
            raise _NoPictureError("body_too_large", f"over {max_bytes:,} bytes")
        digest.update(chunk)
    if not size:
        raise _NoPictureError("empty_body")
    body.seek(0)
    return size, digest.hexdigest()


class _Slice(RangeReader):
    """A part of an open file; owns its descriptor."""

    def __init__(self, descriptor: int, offset: int, size: int) -> None:
        super().__init__(lambda start, count: os.pread(descriptor, count, offset + start), size)
        self._descriptor = descriptor

    def close(self) -> None:
        """Close the descriptor too."""
        if not self.closed:
            os.close(self._descriptor)
        super().close()


class _OpenFiles(Generic[Opened]):
    """A few files kept open, the ones used last; each is used by one thread at a time."""

    def __init__(self, open_file: Callable[[str], contextlib.AbstractContextManager[Opened]]) -> None:
        self._open_file = open_file
        self._opened: OrderedDict[str, tuple[contextlib.ExitStack, Opened]] = OrderedDict()
        self._failed: dict[str, Exception] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def holding(self, path: str) -> Iterator[Opened]:
        """Yield an open file; others wait meanwhile. One that could not be opened is not tried again for each row."""
        with self._lock:
            if error := self._failed.get(path):
                raise error
            if path not in self._opened:
                self._opened[path] = self._open(path)
                if len(self._opened) > _OPEN_FILES:
                    self._opened.popitem(last=False)[1][0].close()
            self._opened.move_to_end(path)
            yield self._opened[path][1]

    def _open(self, path: str) -> tuple[contextlib.ExitStack, Opened]:
        stack = contextlib.ExitStack()
        try:
            return stack, stack.enter_context(self._open_file(path))
        except (OSError, CapfiltError) as error:
            self._failed[path] = error
            raise

    def close(self) -> None:
        """Close all of them."""
        with self._lock:
            while self._opened:
                self._opened.popitem()[1][0].close()
