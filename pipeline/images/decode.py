"""Decoding of images: the header is checked first, then the pixels are decoded within bounds.

Format, number of pixels, frames and orientation, all from the header, decide whether pixels are decoded at all.
"""

import contextlib
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from PIL import AvifImagePlugin, ExifTags, Image, ImageFile, UnidentifiedImageError

from pipeline.images import avif, heif, jpeg, png
from pipeline.images.colour import MAX_PROFILE_BYTES, to_srgb
from schemas.config import MAX_PIXELS, CrawlConfig
from schemas.statuses import SampleError

# Pillow's warnings of damaged EXIF and of many pixels are redundant: every function below bounds the pixels itself,
# from the header. Pillow's error at 179M pixels stays.
warnings.filterwarnings("ignore", module=r"PIL\.")

# The caller's threads are the parallelism, and each of libavif's would hold frames of its own.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1
# OpenCV's own limit of pixels, which it reads when it is imported: as Pillow's.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "178956970")

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "HEIF")
_THUMBNAIL_QUALITY = 80
_THUMBNAIL_PIXELS = 1_000_000

# 56 bits of ones, each byte stuffed: as many as libjpeg may read ahead of the last block. No Huffman code is all ones,
# and an attempt to decode them takes 17 bits.
_ONES = b"\xff\0" * 7
# Some cameras write a byte or two more than their blocks need.
_SPARE_BYTES = 4

# Image formats that are recognised only to be refused by name.
_UNSUPPORTED = {
    "TIFF": re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+"),
    # A DTD names the document's element. The possessive "*+" keeps many comments from taking exponential time.
    "SVG": re.compile(
        rb"(?:\xef\xbb\xbf)?\s*(?:<\?.*?\?>\s*|<!--.*?-->\s*)*+(?:<!DOCTYPE\s+|<)(?:\w+:)?svg\b", re.I | re.S
    ),
    "HEIF": heif.MAGIC,
    "JPEG XL": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "),
    "JPEG 2000": re.compile(rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  "),
    "ICO": re.compile(rb"\0\0[\1\2]\0(?!\0\0)"),
    # Without a magic number: no palette, a true-colour or grey type, an origin and a size, whole bytes a pixel.
    "TGA": re.compile(rb".\0[\2\3\x0a\x0b]\0\0\0\0.{9}[\x08\x10\x18\x20][\0-\x3f]", re.S),
    "PSD": re.compile(rb"8BPS"),
}
_KNOWN = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|GIF8[79]a|....ftypavi[fs]", re.S)
_SNIFFED_BYTES = 4096
_GZIP = b"\x1f\x8b\x08"
_TGA_FOOTER = b"TRUEVISION-XFILE.\0"
# What Pillow raises on damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, RuntimeError,
           struct.error)  # fmt: skip

# What turns an image with an EXIF orientation upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(SampleError):
    """Say why bytes are not a usable image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageHeader:
    """What an image's header says. Width and height are as displayed."""

    format: str
    mode: str
    width: int
    height: int
    orientation: int
    animated: bool


class EncodedImage:
    """An image whose header is read at once, and whose pixels are decoded, once, when they are asked for.

    Raises ImageError: not an image, or none of the formats.
    """

    def __init__(self, data: bytes, formats: Collection[str] = FORMATS) -> None:
        self._data = data
        self._image: ImageFile.ImageFile | None = _open(data, formats)
        self.header = _header(self._image)
        if self.header.format == "WEBP":
            # Eight bytes a pixel of address space, and OpenCV decodes the pixels: many images may wait for that.
            self._image._decoder = None  # type: ignore[attr-defined]

    def rgb(self, max_pixels: int) -> Image.Image:
        """Decode upright, as 8-bit RGB, transparency on white, and leave the ICC profile aside. Raises ImageError."""
        image, _ = self._decode(max_pixels)
        return _upright(_on_white(_to_8_bit(image)), self.header)

    def jpeg_scale(self, at_most: float) -> int:
        """Return how many times smaller a JPEG can be decoded: 8, 4 or 2, no more than ``at_most``; else 1.

        A side that is no multiple of it ends in a part of a pixel. That must be the last one: where EXIF turns the
        image, the sides must be multiples.
        """
        header = self.header
        if header.format != "JPEG":
            return 1
        turned = header.orientation != 1
        exact = [
            scale for scale in (8, 4, 2) if not turned or header.width % scale == header.height % scale == 0
        ]
        return next((scale for scale in exact if scale <= at_most), 1)

    def srgb(self, max_pixels: int, jpeg_scale: int = 1) -> Image.Image:
        """Decode as ``rgb`` does, and convert to sRGB. A grey JPEG stays grey. Raises ImageError.

        ``max_pixels`` is of the whole image, also where it is decoded smaller.
        """
        image, profile = self._decode(max_pixels, jpeg_scale)
        image = _to_8_bit(image)
        if image.mode == "LA":
            grey, alpha = image.split()
            image = to_srgb(grey, profile).convert("RGB")
            image.putalpha(alpha)
        image = to_srgb(image, profile)
        if image.mode == "L" and self.header.format == "JPEG" and self.header.orientation == 1:
            return image
        return _upright(_on_white(image), self.header)

    def _decode(self, max_pixels: int, jpeg_scale: int = 1) -> tuple[Image.Image, bytes | None]:
        """Decode every pixel; return the image as it is stored, and its ICC profile. Raises ImageError."""
        header, data = self.header, self._data
        if header.width * header.height > max_pixels:
            raise ImageError("too_many_pixels", f"{header.width} x {header.height}")
        # Not kept: the caller converts the pixels, and two copies of a big image count.
        image, self._image = self._image, None
        assert image is not None, "decoded twice"
        if jpeg_scale > 1:
            image.draft(None, (image.width // jpeg_scale, image.height // jpeg_scale))
        is_png = header.format == "PNG"
        profile = png.read_profile(data, MAX_PROFILE_BYTES) if is_png else image.info.get("icc_profile")
        try:
            return _load(image, header.format, data), profile
        except _DAMAGE as error:
            raise ImageError("image_truncated", str(error)) from error


def read_header(data: bytes) -> ImageHeader:
    """Read an image's header. Raises ImageError: not an image, or a format that is never decoded."""
    return EncodedImage(data).header


def check(header: ImageHeader, limits: CrawlConfig) -> None:
    """Raise ImageError unless an image with this header is one that a crawl accepts."""
    width, height = header.width, header.height
    size = f"{width} x {height}"
    if header.format not in limits.formats:
        raise ImageError("format_refused", header.format)
    if width * height > limits.max_pixels:
        raise ImageError("too_many_pixels", size)
    if header.animated:
        raise ImageError("format_refused", f"animated {header.format}")
    if min(width, height) < limits.min_size_px:
        raise ImageError("too_small", size)
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise ImageError("aspect_ratio", size)


def is_plain_jpeg(data: bytes, header: ImageHeader) -> bool:
    """Tell whether any JPEG decoder gives the right pixels: grey or RGB, upright, whole. Raises ImageError if cut."""
    if header.format != "JPEG":
        return False
    scans = _read_scans(data)
    return scans.has_end_marker and header.mode in ("L", "RGB") and header.orientation == 1


def decode_rgb(
    data: bytes, *, formats: Collection[str] = ("JPEG", "PNG", "WEBP"), max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decode an image upright, as 8-bit RGB, transparency on white. Raises ImageError.

    The ICC profile is ignored, as other libraries do and as published results were computed.
    """
    return EncodedImage(data, formats).rgb(max_pixels)


def thumbnail(data: bytes, side_px: int) -> bytes:
    """Return an image as a JPEG whose longer side has at most ``side_px`` pixels; a smaller one keeps its size.

    Raises ImageError where it does not decode.
    """
    image = decode_rgb(data)
    image.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_THUMBNAIL_QUALITY, optimize=True)
    return buffer.getvalue()


def _open(data: bytes, formats: Collection[str]) -> ImageFile.ImageFile:
    """Open lazily: Pillow reads the header only. Raises ImageError."""
    file = png.without_metadata(data) if data.startswith(png.SIGNATURE) else data
    try:
        return Image.open(io.BytesIO(file), formats=[name for name in formats if name != "HEIF"])
    except UnidentifiedImageError as error:
        if heif.MAGIC.match(data) and "HEIF" in formats:
            return _open_heif(data)
        if name := _unsupported_format(data):
            raise ImageError("format_refused", name) from error
        # A known format that Pillow cannot open is cut or damaged within its header.
        reason = "image_truncated" if _KNOWN.match(data) else "not_an_image"
        raise ImageError(reason, f"starts with {data[:24]!r}") from error
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", str(error)) from error
    except _DAMAGE as error:
        raise ImageError("image_truncated", str(error)) from error


def _open_heif(data: bytes) -> ImageFile.ImageFile:
    """Open a HEIF file, once its frames are counted: to open it already unpacks some of it. Raises ImageError."""
    if not heif.can_open():
        raise ImageError("format_refused", heif.MISSING)
    try:
        frame_pixels = heif.frame_pixels(data)
        image = Image.open(io.BytesIO(data), formats=["HEIF"])
    except heif.UnsupportedHeif as error:
        raise ImageError("format_refused", f"HEIF {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError("image_truncated", "libheif cannot open it") from error
    except _DAMAGE as error:
        raise ImageError("image_truncated", str(error)) from error
    _check_frames(frame_pixels, image.width * image.height)
    return image


def _unsupported_format(data: bytes) -> str | None:
    """Return the name of a known image format that is not supported; None for unknown bytes."""
    start = data[:_SNIFFED_BYTES]
    if start.startswith(_GZIP):
        with contextlib.suppress(zlib.error):
            start = zlib.decompressobj(wbits=31).decompress(data, _SNIFFED_BYTES)
        return "SVG" if _UNSUPPORTED["SVG"].match(start) else None
    if data.endswith(_TGA_FOOTER):
        return "TGA"
    return next((name for name, magic in _UNSUPPORTED.items() if magic.match(start)), None)


def _header(image: Image.Image) -> ImageHeader:
    orientation = _orientation(image)
    width, height = image.size if orientation < 5 else image.size[::-1]
    # An MPO, from phones, is a JPEG followed by another one, not an animation.
    is_mpo = image.format == "MPO"
    try:
        animated = not is_mpo and bool(getattr(image, "is_animated", False))
    except _DAMAGE as error:
        raise ImageError("image_truncated", str(error)) from error
    return ImageHeader(
        format="JPEG" if is_mpo else str(image.format),
        mode=image.mode,
        width=width,
        height=height,
        orientation=orientation,
        animated=animated,
    )


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 where there is none or none that can be read.

    Pillow's own ``getexif`` falls back to XMP's. Browsers do not: image editors that rotate the pixels leave it stale.
    """
    if not (encoded := image.info.get("exif")):
        return 1
    exif = Image.Exif()
    try:
        exif.load(encoded)
        orientation = exif.get(ExifTags.Base.Orientation, 1)
    except _DAMAGE:
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _load(image: ImageFile.ImageFile, format_name: str, data: bytes) -> Image.Image:
    """Decode the pixels of an opened image. Raises ImageError, or what Pillow raises, unless all are there."""
    match format_name:
        case "JPEG":
            _load_jpeg(image, data, _read_scans(data))
        case "WEBP":
            return _load_webp(image, data)
        case "AVIF":
            _check_frames(avif.frame_pixels(data), image.width * image.height)
            image.load()
        case "PNG":
            image.load()
            # Pillow leaves missing rows zero: a zero last row may be real or missing, which the data decides.
            last_row = image.crop((0, image.height - 1, image.width, image.height))
            if not last_row.getbbox(alpha_only=False):
                png.check_complete(data)
        case _:
            image.load()
    return image


def _read_scans(data: bytes) -> jpeg.JpegScans:
    """Return the scans of a JPEG. Raises ImageError: some are missing, or there are too many."""
    try:
        scans = jpeg.read_scans(data)
        if scans.count > jpeg.MAX_SCANS:
            raise ImageError("format_refused", f"JPEG with over {jpeg.MAX_SCANS} scans")
        scans.check_complete()
    except jpeg.JpegError as error:
        raise ImageError("image_truncated", str(error)) from error
    return scans


class _JpegFeed:
    """Pillow's decoder of one JPEG, fed in pieces: at the end of a piece it waits for more."""

    def __init__(self, image: ImageFile.ImageFile) -> None:
        ((name, extents, _, arguments),) = image.tile
        # RGBX is how Pillow holds RGB in memory: libjpeg-turbo writes it as it is, so that no line is converted.
        if arguments == ("RGB", ""):
            arguments = ("RGBX", "")
        image.load_prepare()
        self._decoder = Image._getdecoder(image.mode, name, arguments, image.decoderconfig)
        self._decoder.setimage(image.im, extents)
        self.unread = b""
        self.finished = False

    def feed(self, piece: bytes | memoryview) -> None:
        """Decode as far as the pieces so far allow. Raises OSError."""
        data = self.unread + piece if self.unread else piece
        consumed, error = self._decoder.decode(data)
        if error < 0:
            raise OSError("libjpeg does not decode it")
        self.finished = consumed < 0
        self.unread = b"" if self.finished else bytes(data[consumed:])

    def close(self) -> None:
        self._decoder.cleanup()


def _load_jpeg(image: ImageFile.ImageFile, data: bytes, scans: jpeg.JpegScans) -> None:
    """Decode a JPEG. Raises OSError unless every block of it is there.

    At a marker, libjpeg fills missing blocks with grey and only counts a warning, which Pillow does not show. Where
    data end without a marker it waits for more. So the decoder gets the data without the end marker, and a few bytes
    to read ahead: it finishes if nothing is missing, or less than two blocks.
    """
    feed = _JpegFeed(image)
    try:
        if scans.is_arithmetic:
            # The arithmetic decoder cannot wait, and its data may end early by design (T.81, D.1.8): it is fed whole,
            # if there is an end marker.
            feed.feed(data if scans.has_end_marker else b"")
        elif scans.is_one_scan:
            _feed_one_scan(feed, memoryview(data)[: scans.data_end])
        else:
            _feed_several_scans(feed, data[: scans.data_end])
        if not feed.finished:
            raise OSError("the JPEG's data stop before its last block")
    finally:
        feed.close()
    image.tile = []


def _feed_one_scan(feed: _JpegFeed, data: memoryview) -> None:
    feed.feed(data[:-_SPARE_BYTES])
    if not feed.finished:
        feed.feed(bytes(data[-_SPARE_BYTES:]) + _ONES)
    elif len(set(data[-8:])) > 1:
        # The rest is not padding: blocks were decoded from wrong positions.
        raise OSError("the JPEG's data go on behind its last block")


def _feed_several_scans(feed: _JpegFeed, data: bytes) -> None:
    """Feed all scans; libjpeg decodes nothing before the end marker.

    Behind the last block it looks for a marker and reads whatever comes at once. Within the blocks it reads as many
    bytes at a time as its bit buffer holds, so that of two single ones at least one stays unread.
    """
    feed.feed(data + _ONES)
    for _ in range(2):
        feed.feed(_ONES[:2])
        if feed.unread:
            return
    feed.feed(jpeg.END_OF_IMAGE)


def _check_frames(frame_pixels: int, image_pixels: int) -> None:
    """Raise ImageError where the frames inside a file exceed what the image, its alpha and a gain map account for."""
    if frame_pixels > 3 * image_pixels + _THUMBNAIL_PIXELS:
        raise ImageError("too_many_pixels", f"{frame_pixels:,} in the frames of {image_pixels:,}")


def _load_webp(image: Image.Image, data: bytes) -> Image.Image:
    # Pillow's WebP decoder takes 16 bytes a pixel, 0.8 GB within our limit; OpenCV's takes 4.
    import cv2

    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ImageError("image_truncated", str(error)) from error
    if pixels is None or pixels.shape[:2] != image.size[::-1]:
        raise ImageError("image_truncated", "OpenCV cannot decode it")
    mode, order = ("RGBA", "BGRA") if pixels.shape[2] == 4 else ("RGB", "BGR")
    return Image.frombuffer(mode, image.size, pixels, "raw", order, 0, 1)


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Convert any mode to one of L, LA, RGB, RGBA and CMYK."""
    if image.mode.startswith("I;16") or image.mode == "I":
        # 16-bit grey; Pillow's own conversion clips at 255 instead of scaling.
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("PA", "La", "RGBa"):
        return image.convert("RGBA")
    return image if image.mode in ("L", "LA", "RGB", "RGBA", "CMYK") else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """Convert to RGB as a browser would show it on a white page."""
    if image.mode not in ("LA", "RGBA"):
        return image if image.mode == "RGB" else image.convert("RGB")
    # Converted only if need be: the copy of a big image counts.
    image = image.convert("RGBA") if image.mode == "LA" else image
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def _upright(image: Image.Image, header: ImageHeader) -> Image.Image:
    transposition = _UPRIGHT.get(header.orientation)
    return image if transposition is None else image.transpose(transposition)
