"""Committed files that the processes of one machine share: one of them fetches and checks a file, all read it.

The ranks of a node need mostly the same shards at the same time. The first one copies a shard from object storage, or
reads it on local disk, and compares it with its record; the others wait for that and open the same file. What is shared
lies in a folder of this user in the scratch space. Each process that uses a file holds a lock on its ``.use`` file,
which the system takes back from a process that was killed; the last one removes the copy.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.corpus.records import Records
from pipeline.shards.shard_reader import committed_file
from pipeline.storage.scratch import shared_folder
from schemas.records import OutputFile


@contextlib.contextmanager
def node_file(records: Records, file: OutputFile) -> Iterator[Path]:
    """Yield a local path with the committed bytes; of all processes that use them at once, one fetches and checks them.

    Raises:
        CorruptShardError: the file is gone, or its size or sha256 is not the record's.
    """
    folder = shared_folder()
    if folder is None:
        with committed_file(records, file) as path:
            yield path
        return
    location = json.dumps([records.storage.url(file.path), file.bytes, file.sha256])
    shared = folder / hashlib.sha256(location.encode()).hexdigest()[:32]
    with _in_use(shared):
        yield _checked(records, file, shared)


def remove_unused() -> None:
    """Remove the copies that killed processes left."""
    folder = shared_folder()
    for lock in folder.glob("*.use") if folder else ():
        with contextlib.suppress(FileNotFoundError), lock.open("r+b") as file:
            _remove_unless_used(lock.with_suffix(""), file.fileno())


@contextlib.contextmanager
def _in_use(shared: Path) -> Iterator[None]:
    """Keep the others from removing a file; remove it afterwards unless they use it."""
    lock = shared.with_suffix(".use")
    descriptor = _shared_lock(lock)
    while not _is(lock, descriptor):
        # The last user removed it after it was opened here.
        os.close(descriptor)
        descriptor = _shared_lock(lock)
    try:
        yield
    finally:
        _remove_unless_used(shared, descriptor)
        os.close(descriptor)


def _checked(records: Records, file: OutputFile, shared: Path) -> Path:
    """Return the path of the committed bytes; this process fetches and checks them unless another one has."""
    in_place, checked = Path(records.storage.url(file.path)), shared.with_suffix(".checked")
    with shared.with_suffix(".fetch").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        if shared.exists():
            return shared
        with contextlib.suppress(OSError, ValueError):
            if json.loads(checked.read_bytes()) == _identity(in_place):
                return in_place
        with committed_file(records, file) as path:
            if path != in_place:
                return path.replace(shared)
            # On local disk the file is read where it lies: that this very file was checked is all that is shared.
            checked.write_text(json.dumps(_identity(path)))
            return path


def _identity(path: Path) -> list[int]:
    """Return what changes when another file takes a path, or the file is written again."""
    status = path.stat()
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]


def _shared_lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def _is(path: Path, descriptor: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False


def _remove_unless_used(shared: Path, descriptor: int) -> None:
    """Remove a file where no other process has its lock; give this process's lock back."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The lock file last: who finds none begins anew.
        for suffix in ("", ".checked", ".fetch", ".use"):
            shared.with_suffix(suffix).unlink(missing_ok=True)
