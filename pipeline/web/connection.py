"""One HTTP request with limits on header size, body size and total time.

The socket is connected to an address that was checked before.
"""

import contextlib
import hashlib
import re
import socket
import ssl
from collections.abc import Iterator, Sequence
from typing import IO

from pipeline.web.content_encoding import bounded, decompressed
from pipeline.web.dns import SocketAddress
from pipeline.web.response import CHUNK_BYTES, Deadline, Response, Wire, named
from pipeline.web.urls import FetchError, WebUrl

# What a URL may hold on the request line: a space or a control character would make another request of it.
_TARGET = re.compile(r"[!-~]+")


@contextlib.contextmanager
def request(
    url: WebUrl,
    addresses: Sequence[SocketAddress],
    headers: bytes,
    *,
    deadline: Deadline,
    read_timeout_s: float,
    max_header_bytes: int,
    tls: ssl.SSLContext,
) -> Iterator[Response]:
    """GET a URL from one of the given addresses and yield the response, headers read. Raises FetchError.

    Args:
        headers: as they are sent, but for ``Host``; each ends with a line's end.
    """
    if not _TARGET.fullmatch(url.target):
        raise FetchError("bad_url", f"control characters in {url.target!r}")
    sock = _connect(addresses, deadline, read_timeout_s)
    try:
        if url.scheme == "https":
            sock = _encrypt(sock, url, deadline, read_timeout_s, tls)
        wire = Wire(sock, deadline, read_timeout_s)
        wire.send(f"GET {url.target} HTTP/1.1\r\nHost: {url.netloc}\r\n".encode() + headers + b"\r\n")
        yield Response(wire, max_header_bytes)
    finally:
        sock.close()


def request_headers(user_agent: str, accept: str) -> bytes:
    """Return the headers that all requests have in common."""
    fields = {
        "Accept-Encoding": "identity",
        "Connection": "close",
        "User-Agent": user_agent,
        "Accept": accept,
    }
    return "".join(f"{name}: {value}\r\n" for name, value in fields.items()).encode("latin-1")


def read_body(response: Response, sink: IO[bytes], max_bytes: int) -> tuple[int, str]:
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


def read_start(response: Response, max_bytes: int) -> bytes:
    """Return the first ``max_bytes`` of the decompressed body, whatever length it declares. Raises FetchError."""
    start = b""
    try:
        # The chunk that exceeds the bound is not yielded: allow one more than is needed.
        for chunk in _body(response.chunks(), response, max_bytes + CHUNK_BYTES):
            start += chunk
    except FetchError as error:
        if error.reason != "body_too_large":
            raise
    return start[:max_bytes]


def _body(wire: Iterator[bytes], response: Response, max_bytes: int) -> Iterator[bytes]:
    """Yield the body as its Content-Encoding unfolds it. Raises FetchError."""
    return decompressed(bounded(wire, max_bytes), response.headers("content-encoding"), max_bytes)


def _whole(response: Response) -> Iterator[bytes]:
    declared, received = response.length, 0
    for chunk in response.chunks():
        received += len(chunk)
        yield chunk
    if declared is not None and received < declared:
        raise FetchError("body_truncated", f"{received} of {declared} bytes")


def _connect(addresses: Sequence[SocketAddress], deadline: Deadline, read_timeout_s: float) -> socket.socket:
    """Connect to the first address that answers."""
    fault = FetchError("connect", "no address")
    for family, address in addresses:
        timeout_s = min(read_timeout_s, deadline.left_s())
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except OSError as error:
            sock.close()
            fault = named(error)
    raise fault


def _encrypt(
    sock: socket.socket, url: WebUrl, deadline: Deadline, read_timeout_s: float, tls: ssl.SSLContext
) -> ssl.SSLSocket:
    # For a handshake, unlike for a read, the socket's timeout is the limit of the whole.
    sock.settimeout(min(read_timeout_s, deadline.left_s()))
    try:
        return tls.wrap_socket(sock, server_hostname=url.host)
    except (ssl.SSLError, ValueError) as error:
        raise FetchError("tls", str(error)) from error
    except OSError as error:
        raise named(error) from error
