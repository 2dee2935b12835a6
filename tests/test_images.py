"""Headers judged without decoding, and pixels right whatever the format."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.images import decode, heif
from pipeline.images.avif import frame_pixels
from pipeline.images.decode import EncodedImage, ImageError, check, decode_rgb, is_plain_jpeg, read_header
from pipeline.images.iso_boxes import boxes, items
from schemas.config import CrawlConfig
from tests import hostile
from tests.heic_files import grid, heic, resized_header, single, tile
from tests.hostile import BAD_IMAGES, JPEG, encoded, picture

# pytest resets the filters that pipeline.images.decode sets.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
ALL = decode.FORMATS
QUARTERS = {(0, 0): (255, 0, 0), (1, 0): (0, 255, 0), (0, 1): (0, 0, 255), (1, 1): (255, 255, 0)}


def assert_quarters(image: Image.Image, tolerance: int = 12) -> None:
    assert image.mode == "RGB"
    for (x, y), colour in QUARTERS.items():
        pixel = image.getpixel((image.width * (1 + 2 * x) // 4, image.height * (1 + 2 * y) // 4))
        assert np.abs(np.subtract(pixel, colour)).max() <= tolerance, (x, y, pixel)


@pytest.mark.parametrize(
    "data",
    [
        JPEG,
        encoded(picture(), "JPEG", progressive=True),
        encoded(picture().convert("CMYK"), "JPEG", quality=95),
        encoded(picture(), "MPO", save_all=True, append_images=[picture()]),
        hostile.rotated_jpeg(3),
        hostile.rotated_jpeg(6),
        hostile.rotated_jpeg(8),
        encoded(picture(), "PNG"),
        encoded(picture().quantize(8), "PNG"),
        encoded(picture().convert("RGBA"), "PNG"),
        hostile.rgb16_png(),
        encoded(picture(), "WEBP", quality=95),
        encoded(picture(), "GIF"),
        encoded(picture(), "BMP"),
        encoded(picture(), "AVIF", quality=90),
        heic(picture(), quality=90),
    ],
    ids=[
        "jpeg",
        "progressive",
        "cmyk",
        "mpo",
        "exif3",
        "exif6",
        "exif8",
        "png",
        "palette",
        "rgba",
        "rgb16",
        "webp",
        "gif",
        "bmp",
        "avif",
        "heic",
    ],
)
def test_every_format_shows_the_same_picture(data: bytes) -> None:
    header = read_header(data)
    assert (header.width, header.height) == (160, 120)
    image = decode_rgb(data, formats=ALL)
    assert image.size == (160, 120)
    assert_quarters(image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {2: 0, 3: 1, 4: 2, 5: 5, 6: 4, 7: 6, 8: 3}  # orientation -> the transposition that it undoes
    transposes = [
        Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
        Image.Transpose.ROTATE_270, Image.Transpose.ROTATE_90, Image.Transpose.TRANSPOSE,
        Image.Transpose.TRANSVERSE,
    ]  # fmt: skip
    stored = picture().transpose(transposes[undo[orientation]]) if orientation in undo else picture()
    # HEIF has properties of its own for it, which pillow-heif makes of the image's EXIF.
    stored.info["exif"] = exif.tobytes()
    for format_name in ("JPEG", "PNG", "WEBP", "AVIF"):
        data = encoded(stored, format_name, exif=exif)
        assert (read_header(data).width, read_header(data).height) == (160, 120)
        assert_quarters(decode_rgb(data, formats=ALL), tolerance=40)
    assert_quarters(decode_rgb(heic(stored), formats=ALL), tolerance=40)


XMP_6 = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_that_of_exif_whatever_xmp_says(format_name: str) -> None:
    def with_xmp(exif: Image.Exif | None) -> bytes:
        options: dict[str, object] = {"exif": exif} if exif else {}
        if format_name == "PNG":
            options["pnginfo"] = PngInfo()
            options["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP_6.decode())
            return encoded(stored, format_name, **options)
        return encoded(stored, format_name, xmp=XMP_6, **options)

    stored = picture()
    assert (read_header(with_xmp(None)).width, read_header(with_xmp(None)).orientation) == (160, 1)
    assert_quarters(decode_rgb(with_xmp(None)), tolerance=40)
    exif = Image.Exif()
    exif[0x0112] = 3
    stored = picture().transpose(Image.Transpose.ROTATE_180)
    assert read_header(with_xmp(exif)).orientation == 3
    assert_quarters(decode_rgb(with_xmp(exif)), tolerance=40)


DTD = b'<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">'
ENTITIES = b'<!DOCTYPE svg [\n<!ENTITY ns "http://www.w3.org/2000/svg">\n<!ENTITY gt "a > b">\n]>'
TGA = encoded(picture(), "TGA")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (hostile.SVG, "SVG"),
        (b'<?xml version="1.0"?>\n' + DTD + b"<svg/>", "SVG"),
        (b'<?xml version="1.0"?><?xml-stylesheet href="a.css"?><!-- a -->' + ENTITIES + b"<svg/>", "SVG"),
        (b"<!-- a --><svg:svg xmlns:svg='http://www.w3.org/2000/svg'/>", "SVG"),
        (gzip.compress(b'<?xml version="1.0"?>' + DTD + b"<svg/>", mtime=0), "SVG"),
        (gzip.compress(hostile.SVG + bytes(1_000_000), mtime=0)[:-900], "SVG"),
        (TGA, "TGA"),
        (TGA[:-26], "TGA"),
        (encoded(picture(), "TGA", compression="tga_rle")[:-26], "TGA"),
        (encoded(picture().convert("L"), "TGA")[:-26], "TGA"),
        (encoded(picture().quantize(8), "TGA"), "TGA"),
        (encoded(picture(), "ICO"), "ICO"),
        (encoded(picture(), "TIFF"), "TIFF"),
    ],
)
def test_formats_are_refused_by_their_name(data: bytes, name: str) -> None:
    with pytest.raises(ImageError) as raised:
        read_header(data)
    assert (raised.value.reason, raised.value.detail) == ("format_refused", name)


@pytest.mark.parametrize(
    "data",
    [
        hostile.HTML,
        b"<!DOCTYPE html PUBLIC '-//W3C//DTD XHTML 1.0//EN'><html><svg/></html>",
        gzip.compress(hostile.HTML, mtime=0),
        b"\x1f\x8b\x08" + bytes(40),
        b"<!---->" * 500,
        b"<?a?>" * 500,
        bytes(200),
    ],
)
def test_what_is_not_an_image(data: bytes) -> None:
    with pytest.raises(ImageError, match="not_an_image"):
        read_header(data)


def test_transparency_lies_on_white() -> None:
    image = decode_rgb(hostile.rgba_png())
    assert image.getpixel((40, 30)) == (255, 0, 0)
    assert image.getpixel((40, 90)) == (255, 255, 255)
    assert decode_rgb(hostile.palette_png()).getpixel((40, 30)) == (255, 255, 255)
    assert decode_rgb(hostile.palette_png()).getpixel((120, 30)) == (0, 255, 0)


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    row = np.asarray(decode_rgb(hostile.grey16_png()))[0, :, 0].astype(int)
    assert row[0] == 0 and row[-1] == 255
    assert abs(row[80] - 128) <= 2


@pytest.mark.parametrize(
    ("data", "reason"),
    [(data, reason) for reason, data in BAD_IMAGES.values() if data],
    ids=[path for path, (_, data) in BAD_IMAGES.items() if data],
)
def test_bad_images_end_with_their_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as raised:
        header = read_header(data)
        check(header, CrawlConfig(formats=ALL, max_pixels=50_000_000, min_size_px=64, max_aspect_ratio=4.0))
        is_plain_jpeg(data, header)
        decode_rgb(data, formats=ALL)
    assert raised.value.reason == reason


@pytest.mark.parametrize("bomb", [hostile.bomb_png, hostile.bomb_jpeg, hostile.bomb_webp, hostile.bomb_gif])
def test_bombs_are_refused_before_a_pixel_is_decoded(bomb: Callable[[], bytes]) -> None:
    data = bomb()
    assert len(data) < 10_000
    before = peak_bytes()
    with pytest.raises(ImageError, match="too_many_pixels"):
        decode_rgb(data, formats=ALL)
    assert peak_bytes() - before < 10_000_000


def peak_bytes(kind: str = "VmHWM") -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{kind}:")[1].split()[0])


def test_images_that_wait_to_be_decoded_take_no_room_for_their_pixels() -> None:
    for data in (hostile.large_rgba_webp(), hostile.large_rgba_avif(), grid(tile(512), 512, 13, 13 * 512)):
        before = peak_bytes("VmSize")
        waiting = [EncodedImage(data) for _ in range(64)]
        assert peak_bytes("VmSize") - before < 100_000_000
        assert waiting[0].srgb(50_000_000).width > 6_000


@pytest.mark.parametrize(("mode", "frames"), [("RGB", 1), ("L", 1), ("RGBA", 2)])
@pytest.mark.parametrize("size", [(64, 64), (101, 37)])
def test_frames_inside_an_avif_are_counted(mode: str, frames: int, size: tuple[int, int]) -> None:
    image = Image.effect_noise(size, 64).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.effect_noise(size, 64))
    assert frame_pixels(encoded(image, "AVIF", speed=10)) == frames * size[0] * size[1]


def test_an_avif_whose_frames_are_larger_than_it_says_is_not_decoded() -> None:
    header = read_header(hostile.lying_avif())
    assert (header.width, header.height) == (100, 100)
    with pytest.raises(ImageError, match="too_many_pixels: 99,969,800 in the frames of 10,000"):
        decode_rgb(hostile.lying_avif(), formats=ALL)


@pytest.mark.parametrize(("mode", "frames"), [("RGB", 1), ("L", 1), ("RGBA", 2)])
def test_frames_inside_a_heic_are_counted(mode: str, frames: int) -> None:
    image = Image.effect_noise((64, 128), 64).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.effect_noise((64, 128), 64))
    assert heif.frame_pixels(heic(image)) == frames * 64 * 128


def test_a_heic_whose_frames_are_larger_than_it_says_is_not_decoded() -> None:
    header, content = one = tile(512)
    assert read_header(single(one, 512)).width == 512
    assert decode_rgb(grid(one, 512, 2, 1024), formats=ALL).size == (1024, 1024)
    # A decoder's header with another size; a tile shown again and again; many pictures in one item.
    huge = resized_header(header, 16_384, 16_384)
    for lying, message in (
        (single((huge, content), 512), "268,435,456 in the frames of 262,144"),
        (grid(one, 512, 13, 100), "44,302,336 in the frames of 10,000"),
        (single((header, 100 * content), 512), "26,214,400 in the frames of 262,144"),
    ):
        with pytest.raises(ImageError, match=f"too_many_pixels: {message}"):
            read_header(lying)


def test_files_of_countless_parts_are_given_up_at_once() -> None:
    empty_box = struct.pack(">I4s", 8, b"free")
    with pytest.raises(ValueError, match="over 10,000 boxes"):
        list(boxes(20_000 * empty_box, 0, 160_000))
    # 65,535 items, of 65,535 parts without a place each.
    located = struct.pack(">IHH", 0, 0, 0xFFFF) + 0xFFFF * struct.pack(">HHH", 1, 0, 0xFFFF)
    with pytest.raises(ValueError, match="items of over 10,000 parts"):
        list(items(located, {b"iloc": (0, len(located))}))


def test_without_pillow_heif_a_heic_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic(picture())
    monkeypatch.setattr(heif, "can_open", lambda: False)
    with pytest.raises(
        ImageError, match=r"format_refused: HEIF, which pip install 'capfilt\[heic\]' decodes"
    ):
        read_header(data)
    with pytest.raises(ImageError, match="format_refused: HEIF$"):
        decode_rgb(data, formats=("JPEG",))


def test_formats_outside_the_config_are_refused() -> None:
    with pytest.raises(ImageError, match="format_refused: GIF"):
        limits = CrawlConfig(formats=("JPEG",), max_pixels=10**6, min_size_px=1, max_aspect_ratio=9)
        check(read_header(encoded(picture(), "GIF")), limits)


def test_plain_jpegs_need_no_decoding_here() -> None:
    for data, plain in (
        (JPEG, True),
        (encoded(picture().convert("L"), "JPEG"), True),
        (hostile.rotated_jpeg(6), False),
        (encoded(picture().convert("CMYK"), "JPEG"), False),
        (encoded(picture(), "PNG"), False),
    ):
        assert is_plain_jpeg(data, read_header(data)) is plain


def test_a_thumbnails_end_is_not_the_pictures() -> None:
    """An EXIF thumbnail is a whole JPEG inside the header; its end marker must not hide a cut."""
    thumbnail = encoded(picture(32, 24), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    whole = JPEG[:2] + segment + JPEG[2:]
    assert is_plain_jpeg(whole, read_header(whole))
    assert not is_plain_jpeg(whole[:-200], read_header(whole[:-200]))
    with pytest.raises(ImageError, match="image_truncated"):
        decode_rgb(whole[:-200])


def test_damage_is_never_an_exception_of_another_kind() -> None:
    noise = np.random.default_rng(0)
    originals = [JPEG, encoded(picture(), "PNG"), encoded(picture(), "WEBP"), encoded(picture(), "GIF"),
                 encoded(picture(), "BMP"), hostile.rotated_jpeg(6), hostile.animated("GIF"),
                 encoded(picture().convert("RGBA"), "AVIF", speed=10), heic(picture().convert("RGBA")),
                 grid(tile(64), 64, 3, 180)]  # fmt: skip
    limits = CrawlConfig(formats=ALL, max_pixels=10**6, min_size_px=1, max_aspect_ratio=100)
    for data in originals:
        for _ in range(150):
            damaged = bytearray(data[: noise.integers(1, len(data) + 1)])
            for position in noise.integers(0, len(damaged), 8):
                damaged[position] = noise.integers(256)
            try:
                header = read_header(bytes(damaged))
                check(header, limits)
                is_plain_jpeg(bytes(damaged), header)
                decode_rgb(bytes(damaged), formats=ALL, max_pixels=10**6)
            except ImageError:
                pass
