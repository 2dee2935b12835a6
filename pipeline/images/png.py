"""The chunks of a PNG file: those that decoding needs, its ICC profile, and whether all pixels are there.

Pillow rejects an image with a long text or profile, or with a wrong checksum of such a chunk, although its pixels may
be intact. Section numbers are those of the PNG specification, third edition.
"""

import struct
import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# Offset and step of the seven passes' pixels, across and down (8.1).
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_STEP_BYTES = 1 << 20
_IEND = b"\0\0\0\0IEND\xaeB`\x82"
# Of the ancillary chunks, those of transparency, animation and orientation (11.3).
_KEPT = frozenset((b"tRNS", b"acTL", b"fcTL", b"eXIf"))


def without_metadata(data: bytes) -> bytes:
    """Return the PNG with only those chunks before its pixels that decoding needs, and none behind them.

    A file that is cut within its pixels stays cut; where only the end chunk is missing, it is added.
    """
    parts, pixels_start, end = [SIGNATURE], None, len(SIGNATURE)
    for kind, start, end in _chunks(data):
        if kind == b"IDAT":
            pixels_start = start if pixels_start is None else pixels_start
        elif pixels_start is not None:
            return b"".join([*parts, data[pixels_start:start], _IEND])
        elif _is_critical(kind) or (kind in _KEPT and _has_right_checksum(data[start:end])):
            parts.append(data[start:end])
    if pixels_start is None:
        return data
    # Cut within a chunk, or before the next one.
    return b"".join([*parts, data[pixels_start:], _IEND if end == len(data) else b""])


def read_profile(data: bytes, max_bytes: int) -> bytes | None:
    """Return the ICC profile (iCCP, 11.3.2.3), or None: there is none, it is damaged or over ``max_bytes``."""
    for kind, start, end in _chunks(data):
        if kind == b"IDAT":
            return None
        if kind == b"iCCP":
            _, _, method_and_profile = data[start + 8 : end - 4].partition(b"\0")
            decompressor = zlib.decompressobj()
            try:
                profile = decompressor.decompress(method_and_profile[1:], max_bytes)
            except zlib.error:
                return None
            return profile if decompressor.eof else None
    return None


def check_complete(data: bytes) -> None:
    """Raise ValueError unless the stream decompresses to as many bytes of pixels as the header says.

    Pillow leaves the missing rows of a shorter stream black.
    """
    pixels = b"".join(data[start + 8 : end - 4] for kind, start, end in _chunks(data) if kind == b"IDAT")
    decompressor, count = zlib.decompressobj(), 0
    while pixels and not decompressor.eof:
        count += len(decompressor.decompress(pixels, _STEP_BYTES))
        pixels = decompressor.unconsumed_tail
    if count < (expected := _pixel_bytes(data)):
        raise ValueError(f"{count} bytes of pixels of {expected}")


def _pixel_bytes(data: bytes) -> int:
    """Return the size of all scan lines with their filter bytes (7.2, 8.1)."""
    # Each pass holds ceil((width - x) / dx) by ceil((height - y) / dy) pixels; a line is a filter byte and its bits,
    # rounded up to bytes.
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    bits = depth * _CHANNELS[colour]
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes]
    return sum(down * (1 + -(-across * bits // 8)) for across, down in sizes if across > 0)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start, end) of the chunks that are there in full."""
    start = len(SIGNATURE)
    while start + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if end > len(data):
            return
        yield kind, start, end
        start = end


def _is_critical(kind: bytes) -> bool:
    return not kind[0] & 0x20


def _has_right_checksum(chunk: bytes) -> bool:
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
