"""HEIC files made for tests: whole ones by pillow-heif, and ones that lie, put together box by box."""

import io
import struct

from PIL import Image

from pipeline.images import heif
from pipeline.images.iso_boxes import boxes, items, meta_boxes

Tile = tuple[bytes, bytes]


def heic(image: Image.Image, **options: object) -> bytes:
    assert heif.can_open()
    file = io.BytesIO()
    image.save(file, "HEIF", **options)
    return file.getvalue()


def tile(side_px: int) -> Tile:
    """One HEVC picture: its decoder's header and its data."""
    data = heic(Image.linear_gradient("L").resize((side_px, side_px)).convert("RGB"), quality=50)
    meta = meta_boxes(data)
    (ipco,) = (span for kind, *span in boxes(data, *meta[b"iprp"]) if kind == b"ipco")
    (header,) = (data[start:end] for kind, start, end in boxes(data, *ipco) if kind == b"hvcC")
    ((_, content),) = items(data, meta)
    return header, content


def grid(one: Tile, tile_px: int, across: int, shown_px: int, *, mime: bytes = b"") -> bytes:
    """``across`` x ``across`` times one tile, in a container that says ``shown_px`` x ``shown_px``."""
    content = bytes((0, 1, across - 1, across - 1)) + struct.pack(">II", shown_px, shown_px)
    properties = [
        _box(b"ispe", struct.pack(">III", 0, shown_px, shown_px)),
        _box(b"hvcC", one[0]),
        _box(b"ispe", struct.pack(">III", 0, tile_px, tile_px)),
    ]
    references = struct.pack(f">HH{across**2}H", 1, across**2, *[2] * across**2)
    entries = [_entry(1, b"grid"), _entry(2, b"hvc1")]
    contents = [content, one[1]]
    if mime:
        entries.append(_entry(3, b"mime", mime))
        contents.append(b"text")
    return _file(entries, contents, properties, [(1, (1,)), (2, (2, 3))], _box(b"dimg", references))


def single(one: Tile, shown_px: int) -> bytes:
    """One picture in a container that says ``shown_px`` x ``shown_px``."""
    properties = [_box(b"hvcC", one[0]), _box(b"ispe", struct.pack(">III", 0, shown_px, shown_px))]
    return _file([_entry(1, b"hvc1")], [one[1]], properties, [(1, (1, 2))])


def resized_header(header: bytes, width: int, height: int) -> bytes:
    """A decoder's header whose sequence parameter set announces another size."""
    units = []
    for unit in heif._header_units(header):
        units.append(_resized(unit, width, height) if heif._unit_type(unit) == 33 else unit)
    arrays = [bytes((unit[0] >> 1 & 63, 0, 1)) + struct.pack(">H", len(unit)) + unit for unit in units]
    return header[:22] + bytes((len(arrays),)) + b"".join(arrays)


def _resized(unit: bytes, width: int, height: int) -> bytes:
    content = unit[2:].replace(b"\0\0\3", b"\0\0")
    bits = "".join(f"{octet:08b}" for octet in content)
    # Behind 4 + 3 + 1 + 96 bits come the number of the set, the chroma format (1), width and height.
    position, numbers = 104, []
    while len(numbers) < 4:
        zeros = bits.index("1", position) - position
        numbers.append(int(bits[position + zeros : position + 2 * zeros + 1], 2) - 1)
        position += 2 * zeros + 1
    changed = bits[:104] + "".join(map(_exp_golomb, [*numbers[:2], width, height])) + bits[position:]
    changed += "0" * (-len(changed) % 8)
    packed = bytes(int(changed[at : at + 8], 2) for at in range(0, len(changed), 8))
    return unit[:2] + packed.replace(b"\0\0", b"\0\0\3")


def _exp_golomb(number: int) -> str:
    return f"{number + 1:b}".rjust(2 * (number + 1).bit_length() - 1, "0")


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def _entry(number: int, kind: bytes, rest: bytes = b"\0") -> bytes:
    # All but the first are hidden: not images of their own.
    return _box(b"infe", struct.pack(">IHH4s", 2 << 24 | (number > 1), number, 0, kind) + rest)


def _file(
    entries: list[bytes],
    contents: list[bytes],
    properties: list[bytes],
    associations: list[tuple[int, tuple[int, ...]]],
    references: bytes = b"",
) -> bytes:
    ipma = struct.pack(">II", 0, len(associations)) + b"".join(
        struct.pack(f">HB{len(indices)}B", number, len(indices), *indices) for number, indices in associations
    )
    start = _box(b"ftyp", b"heic\0\0\0\0mif1heic")

    def meta(offset: int) -> bytes:
        places = b""
        for number, content in enumerate(contents, 1):
            places += struct.pack(">HHHII", number, 0, 1, offset, len(content))
            offset += len(content)
        return _box(
            b"meta",
            bytes(4)
            + _box(b"hdlr", struct.pack(">II4s12xx", 0, 0, b"pict"))
            + _box(b"pitm", struct.pack(">IH", 0, 1))
            + _box(b"iloc", struct.pack(">IHH", 0, 0x4400, len(contents)) + places)
            + _box(b"iinf", struct.pack(">IH", 0, len(entries)) + b"".join(entries))
            + _box(b"iprp", _box(b"ipco", b"".join(properties)) + _box(b"ipma", ipma))
            + (_box(b"iref", bytes(4) + references) if references else b""),
        )

    return start + meta(len(start + meta(0)) + 8) + _box(b"mdat", b"".join(contents))
