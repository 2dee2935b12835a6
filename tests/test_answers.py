"""What servers answer: interim and odd statuses, compressed bodies, labels that lie."""

import gzip
import hashlib
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.web.client import Fetch
from pipeline.web.content_encoding import decompressed
from pipeline.web.urls import FetchError
from tests.hostile import JPEG, Answer, Exchange, HostileSite, encoded, picture
from tests.test_web import end, web

CODINGS = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "identity": bytes,
    "": bytes,
}
EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
PROCESSING = b"HTTP/1.1 102 Processing\r\n\r\n"


@pytest.fixture
def site() -> Iterator[HostileSite]:
    with HostileSite() as site:
        yield site


def raw_deflate(data: bytes) -> bytes:
    engine = zlib.compressobj(wbits=-15)
    return engine.compress(data) + engine.flush()


def answered(site: HostileSite, answer: Answer, **settings: object) -> Fetch:
    """Fetch an answer; that of robots.txt, whose own fetch needs none."""
    site.robots_txt = answer
    return web(site, **settings).fetch(site.url("/robots.txt"))


def sent(body: bytes, *headers: str, status: str = "200 OK") -> Answer:
    return lambda exchange: exchange.send(body, *headers, status=status)


def interim(*answers: bytes) -> Answer:
    def answer(exchange: Exchange) -> None:
        exchange.raw(b"".join(answers))
        exchange.send(JPEG)

    return answer


def assert_whole(fetch: Fetch, body: bytes = JPEG) -> None:
    assert (*end(fetch), fetch.attempts) == ("ok", None, 1)
    assert fetch.body is not None and fetch.body.read() == body
    assert (fetch.body_bytes, fetch.sha256) == (len(body), hashlib.sha256(body).hexdigest())


# -- statuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before",
    [
        [EARLY_HINTS],
        [CONTINUE],
        [PROCESSING],
        [CONTINUE, PROCESSING, EARLY_HINTS, EARLY_HINTS],
        [EARLY_HINTS] * 50,
    ],
    ids=len,
)
def test_interim_answers_are_passed_over(site: HostileSite, before: list[bytes]) -> None:
    fetch = answered(site, interim(*before))
    assert_whole(fetch)
    assert fetch.http_status == 200


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (EARLY_HINTS, ("refused", "header_too_large")),
        (PROCESSING + EARLY_HINTS, ("refused", "header_too_large")),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n", ("failed", "http_other")),
    ],
)
def test_interim_answers_have_an_end(site: HostileSite, first: bytes, expected: tuple[str, str]) -> None:
    fetch = answered(site, lambda exchange: exchange.forever(first * 100))
    assert (*end(fetch), fetch.attempts) == (*expected, 1)


def test_nothing_after_an_interim_answer_is_not_an_answer(site: HostileSite) -> None:
    assert answered(site, lambda exchange: exchange.raw(EARLY_HINTS)).reason == "connect"


@pytest.mark.parametrize(
    ("status", "reason", "attempts"),
    [
        ("203 Non-Authoritative Information", None, 1),
        ("204 No Content", "http_other", 1),
        ("205 Reset Content", "http_other", 1),
        ("206 Partial Content", "http_other", 1),
        ("300 Multiple Choices", "http_other", 1),
        ("301 Moved Permanently", "bad_response", 1),
        ("304 Not Modified", "http_other", 1),
        ("308 Permanent Redirect", "bad_response", 1),
        ("401 Unauthorized", "http_4xx", 1),
        ("429 Too Many Requests", "rate_limited", 3),
        ("451 Unavailable For Legal Reasons", "http_4xx", 1),
        ("500 Internal Server Error", "http_5xx", 3),
        ("599 Timeout", "http_5xx", 3),
        ("600 Odd", "http_other", 1),
        ("999 Request denied", "http_other", 1),
    ],
)
def test_statuses(site: HostileSite, status: str, reason: str | None, attempts: int) -> None:
    fetch = answered(site, sent(JPEG, status=status))
    assert (fetch.reason, fetch.http_status, fetch.attempts) == (reason, int(status[:3]), attempts)
    assert site.requests["/robots.txt"] == attempts


# -- compressed bodies -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (["gzip"], gzip.compress(JPEG, mtime=0)),
        (["GZip"], gzip.compress(JPEG, mtime=0)),
        (["x-gzip"], gzip.compress(JPEG, mtime=0)),
        (["deflate"], zlib.compress(JPEG)),
        (["deflate"], raw_deflate(JPEG)),
        (["identity"], JPEG),
        (["deflate, gzip"], gzip.compress(zlib.compress(JPEG), mtime=0)),
        (["gzip", "gzip"], gzip.compress(gzip.compress(JPEG, mtime=0), mtime=0)),
        (["gzip"], gzip.compress(JPEG[:900], mtime=0) + gzip.compress(JPEG[900:], mtime=0)),
        (["gzip"], gzip.compress(JPEG, mtime=0) + bytes(1000)),
        # Labels of servers that did not compress.
        (["gzip"], JPEG),
        (["br"], JPEG),
        (["gzip, gzip"], gzip.compress(JPEG, mtime=0)),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_bodies_are_decompressed(site: HostileSite, headers: list[str], body: bytes) -> None:
    assert_whole(answered(site, sent(body, *[f"Content-Encoding: {value}" for value in headers])))


@pytest.mark.parametrize("image", [encoded(picture(), name) for name in ("PNG", "WEBP", "GIF", "BMP")])
@pytest.mark.parametrize("coding", ["gzip", "deflate", "br"])
def test_an_image_is_not_taken_for_compressed(site: HostileSite, image: bytes, coding: str) -> None:
    assert_whole(answered(site, sent(image, f"Content-Encoding: {coding}")), image)


def test_a_compressed_body_may_come_in_chunks(site: HostileSite) -> None:
    body = gzip.compress(JPEG, mtime=0)

    def chunked(exchange: Exchange) -> None:
        exchange.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Encoding: gzip\r\n\r\n")
        for start in range(0, len(body), 7):
            part = body[start : start + 7]
            exchange.raw(b"%x\r\n%b\r\n" % (len(part), part))
        exchange.raw(b"0\r\n\r\n")

    assert_whole(answered(site, chunked))


PACKED = gzip.compress(JPEG, mtime=0)
BOMB = gzip.compress(bytes(5_000_000), mtime=0)


@pytest.mark.parametrize(
    ("headers", "body", "reason", "detail"),
    [
        ("gzip", BOMB, "body_too_large", "over 1000000 bytes"),
        ("deflate", zlib.compress(bytes(5_000_000)), "body_too_large", "over 1000000 bytes"),
        ("gzip, gzip", gzip.compress(BOMB, mtime=0), "body_too_large", "over 1000000 bytes"),
        # Large in between only.
        ("gzip, gzip", gzip.compress(PACKED + bytes(5_000_000), mtime=0), "body_too_large", "over"),
        ("gzip", gzip.compress(b"", mtime=0) * 1000, "bad_response", "over 100 gzip streams"),
        ("gzip, gzip, gzip, gzip, gzip", gzip.compress(JPEG, mtime=0), "bad_response", "5 Content-Encodings"),
        (
            "gzip",
            gzip.compress(JPEG, mtime=0)[:-6] + b"\0" * 6,
            "bad_response",
            "Content-Encoding gzip: Error -3",
        ),
        ("gzip", b"\x1f\x8b" + bytes(500), "bad_response", "Content-Encoding gzip: Error -3"),
        ("deflate", b"<html>not deflated</html>", "bad_response", "Content-Encoding deflate: Error -3"),
        ("gzip", gzip.compress(JPEG, mtime=0)[:-9], "body_truncated", "the gzip stream stops"),
        ("deflate", raw_deflate(JPEG)[:-9], "body_truncated", "the deflate stream stops"),
        ("br", b"\x8b\x02\x80brotli\x03", "bad_response", "Content-Encoding br, which was not asked for"),
        ("gzip, zstd", b"\x28\xb5\x2f\xfd", "bad_response", "Content-Encoding zstd, which was not asked for"),
        ("gzip", b"", "empty_body", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bodies_that_are_not_decompressed(
    site: HostileSite, headers: str, body: bytes, reason: str, detail: str | None
) -> None:
    fetch = answered(site, sent(body, f"Content-Encoding: {headers}"), max_body_bytes=1_000_000)
    assert (fetch.reason, fetch.attempts) == (reason, 3 if reason == "body_truncated" else 1)
    assert fetch.detail is None if detail is None else fetch.detail.startswith(detail)


def test_a_compressed_robots_txt_is_obeyed(site: HostileSite) -> None:
    text = b"User-agent: *\nDisallow: /hop/\n"
    for body in (text, text + b"#\n" * 50_000_000):
        site.robots_txt = sent(gzip.compress(body, 1, mtime=0), "Content-Encoding: gzip")
        fetcher = web(site, robots_txt=True)
        assert end(fetcher.fetch(site.url("/plain.jpg"))) == ("ok", None)
        assert end(fetcher.fetch(site.url("/hop/1"))) == ("opted_out", "robots_txt")


def test_a_robots_txt_shorter_than_it_declares_is_obeyed(site: HostileSite) -> None:
    site.robots_txt = lambda exchange: exchange.send(b"User-agent: *\nDisallow: /hop/\n", length=500)
    fetcher = web(site, robots_txt=True)
    assert end(fetcher.fetch(site.url("/plain.jpg"))) == ("ok", None)
    assert end(fetcher.fetch(site.url("/hop/1"))) == ("opted_out", "robots_txt")


def test_half_a_line_of_robots_txt_is_not_a_rule(site: HostileSite) -> None:
    start = b"User-agent: *\nDisallow: /hop/\n#"
    text = start + b"." * (512_000 - len(start) - 12) + b"\nDisallow: /plain"
    assert len(text) > 512_000 and text[:512_000].endswith(b"\nDisallow: /")
    site.robots_txt = sent(text + b"er/\n")
    fetcher = web(site, robots_txt=True)
    assert end(fetcher.fetch(site.url("/plain.jpg"))) == ("ok", None)
    assert end(fetcher.fetch(site.url("/hop/1"))) == ("opted_out", "robots_txt")


@given(
    body=st.binary(max_size=400),
    codings=st.lists(st.sampled_from([*CODINGS, "raw"]), max_size=4),
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5),
)
def test_any_codings_in_any_pieces(body: bytes, codings: list[str], sizes: list[int]) -> None:
    # An image at no stage, so that all of them are taken for what their label says.
    data = b"\n" + body
    for coding in codings:
        data = raw_deflate(data) if coding == "raw" else CODINGS[coding](data)
    pieces, start = [], 0
    while start < len(data):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(data[start : start + size])
        start += size
    labels = ["deflate" if coding == "raw" else coding for coding in codings]
    try:
        unfolded = b"".join(decompressed(iter(pieces), [", ".join(labels)], 10_000))
    except FetchError as error:
        # A raw stream has no mark of its own: now and then one begins like zlib's, or like an image.
        assert "raw" in codings and error.reason in ("bad_response", "body_truncated")
    else:
        assert unfolded == b"\n" + body or "raw" in codings
