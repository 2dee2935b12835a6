"""Files of a corpus on local disk, S3 or GCS: whole-object writes, create-if-absent, listing.

Never hands out a writable remote file: an exception inside ``with fs.open(path, "wb")`` publishes the truncated
object, on S3 and on local disk alike. A file is made locally, checked, and put in one call.
"""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.regular_files import open_regular, require_regular
from pipeline.storage.scratch import temporary_folder
from schemas.errors import CapfiltError

Item = TypeVar("Item")
Result = TypeVar("Result")

_READERS, _LOCAL_FILES_A_THREAD = 32, 64
# Where a put can be made conditional on absence.
_PROTOCOLS = {"s3", "s3a", "gs", "gcs"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """One listed file. ``version`` changes when the content does (ETag, or mtime on local disk)."""

    path: str
    bytes: int
    version: str
    modified: datetime


class Storage:
    """A folder or a bucket prefix, and everything that may be done to the files under it.

    Paths are relative to the root, with ``/``; a path with ``://`` or a leading ``/`` is taken as it is, so that
    imported files outside the corpus are read by the same calls. Instances pickle.
    """

    def __init__(self, root: str) -> None:
        try:
            self.fs, path = fsspec.core.url_to_fs(root)
        except (ValueError, ImportError) as error:
            raise CapfiltError(
                f"{root!r} cannot be opened: {error}; name a folder, s3:// or gs://"
            ) from error
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.base = str(Path(path).absolute()) if self.is_local else path.rstrip("/")
        self.root = self.base if self.is_local else self.fs.unstrip_protocol(self.base)

    @property
    def takes_commits(self) -> bool:
        """Whether ``create`` is known to let exactly one writer win here. Anything that lists can be read."""
        return self.is_local or bool(_PROTOCOLS & set(_protocols(self.fs)))

    def is_corpus(self) -> bool:
        """Tell whether the root is a corpus: it has records."""
        return self.fs.exists(f"{self.base}/records")

    def require_conditional_puts(self) -> None:
        """Raise CapfiltError unless this storage takes commits."""
        if not self.takes_commits:
            raise CapfiltError(
                f"corpus.path {self.root!r}: commits need create-if-absent, which is known to hold on local disk, S3 "
                "and GCS alone; use a folder, s3:// or gs://"
            )

    def require_place(self, key: str) -> None:
        """Raise CapfiltError where the root cannot be a folder: it, or a folder above it, is a file or a dangling link.

        A missing folder is accepted if it can be created. Changes nothing.
        """
        if not self.is_local:
            if self.fs.isfile(self.base) and not self.fs.isdir(self.base):
                raise CapfiltError(f"{key} {self.root!r} is an object; name a prefix")
            return
        root = Path(self.base)
        place = next(path for path in (root, *root.parents) if path.is_symlink() or path.exists())
        above = "" if place == root else f": {place} above it"
        if not place.exists():
            raise CapfiltError(
                f"{key} {self.root!r}{above} is a link to {place.readlink()}, which is not there; make that folder, or "
                "name another one"
            )
        if not place.is_dir():
            raise CapfiltError(
                f"{key} {self.root!r}{above} is a file; name a folder, or one that can be made"
            )
        if place != root and not os.access(place, os.W_OK | os.X_OK):
            raise CapfiltError(
                f"{key} {self.root!r} is not there, and nothing can be made in {place}: permission denied; name a "
                "folder that may be written"
            )

    def __reduce__(self) -> tuple[type["Storage"], tuple[str]]:
        return Storage, (self.root,)

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"

    def url(self, path: str) -> str:
        """Return the absolute path or URL of ``path``: what DuckDB and fsspec open."""
        return path if _is_absolute(path) else f"{self.root}/{path}"

    def _full(self, path: str) -> str:
        if _is_absolute(path):
            return self.fs._strip_protocol(path)
        return f"{self.base}/{path}"

    def _fs_of(self, path: str) -> tuple[fsspec.AbstractFileSystem, str]:
        """Return the filesystem of a path that may lie outside the corpus."""
        if _is_absolute(path):
            return fsspec.core.url_to_fs(path)
        return self.fs, self._full(path)

    def map(self, read: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Return ``read`` of every item, in their order; several at once, since object storage answers late.

        On local disk a thread is started for every ``_LOCAL_FILES_A_THREAD`` items: for fewer small files,
        starting threads costs more than reading.
        """
        threads = min(_READERS, len(items) // (_LOCAL_FILES_A_THREAD if self.is_local else 1))
        if threads <= 1:
            return [read(item) for item in items]
        with ThreadPoolExecutor(threads) as readers:
            return list(readers.map(read, items))

    # -- reading ---------------------------------------------------------------------------------------------

    def exists(self, path: str) -> bool:
        """Tell whether the file is there."""
        fs, full = self._fs_of(path)
        return fs.exists(full)

    def read(self, path: str, max_bytes: int | None = None) -> bytes:
        """Return the whole file.

        Args:
            max_bytes: of a larger local file only this and one byte more are read, whatever size it is listed with.

        Raises FileNotFoundError, and NotRegularFileError on local disk.
        """
        fs, full = self._fs_of(path)
        if not isinstance(fs, LocalFileSystem):
            return fs.cat_file(full)
        with open_regular(full) as file:
            return file.read() if max_bytes is None else file.read(max_bytes + 1)

    def open(self, path: str) -> BinaryIO:
        """Open for reading, buffered ahead on remote storage. Raises as ``read`` does."""
        fs, full = self._fs_of(path)
        return open_regular(full) if isinstance(fs, LocalFileSystem) else fs.open(full, "rb")

    def read_range(self, path: str, start: int, size: int) -> bytes:
        """Return ``size`` bytes from byte ``start`` on, fewer where the file ends; one request on remote storage."""
        fs, full = self._fs_of(path)
        if not isinstance(fs, LocalFileSystem):
            return fs.cat_file(full, start=start, end=start + size)
        with open_regular(full) as file:
            file.seek(start)
            return file.read(size)

    @contextlib.contextmanager
    def local_copy(self, path: str) -> Iterator[Path]:
        """Yield a local path with the file's content: the file itself on local disk, else a temporary copy."""
        fs, full = self._fs_of(path)
        if isinstance(fs, LocalFileSystem):
            require_regular(full)
            if not Path(full).is_file():
                raise FileNotFoundError(full)
            yield Path(full)
            return
        with temporary_folder() as folder:
            target = folder / Path(full).name
            fs.get_file(full, str(target))
            yield target

    def list(self, prefix: str) -> list[FileInfo]:
        """Return every file under a folder, sorted by path; an absent folder is empty."""
        self.fs.invalidate_cache()
        try:
            # By default a local listing leaves out what it cannot read: then live files would look like orphans.
            strict = {"on_error": _raise_unless_vanished} if self.is_local else {}
            listed = self.fs.find(self._full(prefix), detail=True, **strict)
        except FileNotFoundError:
            return []
        return sorted((self._info(full, info) for full, info in listed.items()), key=lambda info: info.path)

    def info(self, path: str) -> FileInfo:
        """Return size and version of one file, inside the corpus or outside. Raises FileNotFoundError."""
        fs, full = self._fs_of(path)
        return self._info(full, fs.info(full), path)

    def _info(self, full: str, info: dict, path: str | None = None) -> FileInfo:
        modified = info.get("LastModified") or info.get("mtime") or info.get("updated") or 0
        if isinstance(modified, str):
            modified = datetime.fromisoformat(modified)
        if not isinstance(modified, datetime):
            modified = datetime.fromtimestamp(modified, UTC)
        version = str(info.get("ETag") or info.get("etag") or info.get("mtime") or modified.timestamp())
        relative = path if path is not None else full.removeprefix(self.base).lstrip("/")
        return FileInfo(path=relative, bytes=info["size"], version=version.strip('"'), modified=modified)

    # -- writing ---------------------------------------------------------------------------------------------

    def put(self, local: Path, path: str) -> None:
        """Publish a finished local file under ``path`` in one step; an existing file is replaced whole."""
        if self.is_local:
            target = Path(self._full(path))
            with _beside(target, partial(shutil.copyfile, local)) as temporary:
                temporary.replace(target)
        else:
            self.fs.put_file(str(local), self._full(path))

    def write(self, path: str, data: bytes) -> None:
        """Publish bytes under ``path`` in one step; an existing file is replaced whole."""
        if self.is_local:
            target = Path(self._full(path))
            with _beside(target, lambda temporary: temporary.write_bytes(data)) as temporary:
                temporary.replace(target)
        else:
            self.fs.pipe_file(self._full(path), data)

    def create(self, path: str, data: bytes) -> bool:
        """Publish bytes only if ``path`` does not exist; of many writers exactly one gets True.

        The file is never visible half-written: on local disk a finished temporary file is hard-linked to its
        name, on S3 and GCS the put is conditional. A client that repeats a put whose answer was lost is refused
        by its own first try; hence a file with these very bytes counts as written by this call. Two writers that must
        not both win write different bytes (a record holds the id of its commit).
        """
        if not self.is_local:
            try:
                self.fs.pipe_file(self._full(path), data, mode="create")
            except FileExistsError:
                return self.fs.cat_file(self._full(path)) == data
            return True
        target = Path(self._full(path))
        with _beside(target, lambda temporary: temporary.write_bytes(data)) as temporary:
            try:
                target.hardlink_to(temporary)
            except FileExistsError:
                return self.read(path, len(data)) == data
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
                    raise
                return _create_exclusively(target, data)
        return True

    def delete(self, path: str) -> None:
        """Remove a file of the corpus; absent is fine."""
        if _is_absolute(path):
            raise ValueError(f"{path} lies outside the corpus and is not deleted")
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._full(path))


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _raise_unless_vanished(error: Exception) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _is_absolute(path: str) -> bool:
    return "://" in path or path.startswith("/")


@contextlib.contextmanager
def _beside(target: Path, write: Callable[[Path], object]) -> Iterator[Path]:
    """Yield a temporary file, written and synced, in the target's folder: renaming within a filesystem is atomic."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError) as error:
        # Still an OSError: a caller that can do without this file catches it.
        raise NotADirectoryError(errno.ENOTDIR, "No folder can be made there", str(target.parent)) from error
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _create_exclusively(target: Path, data: bytes) -> bool:
    """Create where the filesystem has no hard links: exclusive, though not torn-proof against power loss."""
    try:
        with target.open("xb") as file:
            file.write(data)
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True
