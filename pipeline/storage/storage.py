"""Files of a corpus on local disk, S3, GCS or Azure: whole-object writes, create-if-absent, listing.

Never hands out a writable remote file: an exception inside ``with fs.open(path, "wb")`` publishes the truncated
object, on S3 and on local disk alike. A file is made locally, checked, and put in one call.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO, ParamSpec, TypeVar

from pipeline.regular_files import require_regular
from pipeline.storage.call_counts import CALLS
from pipeline.storage.file_info import FileInfo
from pipeline.storage.filesystem import filesystem_of, is_local
from pipeline.storage.local_files import LocalFiles
from pipeline.storage.objects.files import ObjectFiles, split_name
from pipeline.storage.objects.stores import SCHEMES
from pipeline.storage.other_files import OtherFiles
from pipeline.storage.patience import NO_PATIENCE, Patience
from pipeline.storage.scratch import temporary_folder
from schemas.errors import CapfiltError

Item = TypeVar("Item")
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")
Files = LocalFiles | ObjectFiles | OtherFiles

_READERS, _LOCAL_FILES_A_THREAD = 32, 64


class Storage:
    """A folder or a bucket prefix, and everything that may be done to the files under it.

    Paths are relative to the root, with ``/``; a path with ``://`` or a leading ``/`` is taken as it is, so that
    imported files outside the corpus are read by the same calls. Instances pickle, without their patience.

    Args:
        patience: what waits while the storage is away. Every call of a storage may be repeated.
    """

    def __init__(self, root: str, patience: Patience = NO_PATIENCE) -> None:
        self._patience = patience
        try:
            self._files, base = files_of(root)
        except (ValueError, ImportError) as error:
            raise CapfiltError(
                f"{root!r} cannot be opened: {error}; name a folder, s3://, gs:// or az://"
            ) from error
        self.is_local = self._files.is_local
        self._base = base.rstrip("/")
        self.root = self._files.url(self._base).rstrip("/") or "/"

    @property
    def name(self) -> str:
        """The root's last part."""
        return self.root.rpartition("/")[2]

    @property
    def takes_commits(self) -> bool:
        """Whether ``create`` is known to let exactly one writer win here. Anything that lists can be read."""
        return self._files.takes_commits

    def is_corpus(self) -> bool:
        """Tell whether the root is a corpus: it has records."""
        return self._files.is_folder(self._full("records"))

    def is_there(self) -> bool:
        """Tell whether the root is there at all."""
        return self._files.exists(self._base) or self._files.is_folder(self._base)

    def enclosing_corpus(self) -> "Storage | None":
        """Return the corpus that the root is, or lies in at any depth; None where there is none."""
        if self.is_corpus():
            return self
        folder = self.root.rpartition("/")[0]
        while folder and not folder.endswith("/"):  # up to the disk's root, or a bucket
            storage = Storage(folder)
            # Other folders may be called records, too.
            if storage._files.is_folder(storage._full("records/intake")):
                return storage
            folder = folder.rpartition("/")[0]
        return None

    def require_conditional_puts(self) -> None:
        """Raise CapfiltError unless this storage takes commits."""
        if not self.takes_commits:
            raise CapfiltError(
                f"corpus.path {self.root!r}: commits need create-if-absent, which is known to hold on local disk, S3, "
                "GCS and Azure alone; use a folder, s3://, gs:// or az://"
            )

    def require_place(self, key: str) -> None:
        """Raise CapfiltError where the root cannot be a folder: it, or a folder above it, is a file or a dangling link.

        A missing folder is accepted if it can be created. Changes nothing.
        """
        if not isinstance(self._files, LocalFiles):
            if self._files.exists(self._base) and not self._files.is_folder(self._base):
                raise CapfiltError(f"{key} {self.root!r} is an object; name a prefix")
            return
        root = Path(self.root)
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
        """Return the absolute path or URL of ``path``: what DuckDB opens."""
        return path if _is_absolute(path) else f"{self.root.rstrip('/')}/{path}"

    def _full(self, path: str) -> str:
        return f"{self._base}/{path}" if self._base or self.is_local else path

    def _place(self, path: str) -> tuple[Files, str]:
        """Return where a path lies, which may be outside the corpus, and its name there."""
        return files_of(path) if _is_absolute(path) else (self._files, self._full(path))

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

    def _call(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        CALLS.add(function.__name__)
        return self._patience.call(partial(function, *args, **kwargs))

    def _write(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        CALLS.add(function.__name__)
        return self._patience.call(partial(function, *args, **kwargs), is_writing=True)

    # -- reading ---------------------------------------------------------------------------------------------

    def exists(self, path: str) -> bool:
        """Tell whether the file is there."""
        files, name = self._place(path)
        return self._call(files.exists, name)

    def read(self, path: str, max_bytes: int | None = None) -> bytes:
        """Return the whole file.

        Args:
            max_bytes: of a larger file only this and one byte more are read, whatever size it is listed with.

        Raises FileNotFoundError, and NotRegularFileError on local disk.
        """
        files, name = self._place(path)
        return self._call(files.read, name, max_bytes)

    def open(self, path: str) -> BinaryIO:
        """Open for reading, buffered ahead on remote storage. Raises as ``read`` does."""
        files, name = self._place(path)
        return self._call(files.open, name)

    def read_range(self, path: str, start: int, size: int) -> bytes:
        """Return ``size`` bytes from byte ``start`` on, fewer where the file ends; one request on remote storage."""
        files, name = self._place(path)
        return self._call(files.read_range, name, start, size)

    @contextlib.contextmanager
    def local_copy(self, path: str) -> Iterator[Path]:
        """Yield a local path with the file's content: the file itself on local disk, else a temporary copy."""
        files, name = self._place(path)
        if isinstance(files, LocalFiles):
            require_regular(name)
            if not Path(name).is_file():
                raise FileNotFoundError(name)
            yield Path(name)
            return
        with temporary_folder() as folder:
            target = folder / Path(name).name
            self._call(files.fetch, name, target)
            yield target

    def list(self, prefix: str) -> list[FileInfo]:
        """Return every file under a folder, sorted by path; an absent folder is empty."""
        try:
            listed = self._call(self._files.find, self._full(prefix))
        except FileNotFoundError:
            return []
        start = len(self._base) + 1 if self._base or self.is_local else 0
        infos = [FileInfo(path[start:], size, version, modified) for path, size, version, modified in listed]
        return sorted(infos, key=itemgetter(0))

    def info(self, path: str) -> FileInfo:
        """Return size and version of one file, inside the corpus or outside. Raises FileNotFoundError."""
        files, name = self._place(path)
        return self._call(files.info, name)._replace(path=path)

    # -- writing ---------------------------------------------------------------------------------------------

    def put(self, local: Path, path: str) -> None:
        """Publish a finished local file under ``path`` in one step; an existing file is replaced whole."""
        self._write(self._files.put, local, self._own(path))

    def share(self, local: Path, path: str) -> None:
        """Publish, as ``put`` does, a file that nobody changes: on local disk as a hard link where it can be one."""
        if isinstance(self._files, LocalFiles):
            self._write(self._files.share, local, self._own(path))
        else:
            self.put(local, path)

    def write(self, path: str, data: bytes) -> None:
        """Publish bytes under ``path`` in one step; an existing file is replaced whole."""
        self._write(self._files.write, self._own(path), data)

    def create(self, path: str, data: bytes) -> bool:
        """Publish bytes only if ``path`` does not exist; of many writers exactly one gets True.

        The file is never visible half-written: on local disk a finished temporary file is hard-linked to its
        name, on object storage the put is conditional. A client that repeats a put whose answer was lost is refused
        by its own first try; hence a file with these very bytes counts as written by this call. Two writers that must
        not both win write different bytes (a record holds the id of its commit).
        """
        return self._write(self._files.create, self._own(path), data)

    def swap(self, path: str, old: bytes, new: bytes) -> bool:
        """Replace a file only if its content is ``old``; of many writers at most one gets True. Absent gives False."""
        return self._write(self._files.swap, self._own(path), old, new)

    def delete(self, path: str) -> None:
        """Remove a file of the corpus; absent is fine."""
        self._write(self._files.delete, self._own(path))

    def _own(self, path: str) -> str:
        if _is_absolute(path):
            raise ValueError(f"{path} lies outside the corpus and is neither written nor deleted")
        return self._full(path)


def files_of(url: str) -> tuple[Files, str]:
    """Return where a path or URL lies, and its name there. Raises ValueError or ImportError where nothing opens it."""
    scheme, is_url, rest = url.partition("://")
    if is_url and scheme in SCHEMES:
        container, key = split_name(rest)
        return ObjectFiles(SCHEMES[scheme], container), key
    filesystem, name = filesystem_of(url)
    return (
        (LocalFiles(), str(Path(name).absolute())) if is_local(filesystem) else (OtherFiles(filesystem), name)
    )


def _is_absolute(path: str) -> bool:
    return "://" in path or path.startswith("/")
