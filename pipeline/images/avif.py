"""How many pixels the frames inside an AVIF file have, read from their headers before anything is decoded.

The size that a container states need not be that of the frames inside: libavif decodes them first and scales them
after, and a few kilobytes may hold frames of 268 million pixels. Nothing is decoded here. Section numbers are those
of the AV1 specification.
"""

import struct

from pipeline.images.iso_boxes import Bits, items, meta_boxes

_SEQUENCE_HEADER = 1


def frame_pixels(data: bytes) -> int:
    """Return the sum of the frames' pixels: of the image, of its alpha channel, thumbnail and tiles.

    Raises:
        ValueError: the file is damaged, or a video.
    """
    try:
        return sum(_item_pixels(item) for _, item in items(data, meta_boxes(data)))
    except (struct.error, IndexError) as error:
        raise ValueError("an AVIF file that is damaged") from error


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


def _sequence_size(header: bytes) -> tuple[int, int]:
    """Return max_frame_width and max_frame_height of a sequence header (5.5.1)."""
    bits = Bits(header[:512])
    bits.read(3 + 1)  # seq_profile, still_picture
    if bits.read(1):  # reduced_still_picture_header
        bits.read(5)
    else:
        _skip_operating_points(bits)
    width_bits, height_bits = bits.read(4) + 1, bits.read(4) + 1
    return bits.read(width_bits) + 1, bits.read(height_bits) + 1


def _skip_operating_points(bits: Bits) -> None:
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


def _skip_uvlc(bits: Bits) -> None:
    """Skip a number whose leading zeros say how many bits follow the first one (4.10.3)."""
    bits.read(bits.leading_zeros())
