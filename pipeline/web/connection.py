"""One HTTP request with limits on header size, body size and total time.

``http.client`` does the HTTP, on a socket connected to an address that was checked before. A socket's own timeout
is per operation, so a server that sends a byte a second would hold a thread without end: here each read may take
``read_timeout_s`` and no more than what is left until the URL's deadline.
"""

import contextlib
import hashlib
import http
import http.client
import io
import socket
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from pipeline.web.content_encoding import bounded, decompressed
from pipeline.web.dns import SocketAddress
from pipeline.web.urls import FetchError, WebUrl

_CHUNK_BYTES = 1 << 16


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


class _SocketStream(io.RawIOBase):
    """The socket's bytes; each read ends at ``read_timeout_s`` or at the deadline, whichever comes first."""

    def __init__(self, sock: socket.socket, deadline: Deadline, read_timeout_s: float) -> None:
        self._sock, self._deadline, self._read_timeout_s = sock, deadline, read_timeout_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(min(self._read_timeout_s, self._deadline.left_s()))
        return self._sock.recv_into(buffer)


class _BoundedLines(io.BufferedReader):
    """Counts the bytes of lines (status line, headers, interim responses) while ``lines_left`` is set."""

    lines_left: int | None = None

    def readline(self, size: int | None = -1) -> bytes:
        line = super().readline(size)
        if self.lines_left is not None:
            self.lines_left -= len(line)
            if self.lines_left < 0:
                raise FetchError("header_too_large", "over crawl.max_header_bytes", again=False)
        return line

    def read(self, size: int | None = -1) -> bytes:
        # http.client takes "-1" for a chunk's size, and would read all that comes into memory.
        if size is None or size < 0:
            raise FetchError("bad_response", "a negative chunk size", again=False)
        return super().read(size)


class _Socket:
    """What ``http.client`` uses of a socket."""

    def __init__(
        self, sock: socket.socket, deadline: Deadline, read_timeout_s: float, max_header_bytes: int
    ) -> None:
        self._sock, self._deadline = sock, deadline
        self.file = _BoundedLines(_SocketStream(sock, deadline, read_timeout_s))
        self.file.lines_left = max_header_bytes

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(self._deadline.left_s())
        self._sock.sendall(data)

    def makefile(self, mode: str) -> _BoundedLines:
        return self.file

    def close(self) -> None:
        """Do nothing: the opener of the socket closes it, after the body was read."""


class _Response(http.client.HTTPResponse):
    """Skips interim responses (103 Early Hints and the like); http.client skips 100 alone."""

    def _read_status(self) -> tuple[str, int, str]:
        while True:
            version, status, reason = super()._read_status()  # type: ignore[misc]  # no public name
            # 101 is final: what follows it is another protocol.
            if status <= http.HTTPStatus.SWITCHING_PROTOCOLS or status >= http.HTTPStatus.OK:
                return version, status, reason
            http.client.parse_headers(self.fp)


@contextlib.contextmanager
def request(
    url: WebUrl,
    addresses: Sequence[SocketAddress],
    headers: Mapping[str, str],
    *,
    deadline: Deadline,
    read_timeout_s: float,
    max_header_bytes: int,
    tls: ssl.SSLContext,
) -> Iterator[http.client.HTTPResponse]:
    """GET a URL from one of the given addresses and yield the response, headers read. Raises FetchError."""
    with contextlib.ExitStack() as stack:
        with _faults_named():
            sock = stack.enter_context(_connect(addresses, deadline, read_timeout_s))
            if url.scheme == "https":
                sock = stack.enter_context(_encrypt(sock, url, deadline, read_timeout_s, tls))
            wire = _Socket(sock, deadline, read_timeout_s, max_header_bytes)
            connection = http.client.HTTPConnection(url.host, url.port)
            connection.response_class = _Response
            connection.sock = wire
            fields = {"Host": url.netloc, "Accept-Encoding": "identity", "Connection": "close", **headers}
            connection.request("GET", url.target, headers=fields)
            response = stack.enter_context(contextlib.closing(connection.getresponse()))
            wire.file.lines_left = None
        yield response


def read_body(response: http.client.HTTPResponse, sink: IO[bytes], max_bytes: int) -> tuple[int, str]:
    """Copy the body, decompressed, to ``sink``; return its bytes and sha256.

    Raises FetchError once it is too long, as it comes over the wire or as it unfolds.
    """
    declared = response.length
    if declared is not None and declared > max_bytes:
        raise FetchError("body_too_large", f"Content-Length {declared}, over crawl.max_body_bytes")
    digest, received = hashlib.sha256(), 0
    for chunk in _body(_whole(response), response, max_bytes):
        received += len(chunk)
        digest.update(chunk)
        sink.write(chunk)
    return received, digest.hexdigest()


def read_start(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    """Return the first ``max_bytes`` of the decompressed body, whatever length it declares. Raises FetchError."""
    start = b""
    try:
        # The chunk that exceeds the bound is not yielded: allow one more than is needed.
        for chunk in _body(_wire(response), response, max_bytes + _CHUNK_BYTES):
            start += chunk
    except FetchError as error:
        if error.reason != "body_too_large":
            raise
    return start[:max_bytes]


def _body(wire: Iterator[bytes], response: http.client.HTTPResponse, max_bytes: int) -> Iterator[bytes]:
    """Yield the body as its Content-Encoding unfolds it. Raises FetchError."""
    codings = response.headers.get_all("Content-Encoding", [])
    return decompressed(bounded(wire, max_bytes), codings, max_bytes)


def _wire(response: http.client.HTTPResponse) -> Iterator[bytes]:
    with _faults_named():
        while chunk := response.read(_CHUNK_BYTES):
            yield chunk


def _whole(response: http.client.HTTPResponse) -> Iterator[bytes]:
    declared, received = response.length, 0
    for chunk in _wire(response):
        received += len(chunk)
        yield chunk
    if declared is not None and received < declared:
        raise FetchError("body_truncated", f"{received} of {declared} bytes")


def _connect(addresses: Sequence[SocketAddress], deadline: Deadline, read_timeout_s: float) -> socket.socket:
    """Connect to the first address that answers."""
    fault: OSError = ConnectionError("no address")
    for family, address in addresses:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(min(read_timeout_s, deadline.left_s()))
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except OSError as error:
            sock.close()
            fault = error
        except FetchError:
            sock.close()
            raise
    raise fault


def _encrypt(
    sock: socket.socket, url: WebUrl, deadline: Deadline, read_timeout_s: float, tls: ssl.SSLContext
) -> ssl.SSLSocket:
    # For a handshake, unlike for a read, the socket's timeout is the limit of the whole.
    sock.settimeout(min(read_timeout_s, deadline.left_s()))
    try:
        return tls.wrap_socket(sock, server_hostname=url.host)
    except TimeoutError:
        raise
    except (ssl.SSLError, ValueError) as error:
        raise FetchError("tls", str(error)) from error


@contextlib.contextmanager
def _faults_named() -> Iterator[None]:
    """Turn what sockets and http.client raise into a FetchError."""
    try:
        yield
    except TimeoutError as error:
        raise FetchError("timeout", str(error)) from error
    except http.client.RemoteDisconnected as error:
        raise FetchError("connect", str(error)) from error
    except http.client.IncompleteRead as error:
        raise FetchError("body_truncated", str(error)) from error
    except http.client.LineTooLong as error:
        raise FetchError("header_too_large", str(error)) from error
    except http.client.InvalidURL as error:
        raise FetchError("bad_url", str(error)) from error
    except http.client.HTTPException as error:
        # The one thing that http.client says of more than 100 header lines.
        reason = "header_too_large" if "headers" in str(error) else "bad_response"
        raise FetchError(reason, repr(error)) from error
    except OSError as error:
        raise FetchError("connect", str(error)) from error
