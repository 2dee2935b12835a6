"""Whole files in one bucket or container: an object is there whole or not at all."""

import contextlib
import io
import re
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO

import obstore

from pipeline.storage.errors import ObjectStorageError
from pipeline.storage.file_info import FileInfo
from pipeline.storage.objects.reader import RangeReader
from pipeline.storage.objects.stores import ObjectStore, explained, open_store, refused

_PART_BYTES, _PARTS_AT_ONCE = 16 << 20, 4
_COPY_BYTES, _BUFFER_BYTES = 1 << 20, 4 << 20
# Seconds between the tries of a create that another writer was in the way of.
_CREATE_WAITS_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
# The object ends before the range, or is empty: the server says so, or the client where the server does not.
_BEYOND_END = re.compile("status code: 416|Wanted range starting at")
# Of Azure the account's host may follow.
_CONTAINER = re.compile(r"[\w$][\w.$-]*(@[\w.-]+)?", re.ASCII)


class ObjectFiles:
    """The objects of one bucket by their keys.

    Raises ObjectStorageError where the storage refuses or does not answer, FileNotFoundError where an object is absent.
    """

    is_local = False
    takes_commits = True

    def __init__(self, scheme: str, container: str, store: ObjectStore | None = None) -> None:
        """Open a bucket at its first request, or take a store that is open. Raises ValueError for no bucket's name."""
        if not _CONTAINER.fullmatch(container):
            raise ValueError(f"{container!r} is not the name of a bucket")
        self.scheme, self.container, self._given = scheme, container, store

    @property
    def _store(self) -> ObjectStore:
        return self._given or open_store(self.scheme, self.container)

    def url(self, key: str) -> str:
        """Return the URL of a key."""
        return f"{self.scheme}://{self.container}/{key}"

    def exists(self, key: str) -> bool:
        """Tell whether an object has this key: one request."""
        try:
            return bool(key) and self.info(key) is not None
        except FileNotFoundError:
            return False

    def is_folder(self, key: str) -> bool:
        """Tell whether there are objects below a key; a bucket counts as one, be it empty."""
        with explained(self.url(key)):
            return not key or next(iter(self._store.list(key, chunk_size=1)), None) is not None

    def info(self, key: str) -> FileInfo:
        """Return size and version of one object: one request."""
        with explained(self.url(key)):
            return _info(self._store.head(key))

    def find(self, key: str) -> list[FileInfo]:
        """Return all objects below a key: a request for every thousand."""
        with explained(self.url(key)):
            listed = [
                _info(meta) for chunk in self._store.list(key or None, chunk_size=1000) for meta in chunk
            ]
        return _without_folder_markers(listed, key)

    def list_folder(self, key: str) -> tuple[list[str], list[FileInfo]]:
        """Return the keys of the folders and the objects right below a key."""
        with explained(self.url(key)):
            listed = self._store.list_with_delimiter(key or None)
        objects = [_info(meta) for meta in listed["objects"]]
        return list(listed["common_prefixes"]), _without_folder_markers(objects, key)

    def read(self, key: str, max_bytes: int | None = None) -> bytes:
        """Return an object whole, or its first ``max_bytes`` and one: one request."""
        if max_bytes is not None:
            return self.read_range(key, 0, max_bytes + 1)
        with explained(self.url(key)):
            return self._store.get(key).bytes().to_bytes()

    def read_range(self, key: str, start: int, size: int) -> bytes:
        """Return ``size`` bytes from ``start`` on, fewer where the object ends: one request."""
        if size <= 0:
            return b""
        options: Any = {"range": (start, start + size)}
        with explained(self.url(key)):
            try:
                return self._store.get(key, options=options).bytes().to_bytes()
            except obstore.exceptions.BaseError as error:
                if _BEYOND_END.search(str(error)):
                    return b""
                raise

    def open(self, key: str) -> BinaryIO:
        """Open an object for reading, buffered ahead."""
        reader = RangeReader(partial(self.read_range, key), self.info(key).bytes)
        return io.BufferedReader(reader, _BUFFER_BYTES)

    def fetch(self, key: str, target: Path) -> None:
        """Copy an object to local disk: one request."""
        with explained(self.url(key)), target.open("wb") as file:
            for chunk in self._store.get(key).stream(min_chunk_size=_COPY_BYTES):
                file.write(chunk)

    def put(self, local: Path, key: str) -> None:
        """Upload a finished file; in parts where it is large. A failed upload leaves no object."""
        with local.open("rb") as file:
            self._put(key, file, use_multipart=local.stat().st_size > _PART_BYTES)

    def write(self, key: str, data: bytes) -> None:
        """Upload bytes: one request."""
        self._put(key, data, use_multipart=False)

    def create(self, key: str, data: bytes) -> bool:
        """Upload bytes unless the key is taken, in one conditional request."""
        for _ in _tries(self.url(key)):
            try:
                self._put(key, data, mode="create", use_multipart=False)
                return True
            except FileExistsError:
                # No object yet: S3 answers so (409) while another create is under way, which may still fail.
                with contextlib.suppress(FileNotFoundError):
                    return self.read(key) == data
        raise AssertionError

    def swap(self, key: str, old: bytes, new: bytes) -> bool:
        """Replace an object if it has just these bytes: one request to read it, and a conditional one."""
        for _ in _tries(self.url(key)):
            try:
                with explained(self.url(key)):
                    read = self._store.get(key)
                    data, meta = read.bytes().to_bytes(), read.meta
            except FileNotFoundError:
                return False
            if data != old:
                # A put whose answer was lost is sent again, and refused by what it made itself.
                return data == new
            how = {name: meta[name] for name in ("e_tag", "version") if meta[name] is not None}
            with contextlib.suppress(FileExistsError):
                self._put(key, new, mode=how, use_multipart=False)
                return True
        raise AssertionError

    def _put(self, key: str, content: bytes | IO[bytes], **how: Any) -> None:
        with explained(self.url(key)):
            try:
                self._store.put(key, content, chunk_size=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE, **how)
            except (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError) as error:
                raise FileExistsError(17, "exists", self.url(key)) from error
            except FileNotFoundError as error:
                # There is no bucket, or an upload in parts is gone: no file is missing.
                raise refused(self.url(key), error) from error

    def delete(self, key: str) -> None:
        """Remove an object; absent is fine."""
        # S3 says nothing of an absent object, the others do.
        with contextlib.suppress(FileNotFoundError), explained(self.url(key)):
            self._store.delete(key)


def _tries(url: str) -> Iterator[None]:
    """Yield for each try to create or replace an object, with pauses. Raises ObjectStorageError behind the last."""
    yield
    for wait_s in _CREATE_WAITS_S:
        time.sleep(wait_s)
        yield
    raise ObjectStorageError(
        f"{url} cannot be written: other writers were in the way at every try; run the command again"
    )


def split_name(name: str) -> tuple[str, str]:
    """Split ``bucket/key``. Raises ValueError for a key that begins with a slash: the client would leave it out."""
    container, _, key = name.partition("/")
    if key.startswith("/"):
        raise ValueError("there are two slashes after the bucket's name")
    return container, key


def _without_folder_markers(listed: list[FileInfo], key: str) -> list[FileInfo]:
    """Leave out the empty objects called ``folder/`` by which consoles make folders: the client drops their slash."""
    if all(info.bytes for info in listed):
        return listed
    folders = {key.rstrip("/")}
    for info in listed:
        folder = info.path.rpartition("/")[0]
        while folder and folder not in folders:
            folders.add(folder)
            folder = folder.rpartition("/")[0]
    return [info for info in listed if info.bytes or info.path not in folders]


def _info(meta: Any) -> FileInfo:
    version = meta["e_tag"] or str(meta["last_modified"].timestamp())
    return FileInfo(
        path=meta["path"], bytes=meta["size"], version=version.strip('"'), modified=meta["last_modified"]
    )
