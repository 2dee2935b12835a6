"""BLIP's RandAugment(2, 5): two of ten operations on a crop, each with probability 1/2 (data/randaugment.py).

At magnitude 5 of 10, BLIP's brightness and sharpness have the factor 0.1 + 1.8 * 5 / 10 = 1, which changes nothing, so
that three of its ten operations are the identity. The others rotate by 15 degrees, shear by 0.15 and move by 5 pixels,
to either side, or spread the colours of a channel.
"""

import math
import random
from collections.abc import Callable, Mapping

from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

_NUM_OPERATIONS, _PROBABILITY = 2, 0.5
_FILL = [128, 128, 128]
_ROTATION_DEGREES = 30 * 5 / 10
_SHEAR_DEGREES = math.degrees(math.atan(0.3 * 5 / 10))
_SHIFT_PX = 10 * 5 // 10

# From an image and a sign to an image.
Operation = Callable[[Tensor, int], Tensor]


def _affine(
    pixels_CHW: Tensor, *, shift: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0, 0)
) -> Tensor:
    # BLIP shears about the corner of the image.
    return F.affine(
        pixels_CHW, 0.0, list(shift), 1.0, list(shear), InterpolationMode.BILINEAR, _FILL, center=[0, 0]
    )


def _identity(pixels_CHW: Tensor, sign: int) -> Tensor:
    return pixels_CHW


OPERATIONS: Mapping[str, Operation] = {
    "Identity": _identity,
    "AutoContrast": lambda pixels_CHW, sign: F.autocontrast(pixels_CHW),
    "Brightness": _identity,
    "Sharpness": _identity,
    "Equalize": lambda pixels_CHW, sign: F.equalize(pixels_CHW),
    "ShearX": lambda pixels_CHW, sign: _affine(pixels_CHW, shear=(sign * _SHEAR_DEGREES, 0)),
    "ShearY": lambda pixels_CHW, sign: _affine(pixels_CHW, shear=(0, sign * _SHEAR_DEGREES)),
    "TranslateX": lambda pixels_CHW, sign: _affine(pixels_CHW, shift=(sign * _SHIFT_PX, 0)),
    "TranslateY": lambda pixels_CHW, sign: _affine(pixels_CHW, shift=(0, sign * _SHIFT_PX)),
    "Rotate": lambda pixels_CHW, sign: F.rotate(
        pixels_CHW, sign * _ROTATION_DEGREES, InterpolationMode.BILINEAR, fill=_FILL
    ),
}


def rand_augment(pixels_CHW: Tensor, numbers: random.Random) -> Tensor:
    """Return uint8 pixels after up to two operations, drawn from ``numbers``."""
    names = list(OPERATIONS)
    for _ in range(_NUM_OPERATIONS):
        # Three numbers an operation, whether it is applied or not.
        choice, applied, side = numbers.random(), numbers.random(), numbers.random()
        if applied < _PROBABILITY:
            operation = OPERATIONS[names[int(choice * len(names))]]
            pixels_CHW = operation(pixels_CHW, 1 if side < 0.5 else -1)
    return pixels_CHW
