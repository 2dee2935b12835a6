"""The folder of a model that lies on object storage: its files are fetched once a machine, into the user's cache."""

import contextlib
import fcntl
import shutil
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from pipeline.digests import digest_json
from pipeline.storage.errors import storage_error_message
from pipeline.storage.file_info import FileInfo
from pipeline.storage.scratch import cache_folder
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError


def is_bucket(name: str) -> bool:
    """Tell whether a model's name is a place on object storage, such as ``s3://bucket/models/blip``."""
    return "://" in name


def bucket_folder(name: str, patterns: Iterable[str], where: str) -> Path:
    """Return a local folder with the files of a model on object storage that fit the patterns.

    Of all processes of the machine one fetches them. The folder's name is a digest of what the storage lists: files
    that were replaced there are another folder here.

    Raises:
        CapfiltError: there are no such files, or the storage does not give them.
    """
    patterns = list(patterns)
    try:
        storage = Storage(name)
        files = [
            info
            for info in storage.list("")
            if "/" not in info.path and any(fnmatch(info.path, pattern) for pattern in patterns)
        ]
        if not files:
            raise CapfiltError(f"{where} = {name!r}: there is none of {', '.join(patterns)}")
        version = digest_json([[storage.root, info.path, info.bytes, info.version] for info in files])
        folder = cache_folder() / "weights" / version[:32]
        folder.mkdir(parents=True, exist_ok=True)
        with _turn(folder.with_suffix(".lock")):
            for info in files:
                _fetch(storage, info, folder / info.path)
    except OSError as error:
        raise CapfiltError(f"{where} = {name!r}: {storage_error_message(error) or error}") from error
    return folder


@contextlib.contextmanager
def _turn(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(storage: Storage, info: FileInfo, target: Path) -> None:
    """Fetch a file unless it is there; it is never there in part."""
    if target.is_file():
        return
    partial = target.with_name(f".{target.name}.part")
    with storage.local_copy(info.path) as copy:
        shutil.copyfile(copy, partial)
    partial.replace(target)
