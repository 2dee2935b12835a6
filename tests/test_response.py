"""What servers answer, byte by byte over a socket pair, and what is read from it."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.web.response import Deadline, Response, Wire
from pipeline.web.urls import FetchError

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    server, client = socket.socketpair()
    with server, client:
        yield server, client


def answered(answer: bytes, step: int = 1 << 20, max_header_bytes: int = 65_536) -> tuple[Response, bytes]:
    """Read an answer that arrives in pieces of ``step`` bytes, after which the server closes the connection."""
    server, client = socket.socketpair()

    def serve() -> None:
        with server, contextlib.suppress(OSError):
            for start in range(0, len(answer), step):
                server.sendall(answer[start : start + step])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client:
            response = Response(Wire(client, Deadline(10), 10), max_header_bytes)
            return response, b"".join(response.chunks())
    finally:
        thread.join()


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_headers_are_read_as_browsers_read_them(step: int) -> None:
    answer = OK + (
        b"X-Robots-Tag: noai\r\nno header at all\r\nX-Robots-Tag : otherbot:\r\n\tnoindex\n"
        b"Content-Length:3\r\nContent-Length: 99\r\n\r\nabcdef"
    )
    response, body = answered(answer, step)
    assert (response.status, response.reason) == (200, "OK")
    assert response.headers("x-robots-tag") == ["noai", "otherbot: noindex"]
    assert response.header("x-robots-tag") == "noai" and response.header("location") is None
    assert (response.length, body) == (3, b"abc")


@pytest.mark.parametrize(
    ("line", "status", "reason"),
    [
        (b"HTTP/1.0 200", 200, ""),
        (b"HTTP/1.1 404 ", 404, ""),
        (b"HTTP/0.9 200 OK", 200, "OK"),
        (b"HTTP/1.1  999  Request denied ", 999, "Request denied"),
        (b"HTTP/1.1 101 Switching Protocols", 101, "Switching Protocols"),
    ],
)
def test_status_lines(line: bytes, status: int, reason: str) -> None:
    response, _ = answered(line + b"\r\n\r\n")
    assert (response.status, response.reason) == (status, reason)


def test_interim_answers_come_before_the_one_that_counts() -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLocation: /a\r\n\r\n"
    response, body = answered(interim + OK + b"\r\nbody")
    assert (response.status, response.header("location"), body) == (200, None, b"body")


@given(chunks=st.lists(st.binary(min_size=1, max_size=70_000), max_size=5), step=st.integers(1, 50_000))
def test_chunks_are_joined(chunks: list[bytes], step: int) -> None:
    sent = b"".join(b"%X;name=value\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    _, body = answered(CHUNKED + sent + b"0\r\nX-Trailer: 1\r\n\r\n", max(step, 500))
    assert body == b"".join(chunks)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "connect"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "bad_response"),
        (b"HTTP/2 200 OK\r\n\r\n", "bad_response"),
        (b"HTTP/1.1 20 OK\r\n\r\n", "bad_response"),
        (b"HTTP/1.1 " + b"x" * 99_999, "header_too_large"),
        (OK + b"X: 1\r\n" * 101 + b"\r\n", "header_too_large"),
        (OK + b"X: " + b"x" * 99_999, "header_too_large"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 9_999, "header_too_large"),
        (CHUNKED + b"5\r\nabc", "body_truncated"),
        (CHUNKED + b"5\r\nabcde\r\n", "body_truncated"),
        (CHUNKED + b"3\r\nabcde\r\n0\r\n\r\n", "body_truncated"),
        (CHUNKED + b"0x3\r\nabc\r\n0\r\n\r\n", "body_truncated"),
        (CHUNKED + b"F" * 20 + b"\r\nabc", "body_truncated"),
        (CHUNKED + b"-3\r\nabc", "bad_response"),
    ],
)
def test_what_cannot_be_read_is_named(answer: bytes, reason: str) -> None:
    with pytest.raises(FetchError) as raised:
        answered(answer)
    assert raised.value.reason == reason


@given(st.binary(max_size=300))
def test_no_answer_raises_anything_else(answer: bytes) -> None:
    for start in (b"", OK, OK + b"\r\n", CHUNKED):
        with contextlib.suppress(FetchError):
            answered(start + answer)


@pytest.mark.parametrize("bytes_sent", [b"", OK, OK + b"\r\nbody"])
def test_each_read_ends_in_time(ends: tuple[socket.socket, socket.socket], bytes_sent: bytes) -> None:
    server, client = ends
    server.sendall(bytes_sent)
    with pytest.raises(FetchError, match="timeout"):
        list(Response(Wire(client, Deadline(10), 0.05), 65_536).chunks())
    with pytest.raises(FetchError, match="timeout"):
        list(Response(Wire(client, Deadline(0.05), 10), 65_536).chunks())
