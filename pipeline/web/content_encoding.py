"""Content-Encoding: bodies that are compressed although that was not asked for, decompressed in small steps.

Each step yields 64 KiB at most, so that ``bounded`` can reject a small body that decompresses to gigabytes. Some
servers label images that they did not compress: a body that begins like an image is passed on unchanged.
"""

import itertools
import zlib
from collections.abc import Iterator, Sequence

from pipeline.web.urls import FetchError

_STEP_BYTES = 1 << 16
_GZIP_MAGIC = b"\x1f\x8b"
_IMAGE_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM")
_HEAD_BYTES = 4
_MAX_CODINGS = 4
# A gzip body may be several streams in a row.
_MAX_STREAMS = 100
_GZIP, _ZLIB, _RAW_DEFLATE = 31, 15, -15
_ALIASES = {"x-gzip": "gzip"}


def decompressed(chunks: Iterator[bytes], headers: Sequence[str], max_bytes: int) -> Iterator[bytes]:
    """Undo the Content-Encoding of a body.

    Args:
        headers: the values of the headers of that name, each one coding or several with commas between.
        max_bytes: of the output of each coding, intermediate ones included.

    Raises:
        FetchError: body_too_large, body_truncated, or bad_response: a coding that is unknown, or broken.
    """
    names = (name.strip().lower() for value in headers for name in value.split(","))
    codings = [_ALIASES.get(name, name) for name in names if name not in ("", "identity")]
    if len(codings) > _MAX_CODINGS:
        raise FetchError("bad_response", f"{len(codings)} Content-Encodings", again=False)
    # The last one named was applied last.
    for coding in reversed(codings):
        chunks = bounded(_undone(chunks, coding), max_bytes)
    return chunks


def bounded(chunks: Iterator[bytes], max_bytes: int) -> Iterator[bytes]:
    """Yield the chunks; raise FetchError once they are more than ``max_bytes``."""
    received = 0
    for chunk in chunks:
        received += len(chunk)
        if received > max_bytes:
            raise FetchError("body_too_large", f"over {max_bytes} bytes (crawl.max_body_bytes)")
        yield chunk


def _undone(chunks: Iterator[bytes], coding: str) -> Iterator[bytes]:
    head = b""
    while len(head) < _HEAD_BYTES and (chunk := next(chunks, b"")):
        head += chunk
    chunks = itertools.chain([head], chunks)
    if not head or head.startswith(_IMAGE_MAGIC):
        return chunks
    match coding:
        case "gzip":
            return _inflated(chunks, coding, _GZIP) if head.startswith(_GZIP_MAGIC) else chunks
        case "deflate":
            # By RFC 9110, deflate is zlib's format (RFC 1950); some servers omit its header of two bytes, whose value
            # is a multiple of 31 with method 8 in the low bits.
            has_header = head[0] & 0x0F == 8 and int.from_bytes(head[:2], "big") % 31 == 0
            return _inflated(chunks, coding, _ZLIB if has_header else _RAW_DEFLATE)
    raise FetchError("bad_response", f"Content-Encoding {coding[:40]}, which was not asked for", again=False)


def _inflated(chunks: Iterator[bytes], coding: str, window_bits: int) -> Iterator[bytes]:
    streams, engine, data = 1, zlib.decompressobj(window_bits), b""
    try:
        for chunk in chunks:
            data += chunk
            while len(data) >= (len(_GZIP_MAGIC) if engine.eof else 1):
                if engine.eof:
                    # Another gzip stream may follow; anything else behind a stream is ignored.
                    if window_bits != _GZIP or not data.startswith(_GZIP_MAGIC):
                        data = b""
                        break
                    streams, engine = streams + 1, zlib.decompressobj(window_bits)
                    if streams > _MAX_STREAMS:
                        raise FetchError("bad_response", f"over {_MAX_STREAMS} gzip streams", again=False)
                if out := engine.decompress(data, _STEP_BYTES):
                    yield out
                data = engine.unused_data if engine.eof else engine.unconsumed_tail
        if out := engine.flush():
            yield out
    except zlib.error as error:
        raise FetchError("bad_response", f"Content-Encoding {coding}: {error}", again=False) from error
    if not engine.eof:
        raise FetchError("body_truncated", f"the {coding} stream stops before its end")
