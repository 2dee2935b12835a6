"""How many pixels the frames inside an AVIF file have, read from their headers before anything is decoded.

The size that a container states need not be that of the frames inside: libavif decodes them first and scales them
after, and a few kilobytes may hold frames of 268 million pixels. Nothing is decoded here. Section numbers are those
of ISO/IEC 14496-12 for boxes, and of the AV1 specification for what is inside.
"""

import struct
from collections.abc import Iterator

_SEQUENCE_HEADER = 1


def frame_pixels(data: bytes) -> int:
    """Return the sum of the frames' pixels: of the image, of its alpha channel, thumbnail and tiles.

    Raises:
        ValueError: the file is damaged, or a video.
    """
    try:
        return sum(_item_pixels(item) for item in _items(data))
    except (struct.error, IndexError) as error:
        raise ValueError("an AVIF file that is damaged") from error


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, start, end) of the contents of each box (4.2)."""
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        header = 8
        if size == 1:
            (size,), header = struct.unpack_from(">Q", data, start + 8), 16
        # A size of zero reaches to the end.
        box_end = min(start + size, end) if size else end
        if box_end < start + header:
            raise IndexError("a box without a size")
        yield kind, start + header, box_end
        start = box_end


def _items(data: bytes) -> Iterator[bytes]:
    """Yield the bytes of each item that ``meta`` locates (8.11.3)."""
    boxes = {kind: (start, end) for kind, start, end in _boxes(data, 0, len(data))}
    if b"moov" in boxes:
        raise ValueError("an AVIF file with a video track")
    start, end = boxes.get(b"meta", (0, 0))
    inside = {kind: start for kind, start, _ in _boxes(data, start + 4, end)}
    if b"iloc" in inside:
        # Items lie in the file, or in a box of their own.
        yield from _located(data, inside[b"iloc"], inside.get(b"idat", 0))


def _located(data: bytes, position: int, idat: int) -> Iterator[bytes]:
    reader, left = _Fields(data, position), len(data)
    version = reader.integer(1)
    reader.integer(3)
    sizes = reader.integer(2)
    offset_size, length_size, base_size = sizes >> 12, sizes >> 8 & 15, sizes >> 4 & 15
    index_size = sizes & 15 if version else 0
    for _ in range(reader.integer(4 if version == 2 else 2)):
        reader.integer(4 if version == 2 else 2)  # the item's number
        in_idat = version > 0 and reader.integer(2) & 15 == 1
        reader.integer(2)  # the file that it lies in
        base = reader.integer(base_size) + (idat if in_idat else 0)
        parts: list[bytes] = []
        for _ in range(reader.integer(2)):
            reader.integer(index_size)
            start = base + reader.integer(offset_size)
            # Without a length it reaches to the end.
            length = reader.integer(length_size) or len(data)
            parts.append(data[start : start + length])
            left -= len(parts[-1])
            if left < 0:
                raise ValueError("an AVIF file whose items overlap")
        yield b"".join(parts)


class _Fields:
    """Reads big-endian integers one after the other."""

    def __init__(self, data: bytes, position: int) -> None:
        self._data, self._position = data, position

    def integer(self, size: int) -> int:
        """Return an integer of ``size`` bytes; 0 of none."""
        if self._position + size > len(self._data):
            raise IndexError("the file stops within a box")
        self._position += size
        return int.from_bytes(self._data[self._position - size : self._position])


def _item_pixels(item: bytes) -> int:
    """Return the most pixels that a sequence header of an item announces; 0 for an item that is not AV1 (5.3)."""
    most, start = 0, 0
    while start < len(item):
        # obu_forbidden_bit, obu_type (4), obu_extension_flag, obu_has_size_field, obu_reserved_1bit.
        header = item[start]
        start += 2 if header & 4 else 1
        size = len(item) - start
        if header & 2:
            size, start = _leb128(item, start)
        if header >> 3 & 15 == _SEQUENCE_HEADER:
            width, height = _sequence_size(item[start : start + size])
            most = max(most, width * height)
        start += size
    return most


def _leb128(data: bytes, position: int) -> tuple[int, int]:
    """Return a number of seven bits a byte, the low ones first (4.10.5), and where it ends."""
    value = 0
    for index in range(8):
        octet = data[position + index]
        value |= (octet & 127) << 7 * index
        if octet < 128:
            return value, position + index + 1
    raise IndexError("a number of over eight bytes")


class _Bits:
    """Reads bits, the high ones first."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data), 8 * len(data)

    def read(self, count: int) -> int:
        """Return the next ``count`` bits as a number."""
        self._left -= count
        if self._left < 0:
            raise IndexError("a sequence header that stops")
        return self._value >> self._left & (1 << count) - 1


def _sequence_size(header: bytes) -> tuple[int, int]:
    """Return max_frame_width and max_frame_height of a sequence header (5.5.1)."""
    bits = _Bits(header[:512])
    bits.read(3 + 1)  # seq_profile, still_picture
    if bits.read(1):  # reduced_still_picture_header
        bits.read(5)
    else:
        _skip_operating_points(bits)
    width_bits, height_bits = bits.read(4) + 1, bits.read(4) + 1
    return bits.read(width_bits) + 1, bits.read(height_bits) + 1


def _skip_operating_points(bits: _Bits) -> None:
    delay_bits = 0
    if bits.read(1):  # timing_info (5.5.3)
        bits.read(32 + 32)
        if bits.read(1):
            _skip_uvlc(bits)
        if bits.read(1):  # decoder_model_info (5.5.4)
            delay_bits = bits.read(5) + 1
            bits.read(32 + 5 + 5)
    has_display_delay = bits.read(1)
    for _ in range(bits.read(5) + 1):
        bits.read(12)  # operating_point_idc
        if bits.read(5) > 7:  # seq_level_idx
            bits.read(1)
        if delay_bits and bits.read(1):  # operating_parameters_info (5.5.5)
            bits.read(2 * delay_bits + 1)
        if has_display_delay and bits.read(1):
            bits.read(4)


def _skip_uvlc(bits: _Bits) -> None:
    """Skip a number whose leading zeros say how many bits follow the first one (4.10.3)."""
    zeros = 0
    while not bits.read(1):
        zeros += 1
    bits.read(zeros)
