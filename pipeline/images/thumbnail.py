"""A small JPEG of an image, for pages that hold many."""

import io

from PIL import Image

from pipeline.images.decode import decode_rgb

_QUALITY = 80


def thumbnail(data: bytes, side_px: int) -> bytes:
    """Return an image as a JPEG whose longer side has at most ``side_px`` pixels; a smaller one keeps its size.

    Raises ImageError where it does not decode.
    """
    image = decode_rgb(data)
    image.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    small = io.BytesIO()
    image.save(small, "JPEG", quality=_QUALITY, optimize=True)
    return small.getvalue()
