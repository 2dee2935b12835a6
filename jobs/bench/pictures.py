"""Pictures that cost a decoder what photographs do: noise of every scale under a gradient, as JPEG."""

import io

import numpy as np
from PIL import Image

_QUALITY = 88
# The contrast of each octave, coarse to fine: about 1.7 bits a pixel at this quality, as photographs have.
_CONTRAST = 90.0
_FADE = 0.77


def jpeg(seed: int, size_px: tuple[int, int], quality: int = _QUALITY) -> bytes:
    """Return a JPEG of (width, height) pixels; equal arguments give equal bytes."""
    rng = np.random.default_rng(seed)
    width, height = size_px
    pixels_HWC = np.linspace(60, 190, width)[None, :, None] + np.zeros((height, 1, 3))
    contrast, cells = _CONTRAST, 4
    while cells < max(size_px):
        grid = rng.random((max(cells * height // width, 1), cells, 3)) * 255
        octave = Image.fromarray(grid.astype(np.uint8)).resize(size_px, Image.Resampling.BICUBIC)
        pixels_HWC += (np.asarray(octave, np.float64) / 255 - 0.5) * contrast
        contrast, cells = contrast * _FADE, cells * 2
    body = io.BytesIO()
    Image.fromarray(np.clip(pixels_HWC, 0, 255).astype(np.uint8)).save(body, "JPEG", quality=quality)
    return body.getvalue()
