"""Colours are stored as their profile means them, in sRGB; a profile that says nothing sound changes nothing."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipeline.images import colour
from pipeline.images.decode import EncodedImage, decode_rgb
from tests.hostile import encoded, grey16_png, palette_png, picture, rgba_png
from tests.profiles import WIDE, cmyk_profile, grey_profile, lab_profile, rgb_profile
from tests.test_whole_images import chunk, with_chunks

WIDE_PROFILE = rgb_profile()
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# What (220, 30, 30) is in Adobe RGB.
WIDE_RED, RED = (189, 35, 35), (220, 30, 30)
UNFIT = {
    "no profile": b"not a profile",
    "cut": WIDE_PROFILE[:200],
    "cut at the end": WIDE_PROFILE[:-30],
    "zeros": bytes(5_000),
    "grey": grey_profile(1.0),
    "cmyk": cmyk_profile(),
    "lab": lab_profile(),
    "link": WIDE_PROFILE.replace(b"mntr", b"link"),
    "huge": WIDE_PROFILE + bytes(colour.MAX_PROFILE_BYTES),
}


def decode(data: bytes) -> Image.Image:
    return EncodedImage(data).srgb(10**7)


def assert_colour(image: Image.Image, expected: tuple[int, ...], tolerance: int = 4) -> None:
    assert image.mode == "RGB"
    pixel = image.getpixel((image.width // 4, image.height // 4))
    assert np.abs(np.subtract(pixel, expected)).max() <= tolerance, pixel


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
def test_a_wide_gamut_becomes_srgb(format_name: str) -> None:
    data = encoded(Image.new("RGB", (64, 64), WIDE_RED), format_name, icc_profile=WIDE_PROFILE, quality=95)
    assert_colour(decode(data), RED)
    assert_colour(decode_rgb(data), WIDE_RED)


@pytest.mark.parametrize("profile", UNFIT.values(), ids=UNFIT.keys())
def test_a_profile_that_does_not_fit_changes_nothing(profile: bytes) -> None:
    image = Image.new("RGB", (64, 64), WIDE_RED)
    assert colour.to_srgb(image, profile) is image
    if len(profile) < 1_000_000:
        assert_colour(decode(encoded(image, "PNG", icc_profile=profile)), WIDE_RED)
        assert_colour(decode(encoded(image, "JPEG", icc_profile=profile)), WIDE_RED)


def test_versions_of_srgb_leave_every_pixel_as_it_is() -> None:
    """A gamma of 2.2 is not sRGB's curve, though."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    assert colour.to_srgb(image, SRGB) is image
    assert colour.to_srgb(image, rgb_profile(WIDE, gamma=1.0)) is not image


def test_grey() -> None:
    grey = Image.new("L", (64, 64), 64)
    linear = round(255 * (1.055 * (64 / 255) ** (1 / 2.4) - 0.055))
    for format_name in ("JPEG", "PNG"):
        image = decode(encoded(grey, format_name, icc_profile=grey_profile(1.0)))
        assert_colour(image.convert("RGB"), (linear,) * 3)
    transparent = Image.merge("LA", (grey, Image.new("L", grey.size, 0)))
    assert_colour(decode(encoded(transparent, "PNG", icc_profile=grey_profile(1.0))), (255,) * 3)
    assert decode(encoded(grey, "JPEG")).mode == "L"
    deep = grey16_png()
    deep = deep[:33] + chunk(b"iCCP", b"grey\0\0" + zlib.compress(grey_profile(1.0))) + deep[33:]
    assert decode(deep).getpixel((40, 60))[0] > decode(grey16_png()).getpixel((40, 60))[0] + 50


def test_cmyk_with_a_profile_and_without() -> None:
    """Adobe's files have their inks inverted; Pillow turns them."""
    inks = Image.new("CMYK", (64, 64), (255, 0, 0, 0))
    assert_colour(decode(encoded(inks, "JPEG", quality=95)), (0, 255, 255), 8)
    printed = decode(encoded(inks, "JPEG", quality=95, icc_profile=cmyk_profile()))
    assert_colour(printed, (255, 255, 255), 8)
    black = Image.new("CMYK", (64, 64), (0, 0, 0, 255))
    assert_colour(decode(encoded(black, "JPEG", quality=95, icc_profile=cmyk_profile())), (0, 0, 0), 8)
    assert_colour(decode(encoded(inks, "JPEG", quality=95, icc_profile=WIDE_PROFILE)), (0, 255, 255), 8)


def test_palettes_and_transparency_keep_their_colours() -> None:
    def with_profile(data: bytes) -> Image.Image:
        with Image.open(io.BytesIO(data)) as image:
            return decode(encoded(image, "PNG", icc_profile=WIDE_PROFILE, **{
                name: image.info[name] for name in ("transparency",) if name in image.info}))  # fmt: skip

    assert with_profile(rgba_png()).getpixel((40, 90)) == (255, 255, 255)
    assert with_profile(palette_png()).getpixel((40, 30)) == (255, 255, 255)
    palette = Image.new("RGB", (64, 64), WIDE_RED).quantize(4)
    assert_colour(decode(encoded(palette, "PNG", icc_profile=WIDE_PROFILE)), RED)


def test_a_png_profile_is_read_within_bounds() -> None:
    data = with_chunks(chunk(b"iCCP", b"wide\0\0" + zlib.compress(WIDE_PROFILE + bytes(30_000_000))))
    assert np.array_equal(np.asarray(decode(data)), np.asarray(picture()))
