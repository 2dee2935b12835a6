"""Scratch folders on local disk: removed when a block ends, and swept later where a process was killed."""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

# A disk has so little left, and not nothing, when a write did not fit.
_NO_ROOM_BYTES = 1 << 20


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a scratch folder that ``sweep_temporary_folders`` can find if this process is killed.

    An error that the disk is full names the folder where it names no file and this is the disk.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"{_scratch_prefix()}{os.getpid()}-"))
    try:
        yield folder
    except OSError as error:
        if error.errno == errno.ENOSPC and not error.filename and free_scratch() < _NO_ROOM_BYTES:
            error.filename = f"{folder} (the folder of TMPDIR)"
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep_temporary_folders() -> int:
    """Remove the scratch folders that killed processes of this machine left; return how many."""
    swept = 0
    prefix = _scratch_prefix()
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*-*"):
        pid = folder.name.removeprefix(prefix).split("-")[0]
        if pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
            swept += 1
    return swept


def free_scratch() -> int:
    """Return the free bytes of the scratch space."""
    return shutil.disk_usage(tempfile.gettempdir()).free


def cache_folder() -> Path:
    """Return capfilt's folder in the user's cache; it may not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "capfilt"


def shared_folder() -> Path | None:
    """Return this user's scratch folder that all processes of the machine share; None where there can be none.

    Files in it can be locked.
    """
    folder = Path(tempfile.gettempdir(), f"{_scratch_prefix()}shared-{os.getuid()}")
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        # Not a link or a folder that somebody else has made in a place where all may write.
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077:
            _require_locks(folder)
            return folder
    return None


def _require_locks(folder: Path) -> None:
    """Raise OSError where the file system has no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _scratch_prefix() -> str:
    """Return a name that no other machine's or container's processes use, should they share the folder."""
    try:
        space = Path("/proc/self/ns/pid").readlink().name.strip("pid:[]")
    except OSError:
        space = "0"
    return f"capfilt-{socket.gethostname()}-{space}-"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
