"""The answer to a GET over HTTP/1 (RFC 9112), read from a socket: status line, headers, and the body by its framing.

``http.client`` is not used: it parses headers with the email package, which takes a third of a fetch's CPU, and its
own limits are too wide. Whatever the server sends ends in a FetchError at worst, and each read ends in time: a socket's
own timeout is per operation, so that a server which sends a byte a second would hold a thread without end.
"""

import re
import socket
import time
from collections.abc import Iterator

from pipeline.web.urls import FetchError

CHUNK_BYTES = 1 << 16

_STATUS_LINE = re.compile(rb"HTTP/(?:1\.\d+|0\.9)[ \t]+([1-9]\d\d)(?:[ \t]+(.*))?", re.S)
_SWITCHING_PROTOCOLS, _OK, _NO_CONTENT, _NOT_MODIFIED = 101, 200, 204, 304
_MAX_HEADERS = 100
_MAX_CHUNK_LINE_BYTES = 65_536
_DIGITS = re.compile(rb"\d{1,18}")
_HEX_DIGITS = re.compile(rb"[0-9A-Fa-f]{1,15}")


class Deadline:
    """The end of the time that one URL may take."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left_s(self) -> float:
        """Return the seconds left. Raises FetchError when there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise FetchError("timeout", "the URL's total time ran out", again=False)
        return left

    def has(self, seconds: float) -> bool:
        """Tell whether more than so many seconds are left."""
        return self._end - time.monotonic() > seconds

    def pause(self, seconds: float) -> None:
        """Extend by time spent in our own queues: the site is not charged for it."""
        self._end += seconds


class Wire:
    """A connected socket; each operation ends at ``timeout_s`` or at the deadline, whichever comes first.

    What the socket raises becomes a FetchError.
    """

    def __init__(self, sock: socket.socket, deadline: Deadline, timeout_s: float) -> None:
        self._sock, self._deadline, self._timeout_s = sock, deadline, timeout_s
        # What was received, and how much of it was read.
        self._received, self._position = b"", 0

    def send(self, data: bytes) -> None:
        """Send all of the data."""
        self._bound_next()
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise named(error) from error

    def line(self, max_bytes: int) -> bytes:
        """Return the bytes up to and with the next newline, or to the end. Raises FetchError over ``max_bytes``."""
        start = searched = self._position
        while (newline := self._received.find(b"\n", searched)) < 0:
            self._received, start, searched = self._received[start:], 0, len(self._received) - start
            if searched > max_bytes or not (more := self._receive(CHUNK_BYTES)):
                break
            self._received += more
        self._position = newline + 1 if newline >= 0 else len(self._received)
        if self._position - start > max_bytes:
            raise FetchError("header_too_large", "over crawl.max_header_bytes", again=False)
        return self._received[start : self._position]

    def read(self, max_bytes: int) -> bytes:
        """Return what comes next, at least a byte unless the server has closed the connection."""
        start = self._position
        if start == len(self._received):
            return self._receive(max_bytes)
        self._position = min(start + max_bytes, len(self._received))
        return self._received[start : self._position]

    def _receive(self, max_bytes: int) -> bytes:
        self._bound_next()
        try:
            return self._sock.recv(max_bytes)
        except OSError as error:
            raise named(error) from error

    def _bound_next(self) -> None:
        timeout_s = min(self._timeout_s, self._deadline.left_s())
        # Setting it is a call of the system.
        if timeout_s != self._sock.gettimeout():
            self._sock.settimeout(timeout_s)


def named(error: OSError) -> FetchError:
    """Return the FetchError for what a socket raised."""
    return FetchError("timeout" if isinstance(error, TimeoutError) else "connect", str(error))


class Response:
    """One answer. The status line and the headers are read at once, the body by ``chunks``.

    Args:
        max_header_bytes: of the status line and the headers, those of interim answers included.

    Attributes:
        length: of the body as declared, None where it is not.
    """

    def __init__(self, wire: Wire, max_header_bytes: int) -> None:
        self._wire, self._header_bytes_left = wire, max_header_bytes
        self.status, self.reason = self._status_line()
        self._headers = self._read_headers()
        # Interim answers (100 Continue, 103 Early Hints) come before the one that counts. 101 is final: what follows
        # it is another protocol.
        while self.status < _OK and self.status != _SWITCHING_PROTOCOLS:
            self.status, self.reason = self._status_line()
            self._headers = self._read_headers()
        self._is_chunked = (self.header("transfer-encoding") or "").lower() == "chunked"
        self.length = self._declared_length()

    def header(self, name: str) -> str | None:
        """Return the first header of a name, given in lower case."""
        values = self._headers.get(name)
        return values[0] if values else None

    def headers(self, name: str) -> list[str]:
        """Return all headers of a name, given in lower case."""
        return self._headers.get(name, [])

    def chunks(self) -> Iterator[bytes]:
        """Yield the body in pieces of up to 64 KiB. Raises FetchError; a declared length is not checked."""
        if self._is_chunked:
            return self._chunked()
        return self._plain()

    def _status_line(self) -> tuple[int, str]:
        line = self._line()
        if not line:
            raise FetchError("connect", "the server closed the connection without an answer")
        if not (match := _STATUS_LINE.fullmatch(line.rstrip())):
            raise FetchError("bad_response", f"the answer begins with {line[:80]!r}")
        return int(match[1]), (match[2] or b"").decode("latin-1")

    def _read_headers(self) -> dict[str, list[str]]:
        headers: dict[str, list[str]] = {}
        last: list[str] = []
        for _ in range(_MAX_HEADERS + 1):
            line = self._line()
            if not (text := line.decode("latin-1").strip()):
                return headers
            if line[0] in b" \t":
                # A line that continues the one before (5.2).
                if last:
                    last[-1] = f"{last[-1]} {text}"
                continue
            name, colon, value = text.partition(":")
            # What is not a header is passed over, as browsers do.
            if colon:
                last = headers.setdefault(name.rstrip().lower(), [])
                last.append(value.lstrip())
        raise FetchError("header_too_large", f"over {_MAX_HEADERS} header lines")

    def _line(self) -> bytes:
        line = self._wire.line(self._header_bytes_left)
        self._header_bytes_left -= len(line)
        return line

    def _declared_length(self) -> int | None:
        if self.status in (_SWITCHING_PROTOCOLS, _NO_CONTENT, _NOT_MODIFIED):
            return 0
        value = (self.header("content-length") or "").encode("latin-1")
        return int(value) if not self._is_chunked and _DIGITS.fullmatch(value) else None

    def _plain(self) -> Iterator[bytes]:
        """Yield the body: as many bytes as declared, or to the end of the connection (6.3)."""
        left = self.length
        while left is None or left > 0:
            if not (piece := self._wire.read(CHUNK_BYTES if left is None else min(left, CHUNK_BYTES))):
                return
            left = None if left is None else left - len(piece)
            yield piece

    def _chunked(self) -> Iterator[bytes]:
        """Yield the body of the chunked transfer coding (7.1), many small chunks at a time."""
        pieces, gathered = [], 0
        while left := self._chunk_size():
            while left:
                if not (piece := self._wire.read(min(left, CHUNK_BYTES))):
                    raise FetchError(
                        "body_truncated", f"the connection closed within a chunk: {left} to come"
                    )
                left -= len(piece)
                gathered += len(piece)
                pieces.append(piece)
                if gathered >= CHUNK_BYTES:
                    yield b"".join(pieces)
                    pieces, gathered = [], 0
            if self._wire.line(_MAX_CHUNK_LINE_BYTES).strip():
                raise FetchError("body_truncated", "a chunk is longer than it says")
        while self._wire.line(_MAX_CHUNK_LINE_BYTES).strip():
            pass  # trailers, which say nothing that counts
        if pieces:
            yield b"".join(pieces)

    def _chunk_size(self) -> int:
        size = self._wire.line(_MAX_CHUNK_LINE_BYTES).partition(b";")[0].strip()
        if size.startswith(b"-"):
            raise FetchError("bad_response", "a negative chunk size", again=False)
        if not _HEX_DIGITS.fullmatch(size):
            raise FetchError("body_truncated", f"a chunk's size is {size[:40]!r}")
        return int(size, 16)
