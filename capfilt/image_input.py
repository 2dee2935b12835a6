"""Images as a user has them (paths, encoded bytes, PIL images, arrays), as the encoded bytes that the engines take."""

import io
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from schemas.errors import CapfiltError

ImageInput = str | os.PathLike[str] | bytes | Image.Image | np.ndarray

# Modes that PNG holds without loss.
_PNG_MODES = ("1", "L", "LA", "P", "I;16", "RGB", "RGBA")


def require_several(images: Iterable[ImageInput]) -> None:
    """Reject one image in the place of a list: its characters or bytes would be taken for images."""
    if isinstance(images, (str, bytes, os.PathLike, Image.Image)):
        raise CapfiltError("images: a list of images is expected; put a single one into brackets")


def encoded(image: ImageInput) -> bytes:
    """Return an image as encoded bytes: a file's own, a PIL image or an array as PNG.

    A PIL image keeps its EXIF orientation. One that PIL cannot decode gives no bytes, and so does not decode later.

    Raises:
        CapfiltError: a file cannot be read, or it is none of these kinds.
    """
    match image:
        case bytes():
            return image
        case str() | os.PathLike():
            try:
                return Path(image).read_bytes()
            except OSError as error:
                raise CapfiltError(f"{os.fspath(image)}: cannot be read: {error.strerror}") from error
        case np.ndarray():
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise CapfiltError(f"an image of {image.dtype} {image.shape}: uint8 (H, W, 3) is expected")
            return _as_png(Image.fromarray(image))
        case Image.Image():
            return _as_png(image)
    raise CapfiltError(f"{type(image).__name__} is not an image: give a path, bytes, a PIL image or an array")


def _as_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    try:
        if image.mode not in _PNG_MODES:
            # Mode I is 16-bit grey in 32 bits.
            image = image.convert("I;16" if image.mode == "I" else "RGB")
        image.save(buffer, "PNG", compress_level=1, exif=image.getexif())
    except OSError:  # its file is damaged: PIL reads it only now
        return b""
    return buffer.getvalue()
