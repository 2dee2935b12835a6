"""The boxes and items of AVIF and HEIF files (ISO/IEC 14496-12, whose section numbers stand here). Nothing is decoded.

A damaged file raises ValueError, IndexError or struct.error, whatever its bytes.
"""

import struct
from collections.abc import Iterator

# Boxes in a row, items, and the parts of all items: more take seconds to read. libheif takes 1,000 items.
MAX_PARTS = 10_000
# Boxes inside ``meta`` of which a reader may take the first or the last.
_SINGLE = frozenset((b"meta", b"pitm", b"iloc", b"iinf", b"iref", b"iprp", b"idat"))


def boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, start, end) of the contents of each box (4.2)."""
    for _ in range(MAX_PARTS):
        if start + 8 > end:
            return
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
    raise ValueError(f"over {MAX_PARTS:,} boxes")


def meta_boxes(data: bytes) -> dict[bytes, tuple[int, int]]:
    """Return where the contents of each box inside ``meta`` lie, by type. Raises ValueError for a video."""
    outer = _by_type(data, 0, len(data))
    if b"moov" in outer:
        raise ValueError("a file with a video track")
    start, end = outer.get(b"meta", (0, 0))
    return _by_type(data, start + 4, end)


def _by_type(data: bytes, start: int, end: int) -> dict[bytes, tuple[int, int]]:
    places: dict[bytes, tuple[int, int]] = {}
    for kind, first, last in boxes(data, start, end):
        if kind in places and kind in _SINGLE:
            raise ValueError(f"two boxes of {kind!r}")
        places[kind] = first, last
    return places


def items(data: bytes, meta: dict[bytes, tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the bytes of each item that ``iloc`` locates (8.11.3)."""
    if b"iloc" not in meta:
        return
    # Items lie in the file, or in a box of their own.
    idat, _ = meta.get(b"idat", (0, 0))
    fields, bytes_left, parts_left = Fields(data, meta[b"iloc"][0]), len(data), MAX_PARTS
    version = fields.integer(1)
    fields.integer(3)
    sizes = fields.integer(2)
    offset_size, length_size, base_size = sizes >> 12, sizes >> 8 & 15, sizes >> 4 & 15
    index_size = sizes & 15 if version else 0
    for _ in range(fields.integer(4 if version == 2 else 2)):
        number = fields.integer(4 if version == 2 else 2)
        method = fields.integer(2) & 15 if version else 0
        if method > 1:
            raise ValueError("an item that is made of other items' bytes")
        fields.integer(2)  # the file that it lies in
        base = fields.integer(base_size) + (idat if method else 0)
        parts: list[bytes] = []
        count = fields.integer(2)
        parts_left -= 1 + count
        if parts_left < 0:
            raise ValueError(f"items of over {MAX_PARTS:,} parts")
        for _ in range(count):
            fields.integer(index_size)
            start = base + fields.integer(offset_size)
            # Without a length it reaches to the end.
            length = fields.integer(length_size) or len(data)
            parts.append(data[start : start + length])
            bytes_left -= len(parts[-1])
            if bytes_left < 0:
                raise ValueError("a file whose items overlap")
        yield number, b"".join(parts)


class Fields:
    """Reads big-endian integers one after the other."""

    def __init__(self, data: bytes, position: int) -> None:
        self.data, self.position = data, position

    def integer(self, size: int) -> int:
        """Return an integer of ``size`` bytes; 0 of none."""
        return int.from_bytes(self.octets(size))

    def octets(self, size: int) -> bytes:
        """Return the next ``size`` bytes. Raises IndexError where there are fewer."""
        if self.position + size > len(self.data):
            raise IndexError("the file stops within a box")
        self.position += size
        return self.data[self.position - size : self.position]


class Bits:
    """Reads bits, the high ones first."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data), 8 * len(data)

    def read(self, count: int) -> int:
        """Return the next ``count`` bits as a number."""
        self._left -= count
        if self._left < 0:
            raise IndexError("a header that stops")
        return self._value >> self._left & (1 << count) - 1

    def leading_zeros(self) -> int:
        """Read up to the next 1, and return how many zeros stood before it."""
        zeros = 0
        while not self.read(1):
            zeros += 1
        return zeros
