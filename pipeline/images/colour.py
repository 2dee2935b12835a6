"""Conversion of images with an ICC profile to sRGB, the colour space of all stored images.

Browsers do the same; without it, a wide-gamut image read as sRGB is paler than what its caption describes.
"""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

# Longer than any profile of a scanner or a press; a longer one is ignored.
MAX_PROFILE_BYTES = 4_000_000
# A profile that changes no colour by more levels than this is a version of sRGB.
_SAME_LEVELS = 2
_SPACES = {"RGB": ("RGB",), "RGBA": ("RGB",), "L": ("GRAY",), "CMYK": ("CMYK",)}
# Classes of profiles that describe an image's own space; link, abstract and named-colour profiles do not.
_CLASSES = ("scnr", "mntr", "prtr", "spac")


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return an image of mode L, RGB, RGBA or CMYK in sRGB: RGB, or RGBA with the alpha it had.

    The same image where there is no profile, or none that fits: a damaged one, or one of another colour space,
    means sRGB, as in browsers.
    """
    if not profile or len(profile) > MAX_PROFILE_BYTES or image.mode not in _SPACES:
        return image
    transform = _transform(profile, image.mode)
    if transform is None:
        return image
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None, "only inPlace returns nothing"
    return converted


# Nearly all images with a profile share a few profiles; a printer's takes some megabytes.
@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return what converts to sRGB, or None where nothing is to be converted."""
    to_mode = "RGBA" if mode == "RGBA" else "RGB"
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if opened.profile.xcolor_space.strip() not in _SPACES[mode]:
            return None
        if opened.profile.device_class not in _CLASSES:
            return None
        transform = ImageCms.buildTransform(opened, _srgb(), mode, to_mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    return None if _changes_nothing(transform, mode) else transform


@lru_cache(maxsize=1)
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Tell whether colours from the whole cube, or all greys, stay as they are."""
    if mode == "CMYK":
        return False
    if mode == "L":
        colours = np.arange(256, dtype=np.uint8)[None]
    else:
        levels = np.linspace(0, 255, 18).astype(np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(18, -1, 3)
    image = Image.fromarray(colours)
    converted = np.asarray(ImageCms.applyTransform(image.convert(mode), transform))[..., :3]
    return bool(np.abs(converted.astype(int) - np.asarray(image.convert("RGB"))).max() <= _SAME_LEVELS)
