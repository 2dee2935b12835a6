"""An object, or a part of a file, as a file that can be read and searched, by its ranges."""

import io
from collections.abc import Callable
from typing import Any


class RangeReader(io.RawIOBase):
    """Reads ``size`` bytes through ``read_range(start, size)``; wrap it in a BufferedReader for small reads."""

    def __init__(self, read_range: Callable[[int, int], bytes], size: int) -> None:
        self._read_range, self._size, self._position = read_range, size, 0

    def readable(self) -> bool:
        """Tell that it is for reading."""
        return True

    def seekable(self) -> bool:
        """Tell that any byte can be next."""
        return True

    def tell(self) -> int:
        """Return the place of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, by one range."""
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0
        data = self._read_range(self._position, wanted)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def readall(self) -> bytes:
        """Return what is left, by one range."""
        data = (
            self._read_range(self._position, self._size - self._position)
            if self._position < self._size
            else b""
        )
        self._position += len(data)
        return data
