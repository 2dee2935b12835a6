"""The image that a crawl stores: resized and encoded with img2dataset's semantics, byte for byte as its Resizer does.

Its Resizer itself is not called: it takes encoded files only, and it sends the descriptors 1 and 2 of the whole
process to /dev/null around each image, which loses the output of other threads.
"""

from typing import Literal

import cv2
import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.images.decode import ImageError

ResizeMode = Literal["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"]
# Of these modes the longer side becomes the target size, of the others the shorter one.
_BY_LONGER_SIDE = ("border", "keep_ratio_largest")
_WHITE = (255, 255, 255)
# Decoded smaller, a JPEG keeps at least so many times the target. At once the target, lettering lies 26 dB off what
# full decoding gives; at twice 32 dB at worst, about the loss of the stored JPEG itself (`capfilt bench jpeg-scaling`).
_SCALED_MARGIN = 2


class Resizer:
    """Resizes decoded images and encodes them as JPEG. Shared by threads.

    Args:
        size_px: target of the side that ``mode`` chooses.
        only_if_bigger: keep smaller images as they are.
        quality: of the JPEG, 1 to 100.
    """

    def __init__(self, size_px: int, mode: ResizeMode, *, only_if_bigger: bool, quality: int) -> None:
        self._size_px, self._mode, self._only_if_bigger = size_px, mode, only_if_bigger
        self._options = [cv2.IMWRITE_JPEG_QUALITY, quality]
        # The caller's threads are the parallelism: OpenCV's own would be one more set per caller.
        cv2.setNumThreads(1)

    def spare_scale(self, width: int, height: int) -> float:
        """Return how many times smaller an image of this size may be decoded before it is resized."""
        return (
            1.0 if self._mode == "no" else _side(width, height, self._mode) / (_SCALED_MARGIN * self._size_px)
        )

    def __call__(
        self, image: Image.Image, shown_px: tuple[float, float] | None = None
    ) -> tuple[bytes, int, int]:
        """Return the JPEG of an RGB or grey image, its width and its height. Raises ImageError.

        ``shown_px``: the width and height in pixels that the image fills, where the last ones are filled in part.
        """
        pixels = resize(to_bgr(image), self._size_px, self._mode, self._only_if_bigger, shown_px)
        try:
            _, jpeg = cv2.imencode(".jpg", pixels, self._options)
        except cv2.error as error:  # a side over 65,535 pixels
            raise ImageError("image_truncated", str(error)) from error
        return jpeg.tobytes(), pixels.shape[1], pixels.shape[0]


def to_bgr(image: Image.Image) -> np.ndarray:
    """Return an RGB image as OpenCV has it, bgr_HW3, and a grey one as grey_HW."""
    if image.mode != "RGB":
        return np.asarray(image)
    try:
        # Pillow holds four bytes a pixel, which Arrow hands over without a copy.
        rgbx_HW4 = pa.array(image).values.to_numpy().reshape(image.height, image.width, 4)
    except ValueError:  # over 16 MB, where Pillow's memory is several blocks
        return cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2BGR)
    return cv2.cvtColor(rgbx_HW4, cv2.COLOR_RGBA2BGR)


def resize(
    pixels: np.ndarray,
    size_px: int,
    mode: ResizeMode,
    only_if_bigger: bool,
    shown_px: tuple[float, float] | None = None,
) -> np.ndarray:
    """Return pixels_HW or pixels_HW3 resized as img2dataset's mode of that name does; ``shown_px`` as above."""
    width, height = shown_px or (pixels.shape[1], pixels.shape[0])
    side_px = _side(width, height, mode)
    if mode == "no" or (only_if_bigger and side_px <= size_px):
        return pixels
    scale = size_px / side_px
    fitted = max(1, round(width * scale)), max(1, round(height * scale))
    if shown_px is not None:
        pixels = _shrink_exactly(pixels, shown_px, fitted)
    elif fitted != (width, height):
        interpolation = cv2.INTER_AREA if side_px > size_px else cv2.INTER_LANCZOS4
        pixels = cv2.resize(pixels, fitted, interpolation=interpolation)
    match mode:
        case "border":
            return _on_square(pixels, size_px)
        case "center_crop":
            return _central_square(pixels, size_px)
    return pixels


def _side(width: float, height: float, mode: ResizeMode) -> float:
    return max(width, height) if mode in _BY_LONGER_SIDE else min(width, height)


def _shrink_exactly(pixels: np.ndarray, shown_px: tuple[float, float], fitted: tuple[int, int]) -> np.ndarray:
    """Return the means of the areas that fitted pixels cover of the shown ones, a part of the last ones included.

    OpenCV takes a scale that is no quotient of whole sizes only where it chooses the size itself: then it rounds, which
    may give one pixel more.
    """
    width, height = fitted
    fx, fy = width / shown_px[0], height / shown_px[1]
    return cv2.resize(pixels, None, fx=fx, fy=fy, interpolation=cv2.INTER_AREA)[:height, :width]


def _on_square(pixels: np.ndarray, size_px: int) -> np.ndarray:
    """Pad to a square with white; of an odd number of missing pixels, one more behind than before."""
    height, width = size_px - pixels.shape[0], size_px - pixels.shape[1]
    top, left = height // 2, width // 2
    return cv2.copyMakeBorder(
        pixels, top, height - top, left, width - left, cv2.BORDER_CONSTANT, value=_WHITE
    )


def _central_square(pixels: np.ndarray, size_px: int) -> np.ndarray:
    top, left = (pixels.shape[0] - size_px) // 2, (pixels.shape[1] - size_px) // 2
    return pixels[top : top + size_px, left : left + size_px]
