"""Local files that others put where a file is expected: regular files, or links to one, are opened and nothing else.

A FIFO would hold its reader for ever, and a device (``/dev/zero``) has size 0 and no end.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class NotRegularFileError(OSError):
    """Report a FIFO, a device or a socket that stands where a file is expected."""

    def __init__(self, path: Path | str, kind: str) -> None:
        super().__init__(errno.EINVAL, f"it is {kind}, not a regular file", str(path))
        self._arguments = (path, kind)

    def __reduce__(self) -> tuple[type["NotRegularFileError"], tuple[Path | str, str]]:
        return NotRegularFileError, self._arguments


def open_regular(path: Path | str) -> BinaryIO:
    """Open a local file for reading, through links too. Never waits for a writer.

    Raises NotRegularFileError, and OSError as ``open`` does.
    """
    return open(path, "rb", opener=_open_regular)


def require_regular(path: Path | str) -> None:
    """Raise NotRegularFileError where a FIFO, a device or a socket stands; a folder and nothing at all pass."""
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return
    _require_kind(path, mode)


def _open_regular(path: str, flags: int) -> int:
    # The kind is known before the opening too: to open a tape or a terminal is an act on it.
    require_regular(path)
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_kind(path, os.fstat(descriptor).st_mode)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _require_kind(path: Path | str, mode: int) -> None:
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise NotRegularFileError(path, _KINDS.get(stat.S_IFMT(mode), "something else"))
