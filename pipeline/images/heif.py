"""HEIF files of HEVC (.heic): pillow-heif opens them where it is installed, once their frames are counted.

As with AVIF, the size that the container states need not be that of the frames. Besides, a grid may show one tile many
times, an item may hold more pictures than the one that is shown, and metadata may be packed. Nothing is decoded here.
Section numbers without a letter are those of ISO/IEC 23008-12, with an H those of ITU-T H.265.
"""

import functools
import re
import struct
from collections.abc import Iterator, Sequence

from pipeline.images.iso_boxes import MAX_PARTS, Bits, Fields, boxes, items, meta_boxes

MAGIC = re.compile(rb"....ftyp(?:hei|hev|mif|msf)", re.S)
MISSING = "HEIF, which pip install 'capfilt[heic]' decodes"

Boxes = dict[bytes, tuple[int, int]]

_CODED, _GRID = b"hvc1", b"grid"
# Items that are never decoded: metadata, and how a gain map is to be applied.
_UNDECODED = frozenset((b"Exif", b"mime", b"uri ", b"tmap"))
_SPS = 33
_FIRST_NON_VCL = 32


class UnsupportedHeif(ValueError):
    """Say what kind of HEIF file is not decoded."""


@functools.cache
def can_open() -> bool:
    """Let Pillow open HEIF; return False where pillow-heif is not installed."""
    try:
        from pillow_heif import register_heif_opener
    except ModuleNotFoundError:
        return False
    # The caller's threads are the parallelism; only the image itself is asked for.
    register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)
    return True


def frame_pixels(data: bytes) -> int:
    """Return how many pixels all frames have: of the image, or its tiles, of its alpha, gain map and thumbnails.

    Raises:
        UnsupportedHeif: it is none of one HEVC picture or a grid of them, or its metadata are packed.
        ValueError: the file is damaged, or a video.
    """
    try:
        meta = meta_boxes(data)
        kinds = _item_kinds(data, meta)
        _check_kinds(kinds, _primary(data, meta))
        headers = _decoder_headers(data, meta)
        pixels = {
            number: _item_pixels(item, headers.get(number, ()))
            for number, item in items(data, meta)
            if kinds.get(number) == _CODED
        }
        tiles = _grid_tiles(data, meta, kinds)
        # Each tile as often as grids show it, each other item once.
        once = sum(pixels[number] for number in pixels.keys() - set(tiles))
        return once + sum(pixels.get(tile, 0) for tile in tiles)
    except (struct.error, IndexError) as error:
        raise ValueError("a HEIF file that is damaged") from error


def _item_kinds(data: bytes, meta: Boxes) -> dict[int, bytes]:
    """Return the type of each item that ``iinf`` lists (14496-12, 8.11.6)."""
    kinds: dict[int, bytes] = {}
    start, end = meta.get(b"iinf", (0, 0))
    version = data[start] if end else 0
    for kind, entry, entry_end in boxes(data, start + (8 if version else 6), end):
        fields = Fields(data[:entry_end], entry)
        entry_version = fields.integer(1)
        if kind != b"infe" or entry_version < 2:
            raise ValueError("an item without a type")
        fields.integer(3)
        number = fields.integer(4 if entry_version == 3 else 2)
        fields.integer(2)  # how it is protected
        kinds[number] = fields.octets(4)
        # Name, content type and content encoding, each up to a zero byte.
        texts = data[fields.position : entry_end].split(b"\0")
        if kinds[number] == b"mime" and any(texts[2:3]):
            raise UnsupportedHeif("with packed metadata")
    return kinds


def _primary(data: bytes, meta: Boxes) -> int:
    fields = Fields(data, meta.get(b"pitm", (len(data), 0))[0])
    version = fields.integer(1)
    fields.integer(3)
    return fields.integer(4 if version else 2)


def _check_kinds(kinds: dict[int, bytes], primary: int) -> None:
    if kinds.get(primary) not in (_CODED, _GRID):
        raise UnsupportedHeif(f"of {kinds.get(primary)!r}")
    for kind in kinds.values():
        if kind not in (_CODED, _GRID) and kind not in _UNDECODED:
            raise UnsupportedHeif(f"with an item of {kind!r}")


def _decoder_headers(data: bytes, meta: Boxes) -> dict[int, list[bytes]]:
    """Return the ``hvcC`` properties of each item (14496-12, 8.11.14)."""
    inside = list(boxes(data, *meta.get(b"iprp", (0, 0))))
    properties = [
        data[start:end] if kind == b"hvcC" else b""
        for container, first, last in inside
        if container == b"ipco"
        for kind, start, end in boxes(data, first, last)
    ]
    headers: dict[int, list[bytes]] = {}
    for kind, start, end in inside:
        if kind == b"ipma":
            for number, index in _associations(Fields(data[:end], start)):
                # Properties are counted from one.
                if 0 < index <= len(properties) and properties[index - 1]:
                    headers.setdefault(number, []).append(properties[index - 1])
    return headers


def _associations(fields: Fields) -> Iterator[tuple[int, int]]:
    """Yield (item, property) of each association; the top bit of a property says that it is essential."""
    version, flags = fields.integer(1), fields.integer(3)
    width = 2 if flags & 1 else 1
    for _ in range(fields.integer(4)):
        number = fields.integer(4 if version else 2)
        for _ in range(fields.integer(1)):
            yield number, fields.integer(width) & ((1 << 8 * width - 1) - 1)


def _grid_tiles(data: bytes, meta: Boxes, kinds: dict[int, bytes]) -> list[int]:
    """Return the items that grids are made of, each as often as it is shown (6.6.2.3)."""
    start, end = meta.get(b"iref", (0, 0))
    width, code = (4, "I") if end and data[start] else (2, "H")
    tiles: list[int] = []
    for kind, entry, entry_end in boxes(data, start + 4, end):
        fields = Fields(data[:entry_end], entry)
        if kind != b"dimg" or kinds.get(fields.integer(width)) != _GRID:
            continue
        count = fields.integer(2)
        tiles += struct.unpack(f">{count}{code}", fields.octets(count * width))
        if len(tiles) > MAX_PARTS:
            raise ValueError(f"grids of over {MAX_PARTS:,} tiles")
    if any(kinds.get(tile) != _CODED for tile in tiles):
        raise UnsupportedHeif("of a grid of other than HEVC tiles")
    return tiles


def _item_pixels(item: bytes, headers: Sequence[bytes]) -> int:
    """Return the pixels of all pictures that an item holds, by the largest size that its headers announce."""
    most, pictures, length_bytes = 0, 0, 4
    for header in headers:
        length_bytes = (header[21] & 3) + 1
        most = max([most, *map(_sps_pixels, _header_units(header))])
    fields, count = Fields(item, 0), 0
    while fields.position < len(item):
        unit = fields.octets(fields.integer(length_bytes))
        most = max(most, _sps_pixels(unit))
        # first_slice_segment_in_pic_flag begins a picture (H.7.3.6.1).
        pictures += _unit_type(unit) < _FIRST_NON_VCL and unit[2] >> 7
        count += 1
        if count > MAX_PARTS:
            raise ValueError(f"an item of over {MAX_PARTS:,} units")
    return most * max(1, pictures)


def _header_units(header: bytes) -> Iterator[bytes]:
    """Yield the NAL units of an HEVCDecoderConfigurationRecord (14496-15, 8.3.3.1.2)."""
    fields = Fields(header, 22)
    for _ in range(fields.integer(1)):
        fields.integer(1)
        for _ in range(fields.integer(2)):
            yield fields.octets(fields.integer(2))


def _unit_type(unit: bytes) -> int:
    return unit[0] >> 1 & 63


def _sps_pixels(unit: bytes) -> int:
    """Return the size of the pictures that a sequence parameter set announces (H.7.3.2.2); 0 for another unit."""
    if _unit_type(unit) != _SPS:
        return 0
    # A 3 behind two zero bytes is not part of the content (H.7.3.1.1).
    bits = Bits(unit[2:512].replace(b"\0\0\3", b"\0\0"))
    bits.read(4)  # sps_video_parameter_set_id
    sub_layers = bits.read(3)
    bits.read(1)
    _skip_profiles(bits, sub_layers)
    _exp_golomb(bits)  # sps_seq_parameter_set_id
    if _exp_golomb(bits) == 3:  # chroma_format_idc
        bits.read(1)
    return _exp_golomb(bits) * _exp_golomb(bits)


def _skip_profiles(bits: Bits, sub_layers: int) -> None:
    """Skip profile_tier_level (H.7.3.3): 88 bits of a profile and 8 of a level, for all and for each sub-layer."""
    bits.read(88 + 8)
    present = [(bits.read(1), bits.read(1)) for _ in range(sub_layers)]
    if sub_layers:
        bits.read(2 * (8 - sub_layers))
    for has_profile, has_level in present:
        bits.read(88 * has_profile + 8 * has_level)


def _exp_golomb(bits: Bits) -> int:
    """Return a number coded as ue(v) (H.9.2)."""
    zeros = bits.leading_zeros()
    return (1 << zeros) - 1 + bits.read(zeros)
