"""The text of a list as lines: decompressed, decoded and numbered, each of bounded length.

Lists come from others. So no line, no row and no decompressed stream may grow without bound, and the error for
what cannot be read names its line.
"""

import bz2
import gzip
import io
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from schemas.errors import CapfiltError

# Of one row of a list, all its cells together: an image as a data: URL fits in.
MAX_ROW_BYTES = 16 << 20
# URLs and captions shrink to a third or a tenth; a decompression bomb is a thousand times its size and more.
MAX_EXPANSION = 100
# Small lists may repeat themselves as they like.
FREE_BYTES = 64 << 20
# What a damaged or mislabelled file raises.
UNREADABLE = (pa.ArrowException, zlib.error, EOFError, OSError)

_READ_BYTES = 1 << 20
_GZIP, _BZIP2, _ZSTD = b"\x1f\x8b", b"BZh", b"\x28\xb5\x2f\xfd"
_NOT_TEXT = {
    _GZIP: "is compressed twice; unpack it",
    _BZIP2: "is compressed twice; unpack it",
    _ZSTD: "is compressed twice; unpack it",
    b"\xfd7zXZ": "is an xz archive; unpack it, or pack it with gzip, bzip2 or zstd",
    b"PK\x03\x04": "is a zip archive or a spreadsheet; unpack it, or save it as CSV",
    b"PAR1": 'is Parquet; name it .parquet, or set the source\'s format = "parquet"',
    b"\xff\xfe": "is UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "is UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8",
}


class _Content(io.RawIOBase):
    """The bytes of a file, decompressed if its first bytes say so, and never many more than it has itself."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._stream = _decompressor(file)
        self._bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        self._bytes += len(data)
        if self._bytes > max(FREE_BYTES, MAX_EXPANSION * self._file.tell()):
            raise OSError(
                f"it decompresses to more than {MAX_EXPANSION} times its size, as a decompression bomb does; "
                "if you trust it, unpack it"
            )
        buffer[: len(data)] = data
        return len(data)


def _decompressor(file: BinaryIO) -> Any:
    match compression_of(file):
        case "gzip":
            return gzip.GzipFile(fileobj=file)
        case "bzip2":
            return bz2.BZ2File(file)
        case "zstd":
            return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
    return file


def compression_of(file: BinaryIO) -> str:
    """Return how a file is compressed: gzip, bzip2, zstd or, empty, not at all.

    By its content, since a name may be in capitals, or say nothing.
    """
    start = file.read(4)
    file.seek(0)
    packed = {_GZIP: "gzip", _BZIP2: "bzip2", _ZSTD: "zstd"}
    return next((name for magic, name in packed.items() if start.startswith(magic)), "")


def content_of(file: BinaryIO) -> io.BufferedReader:
    """Return a file's content for reading from front to back, decompressed where it is gzip, bzip2 or zstd."""
    return io.BufferedReader(_Content(file), _READ_BYTES)


def text_of(file: BinaryIO, path: str) -> io.BufferedReader:
    """Return a list's content; reject by its first bytes what is not UTF-8 text."""
    content = content_of(file)
    try:
        start = content.peek(8)
    except UNREADABLE as error:
        raise CapfiltError(f"{path}: cannot be read: {error}") from error
    for magic, what in _NOT_TEXT.items():
        if start.startswith(magic):
            raise CapfiltError(f"{path}: {what}")
    return content


def not_utf8(place: str, error: UnicodeDecodeError, before: int = 0) -> CapfiltError:
    """Return the error about bytes that are not UTF-8, ``before`` of which came before the decoded ones."""
    byte, position = error.object[error.start], before + error.start + 1
    return CapfiltError(
        f"{place}: not UTF-8 text (byte 0x{byte:02x} at byte {position:,}); "
        "convert the list, for instance with iconv -f WINDOWS-1252 -t UTF-8"
    )


class Lines:
    """Iterate over the lines of a text; only ``\\n`` ends one, a byte order mark is skipped.

    ``number`` is that of the line given out last, ``first_of_row`` that of the first line of its row. A reader
    calls ``end_row`` after each row, which may have several lines: a row, and so a line or a cell, has at most
    ``MAX_ROW_BYTES``.
    """

    def __init__(self, content: io.BufferedReader, path: str) -> None:
        self.path = path
        self.number = 0
        self.row_bytes = 0
        self.first_of_row = 1
        self._content = content

    @property
    def place(self) -> str:
        """The line, or lines, of the row being read."""
        first, last = self.first_of_row, max(self.number, self.first_of_row)
        return (
            f"{self.path}: line {first:,}" if first == last else f"{self.path}: lines {first:,} to {last:,}"
        )

    def end_row(self) -> None:
        """Let the next line begin a new row."""
        self.first_of_row = self.number + 1
        self.row_bytes = 0

    def __iter__(self) -> Iterator[str]:
        while True:
            # In one function: calls would cost as much as the decoding.
            try:
                line = self._content.readline(MAX_ROW_BYTES + 1)
                self.number += 1
                text = line.decode()
            except UnicodeDecodeError as error:
                raise not_utf8(f"{self.path}: line {self.number:,}", error) from error
            except UNREADABLE as error:
                raise CapfiltError(
                    f"{self.path}: line {self.number + 1:,}: cannot be read: {error}"
                ) from error
            if not line:
                self.number -= 1
                return
            self.row_bytes += len(line)
            if self.row_bytes > MAX_ROW_BYTES:
                raise self._too_long()
            yield text if self.number > 1 else text.removeprefix("\ufeff")

    def _too_long(self) -> CapfiltError:
        return CapfiltError(
            f"{self.path}: line {self.first_of_row:,}: a row of more than {MAX_ROW_BYTES >> 20} MiB begins here; "
            "is a quote or a line break missing?"
        )
