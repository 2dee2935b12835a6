"""Scratch folders on local disk: removed when a block ends, and swept later where a process was killed."""

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a scratch folder that ``sweep_temporary_folders`` can find if this process is killed."""
    folder = Path(tempfile.mkdtemp(prefix=f"{_scratch_prefix()}{os.getpid()}-"))
    try:
        yield folder
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
