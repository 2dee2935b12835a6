"""Whole files on local disk: visible only once they are finished and synced."""

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import BinaryIO

from pipeline.regular_files import open_regular, require_regular
from pipeline.storage.file_info import FileInfo


class LocalFiles:
    """The files of this machine by their absolute paths. Raises OSError, NotRegularFileError for what is no file."""

    is_local = True
    takes_commits = True

    def url(self, path: str) -> str:
        """Return the path."""
        return path

    def exists(self, path: str) -> bool:
        """Tell whether a file or folder is there."""
        return Path(path).exists()

    def is_folder(self, path: str) -> bool:
        """Tell whether a folder is there."""
        return Path(path).is_dir()

    def info(self, path: str) -> FileInfo:
        """Return size and version of one file; of a link as ``find`` does."""
        target = Path(path)
        # Its own time, as corpora have it in the signatures of their lists: the Hugging Face cache is full of links.
        return _info(path, target.lstat())._replace(bytes=target.stat().st_size)

    def find(self, path: str) -> list[FileInfo]:
        """Return all files below a folder; a link to a folder is not followed.

        Raises OSError for a folder that cannot be read: leaving it out would make live files look like orphans.
        """
        if not Path(path).is_dir():
            return [self.info(path)] if Path(path).is_file() else []
        files: list[FileInfo] = []
        folders = [path]
        while folders:
            folder = folders.pop()
            # What vanishes between the listing and the look at it is not there.
            with contextlib.suppress(FileNotFoundError):
                for entry in os.scandir(folder):
                    try:
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(entry.path)
                        else:
                            files.append(_entry_info(entry))
                    except FileNotFoundError:
                        continue
        return files

    def read(self, path: str, max_bytes: int | None = None) -> bytes:
        """Return a file whole, or its first ``max_bytes`` and one, whatever size it is listed with."""
        with open_regular(path) as file:
            return file.read() if max_bytes is None else file.read(max_bytes + 1)

    def read_range(self, path: str, start: int, size: int) -> bytes:
        """Return ``size`` bytes from ``start`` on, fewer where the file ends."""
        with open_regular(path) as file:
            file.seek(start)
            return file.read(size)

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading."""
        return open_regular(path)

    def put(self, local: Path, path: str) -> None:
        """Publish a finished file by copying it beside the target and renaming it."""
        target = Path(path)
        with _beside(target, partial(shutil.copyfile, local)) as temporary:
            temporary.replace(target)

    def share(self, local: Path, path: str) -> None:
        """Publish a file as a hard link; as a copy where the filesystem has none, or it is another one."""
        target = Path(path)
        with _beside(target, partial(_link_or_copy, local)) as temporary:
            temporary.replace(target)

    def write(self, path: str, data: bytes) -> None:
        """Publish bytes in one step."""
        target = Path(path)
        with _beside(target, lambda temporary: temporary.write_bytes(data)) as temporary:
            temporary.replace(target)

    def create(self, path: str, data: bytes) -> bool:
        """Publish bytes unless the name is taken: a finished temporary file is hard-linked to it."""
        target = Path(path)
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

    def swap(self, path: str, old: bytes, new: bytes) -> bool:
        """Replace a file if it has just these bytes; of many who want to, one may at a time: who holds its lock."""
        target = Path(path)
        try:
            require_regular(path)
            file = target.open("r+b")
        except FileNotFoundError:
            return False
        with file:
            wait_for_lock(file)
            # A file that was replaced while this waited for its lock is not the one under the name any more.
            is_there = os.path.samestat(os.fstat(file.fileno()), target.stat())
            if not is_there or file.read() != old:
                return False
            self.write(path, new)
        return True

    def delete(self, path: str) -> None:
        """Remove a file; absent is fine."""
        Path(path).unlink(missing_ok=True)


def _info(path: str, stat: os.stat_result) -> FileInfo:
    return FileInfo(
        path=path,
        bytes=stat.st_size,
        version=str(stat.st_mtime),
        modified=datetime.fromtimestamp(stat.st_mtime, UTC),
    )


def _entry_info(entry: os.DirEntry[str]) -> FileInfo:
    """Return what ``info`` says; of a link its own time, and the size of what it leads to (0 where that is gone)."""
    info = _info(entry.path, entry.stat(follow_symlinks=False))
    if not entry.is_symlink():
        return info
    try:
        return info._replace(bytes=entry.stat().st_size)
    except OSError:
        return info._replace(bytes=0)


def wait_for_lock(file: BinaryIO) -> None:
    """Wait for the lock on a file, which closing it gives back; some network filesystems have none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise


@contextlib.contextmanager
def moved_when_whole(target: Path) -> Iterator[Path]:
    """Yield a place beside a file or folder; what is written there is moved to it at the end, so that it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    yield unfinished
    unfinished.replace(target)


def _link_or_copy(local: Path, target: Path) -> None:
    try:
        target.hardlink_to(local)
    except OSError:
        shutil.copyfile(local, target)


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
