"""What training does to a sample: its image is decoded and cropped at random, its captions are cleaned as in LAVIS.

A crop is torchvision's RandomResizedCrop, as LAVIS's ``blip2_image_train`` uses it. Its random numbers come from
(seed, uid, epoch), so that a sample looks the same on any rank or worker. Pixels stay uint8; the device normalises.

C, H, W: channels, rows, columns of one image.
"""

import hashlib
import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from pipeline.images.decode import ImageError, decode_rgb, is_plain_jpeg, read_header
from pipeline.images.preprocess import resize
from schemas.config import MAX_PIXELS

# Logarithms of the narrowest and the widest aspect.
_RATIOS = (math.log(3 / 4), math.log(4 / 3))
_TRIES = 10

# The marks that LAVIS removes from captions and questions; question marks, commas and apostrophes stay.
LAVIS_MARKS = '.!"()*#:;~'
_MARKS_TO_SPACES = str.maketrans(dict.fromkeys(LAVIS_MARKS, " "))


class NoCaptionError(Exception):
    """Report that a sample has no caption with a word in it."""


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


def sample_random(seed: int, uid: str, epoch: int) -> random.Random:
    """Return the random stream of a sample in an epoch; only its ``random()`` is the same in any Python."""
    digest = hashlib.sha256(f"{seed}\n{uid}\n{epoch}".encode()).digest()
    return random.Random(int.from_bytes(digest[:16]))


def decode(data: bytes) -> Tensor:
    """Return the image as uint8 pixels_CHW, upright, transparency on white. Raises ImageError.

    Plain JPEGs, nearly all there are, skip Pillow: libjpeg-turbo's output as a tensor without a copy.
    """
    header = read_header(data)
    if header.width * header.height > MAX_PIXELS:
        raise ImageError("too_many_pixels", f"{header.width} x {header.height}")
    if not is_plain_jpeg(data, header):
        return torch.from_numpy(np.array(decode_rgb(data))).permute(2, 0, 1)
    try:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError as error:
        raise ImageError("image_truncated", str(error)) from error


def random_crop(
    pixels_CHW: Tensor, numbers: random.Random, *, size_px: int, min_scale: float, flip: bool
) -> Tensor:
    """Return a random part of the image as a square of ``size_px``, mirrored half of the time."""
    mirrored = numbers.random() < 0.5
    height, width = pixels_CHW.shape[1:]
    box = crop_box(width, height, numbers, min_scale)
    part_CHW = pixels_CHW[:, box.top : box.top + box.height, box.left : box.left + box.width]
    crop_CHW = resize(part_CHW, (size_px, size_px))
    return crop_CHW.flip(-1) if flip and mirrored else crop_CHW


def crop_box(width: int, height: int, numbers: random.Random, min_scale: float) -> Box:
    """Draw torchvision's RandomResizedCrop: area in [min_scale, 1], aspect in [3/4, 4/3], ten tries.

    Where no try fits (a very long image), it is the largest central part with an allowed aspect.
    """
    for _ in range(_TRIES):
        area = width * height * _between(numbers, min_scale, 1.0)
        # Uniform in the logarithm, so that 3:4 is as likely as 4:3. From w h = area and w / h = ratio follow w and h.
        ratio = math.exp(_between(numbers, *_RATIOS))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(numbers.random() * (height - h + 1)), int(numbers.random() * (width - w + 1))
            return Box(top, left, h, w)
    w = min(width, max(1, round(height * 4 / 3)))
    h = min(height, max(1, round(width * 4 / 3)))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def _between(numbers: random.Random, low: float, high: float) -> float:
    return low + (high - low) * numbers.random()


def blip_caption(text: str, max_words: int = 50) -> str:
    """Return the text in lower case, without LAVIS's marks, its first words joined by single spaces.

    LAVIS leaves a lone tab or line break inside a caption; here all white space is one space.
    """
    return " ".join(text.lower().translate(_MARKS_TO_SPACES).split()[:max_words])


def usable_captions(captions: Sequence[str], first: int | None, max_words: int) -> list[str]:
    """Return the cleaned captions that have a word, best first. Raises NoCaptionError where none does.

    Args:
        captions: of one image, best first.
        first: how many of them to consider; None: all, as for the several captions that people wrote.
        max_words: what a caption is cut to.
    """
    cleaned = (blip_caption(caption, max_words) for caption in captions[:first])
    if usable := [caption for caption in cleaned if caption]:
        return usable
    raise NoCaptionError("no caption has a word in it")
