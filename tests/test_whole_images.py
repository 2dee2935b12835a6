"""An image is whole when every block and row of it is there, whatever marker stands at its end."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jobs.bench.fixtures.pictures import jpeg
from pipeline.images.decode import EncodedImage, ImageError, decode_rgb, is_plain_jpeg, read_header
from tests.hostile import encoded, picture, png
from tests.test_images import peak_bytes

EOI = b"\xff\xd9"
PHOTO = Image.open(io.BytesIO(jpeg(1, (323, 241))))
JPEGS = {
    "baseline": encoded(PHOTO, "JPEG", quality=88),
    "444": encoded(PHOTO, "JPEG", subsampling=0),
    "progressive": encoded(PHOTO, "JPEG", progressive=True),
    "restart rows": encoded(PHOTO, "JPEG", restart_marker_rows=1),
    "restart blocks": encoded(PHOTO, "JPEG", restart_marker_blocks=3),
    "progressive restart": encoded(PHOTO, "JPEG", progressive=True, restart_marker_rows=2),
    "grey": encoded(PHOTO.convert("L"), "JPEG"),
    "grey progressive": encoded(PHOTO.convert("L"), "JPEG", progressive=True),
    "cmyk": encoded(PHOTO.convert("CMYK"), "JPEG"),
    "white": encoded(Image.new("RGB", (323, 241), "white"), "JPEG"),
    "mid-grey": encoded(Image.new("L", (323, 241), 128), "JPEG"),
    "one block": encoded(PHOTO.resize((8, 8)), "JPEG"),
}
each_jpeg = pytest.mark.parametrize("data", JPEGS.values(), ids=JPEGS.keys())


def decode(data: bytes) -> Image.Image:
    return EncodedImage(data).srgb(10**7)


def assert_truncated(data: bytes) -> None:
    for decoder in (decode, decode_rgb):
        with pytest.raises(ImageError, match="image_truncated"):
            decoder(data)


@each_jpeg
def test_pixels_are_those_that_pillow_gives(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(np.asarray(decode_rgb(data)), np.asarray(image.convert("RGB")))
        assert np.array_equal(np.asarray(decode(data).convert("RGB")), np.asarray(image.convert("RGB")))


@each_jpeg
def test_a_jpeg_without_its_end_marker_is_whole(data: bytes) -> None:
    expected = np.asarray(decode_rgb(data))
    for whole in (data[:-2], data[:-1], data[:-2] + bytes(40) + EOI, data + b"<html>", data + data):
        assert np.array_equal(np.asarray(decode_rgb(whole)), expected)
    assert not is_plain_jpeg(data[:-2], read_header(data)), "torchvision would refuse it"


@each_jpeg
@pytest.mark.parametrize("missing", [0.5, 30])
def test_a_cut_jpeg_is_not_whole_whatever_its_end(data: bytes, missing: float) -> None:
    """Half of the file, and the last blocks of the last row."""
    cut = data[: -2 - int(missing if missing > 1 else missing * len(data))]
    for end in (b"", b"\xff", EOI, EOI + b"\r\n"):
        assert_truncated(cut + end)


@pytest.mark.parametrize("name", ["progressive", "grey progressive", "progressive restart"])
def test_a_progressive_jpeg_needs_all_of_its_scans(name: str) -> None:
    data = JPEGS[name]
    last_scan = data.rindex(b"\xff\xda")
    tables = data.rindex(b"\xff\xc4")
    for cut in (last_scan, tables, last_scan + 6, data.index(b"\xff\xda")):
        assert_truncated(data[:cut] + EOI)


def test_restart_markers_must_be_complete_and_in_order() -> None:
    data = JPEGS["restart rows"]
    third, fourth = data.index(b"\xff\xd2"), data.index(b"\xff\xd3")
    assert_truncated(data[:third] + data[fourth:])
    assert_truncated(data[:third] + b"\xff\xd5" + data[third + 2 :])
    whole = JPEGS["baseline"]
    middle = len(whole) // 2
    assert_truncated(whole[:middle] + b"\xff\xd0" + whole[middle:])


@pytest.mark.parametrize("name", ["baseline", "444", "grey"])
def test_data_lost_or_inserted_in_the_middle(name: str) -> None:
    data = JPEGS[name]
    middle = len(data) // 2
    assert_truncated(data[:middle] + data[middle + 600 :])
    assert_truncated(data[:middle] + b"Connection reset by peer. " * 20 + data[middle:])
    assert_truncated(data[:middle] + EOI + data[middle:])


def test_an_arithmetic_jpeg_needs_its_end_marker() -> None:
    """Its decoder cannot tell: the data may end early by design."""
    data = JPEGS["grey"].replace(b"\xff\xc0", b"\xff\xc9", 1)
    assert_truncated(data[:-2])


def test_components_that_are_all_called_by_one_number() -> None:
    data = bytearray(JPEGS["baseline"])
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    for index in range(3):
        data[frame + 10 + 3 * index] = data[scan + 5 + 2 * index] = 1
    assert decode_rgb(bytes(data)).size == PHOTO.size
    assert_truncated(bytes(data[:-900]) + EOI)


# -- PNG -----------------------------------------------------------------------------------------------------

ROWS = b"".join(b"\0" + row.tobytes() for row in np.asarray(picture()).reshape(120, -1))
PNG = png(160, 120, 8, 2, ROWS)
IEND = PNG[-12:]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(*chunks: bytes, at_end: bool = False) -> bytes:
    offset = len(PNG) - 12 if at_end else 33
    return PNG[:offset] + b"".join(chunks) + PNG[offset:]


def interlaced(passes: int) -> bytes:
    """``picture()`` in Adam7's order, as far as the first passes go, with a stream that ends well."""
    pixels = np.asarray(picture())
    grid = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    parts = [pixels[y::dy, x::dx] for x, y, dx, dy in grid[:passes]]
    rows = b"".join(b"\0" + row.tobytes() for part in parts for row in part)
    header = struct.pack(">IIBBBBB", 160, 120, 8, 2, 0, 0, 1)
    return PNG[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + IEND


@pytest.mark.parametrize("data", [PNG[:-12], PNG[:-14], PNG[:-5], PNG + b"<html>", interlaced(7)])
def test_a_png_with_all_its_rows_is_whole(data: bytes) -> None:
    assert np.array_equal(np.asarray(decode(data)), np.asarray(picture()))


@pytest.mark.parametrize(
    "data",
    [
        PNG[:-60],
        PNG[:-60] + IEND,
        png(160, 120, 8, 2, ROWS[: len(ROWS) // 2]),
        png(160, 120, 8, 2, ROWS[:-481]),
        interlaced(6),
        interlaced(7)[:-60],
    ],
    ids=["cut", "cut-with-end", "half-of-the-rows", "a-row-less", "a-pass-less", "interlaced-cut"],
)
def test_a_png_that_lacks_rows_is_not_whole(data: bytes) -> None:
    assert_truncated(data)


def test_black_pictures_are_whole() -> None:
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        assert decode(encoded(Image.new(mode, (65, 33)), "PNG")).size == (65, 33)


BOMB = zlib.compress(bytes(64_000_000), 9)
BESIDES = {
    "zTXt": chunk(b"zTXt", b"Comment\0\0" + BOMB),
    "iTXt": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB),
    "iCCP": chunk(b"iCCP", b"wide\0\0" + BOMB),
    "iCCP-broken": chunk(b"iCCP", b"wide\0\0" + b"no zlib"),
    "iCCP-method": chunk(b"iCCP", b"wide\0\7" + b"no zlib"),
    "tEXt": chunk(b"tEXt", b"Comment\0" + b"x" * 3_000_000),
    "checksum": chunk(b"pHYs", bytes(9))[:-1] + b"?",
    "eXIf-checksum": chunk(b"eXIf", b"MM\0*")[:-1] + b"?",
}


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("beside", BESIDES.values(), ids=BESIDES.keys())
def test_pixels_are_sound_beside_any_text_or_profile(beside: bytes, at_end: bool) -> None:
    data, before = with_chunks(beside, at_end=at_end), peak_bytes()
    assert read_header(data).width == 160
    assert np.array_equal(np.asarray(decode(data)), np.asarray(picture()))
    assert peak_bytes() - before < 20_000_000


@pytest.mark.parametrize("format_name", ["WEBP", "GIF", "BMP"])
def test_other_formats_cut(format_name: str) -> None:
    data = encoded(PHOTO, format_name)
    for cut in (data[: len(data) // 2], data[:-200], data[: len(data) // 2] + data[-2:]):
        with pytest.raises(ImageError, match="image_truncated"):
            decode(cut)
