"""Image bytes, judged before they are decoded and decoded within bounds: the only home of decoders here.

What the header alone says (format, pixels, frames, orientation) decides whether pixels are decoded at all.
"""

import io
import re
import struct
import warnings
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# Pillow's warnings of damaged EXIF and of many pixels say nothing that a status does not: every opening below
# bounds the pixels itself, from the header. Its error, at 179M pixels, stays.
warnings.filterwarnings("ignore", module=r"PIL\.")

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 50_000_000

# A JPEG of many empty scans costs minutes of decoding a megabyte; libjpeg-turbo's own tools stop at 500.
_MAX_SCANS = 500
_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"

# Image formats that are recognised only to be refused by name.
_REFUSED = {
    "TIFF": re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+"),
    "SVG": re.compile(
        rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*|<!--.*?-->\s*|<!DOCTYPE[^>]*>\s*)*<svg\b", re.I | re.S
    ),
    "AVIF or HEIF": re.compile(rb"....ftyp(?:avi|hei|hev|mif|msf)", re.S),
    "JPEG XL": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "),
    "JPEG 2000": re.compile(rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  "),
    "ICO": re.compile(rb"\0\0[\1\2]\0"),
    "PSD": re.compile(rb"8BPS"),
}
_KNOWN = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|GIF8[79]a", re.S)
_SNIFFED_BYTES = 4096
# What Pillow raises on damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, struct.error)

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


class ImageError(Exception):
    """Say why bytes are not a usable image: a reason of ``schemas.statuses``, and what was seen."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageHeader:
    """What an image says of itself before any pixel is decoded. Width and height are as displayed."""

    format: str
    mode: str
    width: int
    height: int
    orientation: int
    animated: bool


def probe(data: bytes) -> ImageHeader:
    """Read an image's header. Raises ImageError: not an image, or a format that is never decoded."""
    with _open(data, FORMATS) as image:
        return _header(image)


def check(
    header: ImageHeader,
    *,
    formats: Collection[str],
    max_pixels: int,
    min_size_px: int,
    max_aspect_ratio: float,
) -> None:
    """Raise ImageError unless an image with this header is wanted."""
    width, height = header.width, header.height
    size = f"{width} x {height}"
    if header.format not in formats:
        raise ImageError("format_refused", header.format)
    if width * height > max_pixels:
        raise ImageError("too_many_pixels", size)
    if header.animated:
        raise ImageError("format_refused", f"animated {header.format}")
    if min(width, height) < min_size_px:
        raise ImageError("too_small", size)
    if max(width, height) > max_aspect_ratio * min(width, height):
        raise ImageError("aspect_ratio", size)


def is_plain_jpeg(data: bytes, header: ImageHeader) -> bool:
    """Tell whether any decoder gives the right pixels: grey or colour, upright. Raises ImageError if cut."""
    if header.format != "JPEG":
        return False
    _check_scans(data)
    return header.mode in ("L", "RGB") and header.orientation == 1


def decode_rgb(
    data: bytes, *, formats: Collection[str] = ("JPEG", "PNG", "WEBP"), max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decode an image upright, as 8-bit RGB, transparency on white. Raises ImageError."""
    with _open(data, formats) as image:
        header = _header(image)
        if header.width * header.height > max_pixels:
            raise ImageError("too_many_pixels", f"{header.width} x {header.height}")
        if header.format == "JPEG":
            _check_scans(data)
        try:
            rgb = _to_rgb(_load(image, data))
        except _DAMAGE as error:
            raise ImageError("image_truncated", str(error)) from error
        upright = _UPRIGHT.get(header.orientation)
        return rgb if upright is None else rgb.transpose(upright)


def encode_bmp(image: Image.Image) -> bytes:
    """Encode without loss and almost without work: how decoded pixels reach a library that wants a file."""
    buffer = io.BytesIO()
    image.save(buffer, "BMP")
    return buffer.getvalue()


def _open(data: bytes, formats: Collection[str]) -> Image.Image:
    """Open lazily: Pillow reads the header only. Raises ImageError."""
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:
        start = data[:_SNIFFED_BYTES]
        for name, magic in _REFUSED.items():
            if magic.match(start):
                raise ImageError("format_refused", name) from error
        # Known by its first bytes, and yet not to be opened: it stops, or goes wrong, within the header.
        reason = "image_truncated" if _KNOWN.match(start) else "not_an_image"
        raise ImageError(reason, f"starts with {start[:24]!r}") from error
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", str(error)) from error
    except _DAMAGE as error:
        raise ImageError("image_truncated", str(error)) from error


def _header(image: Image.Image) -> ImageHeader:
    orientation = _orientation(image)
    width, height = image.size if orientation < 5 else image.size[::-1]
    # A phone's MPO is a JPEG with a second one behind it, not an animation.
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
    """Return the EXIF orientation, 1 where there is none or none that can be read."""
    try:
        # The base class's method: the one of PNG decodes the image to look for EXIF behind the pixels.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except _DAMAGE:
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _check_scans(data: bytes) -> None:
    """Raise ImageError for a JPEG that stops early (OpenCV would fill it up with grey) or has too many scans.

    Inside a scan every 0xff is followed by a zero, so that the end marker after the first scan's start is the
    real one; a thumbnail's lies before it.
    """
    if (scans := data.count(_START_OF_SCAN)) > _MAX_SCANS:
        raise ImageError("format_refused", f"JPEG with {scans} scans")
    # From the end, where it is: a search of the whole file would hold the interpreter's lock as long.
    if data.rfind(_END_OF_IMAGE, _first_scan(data)) < 0:
        raise ImageError("image_truncated", "a JPEG without its end")


def _first_scan(data: bytes) -> int:
    """Return where a JPEG's first scan begins, stepping over the segments before it."""
    position = 2
    while data[position : position + 2] != _START_OF_SCAN:
        if data[position : position + 1] != b"\xff" or position + 4 > len(data):
            raise ImageError("image_truncated", "a JPEG without a scan")
        if data[position + 1] == 0xFF:
            position += 1  # fill byte
            continue
        position += 2 + int.from_bytes(data[position + 2 : position + 4])
    return position


def _load(image: Image.Image, data: bytes) -> Image.Image:
    """Decode the pixels of an opened image."""
    if image.format != "WEBP":
        image.load()
        return image
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


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB as a browser would show it on a white page."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        # 16-bit grey; Pillow's own conversion clips at 255 instead of scaling.
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")
