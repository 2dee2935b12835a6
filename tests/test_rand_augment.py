"""BLIP's RandAugment: each operation as OpenCV computes BLIP's, and as often as BLIP draws it."""

import random
from collections import Counter
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from trained import pictures

from training.data import rand_augment as module
from training.data.rand_augment import OPERATIONS, rand_augment

SIZE = 32
FILL = (128, 128, 128)


def warped(pixels_CHW: Tensor, matrix: Any) -> np.ndarray:
    image = np.ascontiguousarray(pixels_CHW.permute(1, 2, 0).numpy())
    return cv2.warpAffine(image, np.float32(matrix), (SIZE, SIZE), borderValue=FILL)


@pytest.mark.parametrize(
    ("name", "matrix"),
    [
        ("ShearX", [[1, 0.15, 0], [0, 1, 0]]),
        ("ShearY", [[1, 0, 0], [0.15, 1, 0]]),
        ("TranslateX", [[1, 0, 5], [0, 1, 0]]),
        ("TranslateY", [[1, 0, 0], [0, 1, 5]]),
        ("Rotate", cv2.getRotationMatrix2D(((SIZE - 1) / 2, (SIZE - 1) / 2), 15, 1)),
    ],
)
def test_moves_as_blip(name: str, matrix: Any) -> None:
    pixels_CHW = pictures(1, SIZE)[0]
    expected = warped(pixels_CHW, matrix).astype(int)
    # To either side. The borders differ: OpenCV blends the fill with the image there.
    differences = [
        np.abs(OPERATIONS[name](pixels_CHW, sign).permute(1, 2, 0).numpy().astype(int) - expected)[6:-6, 6:-6]
        for sign in (1, -1)
    ]
    mean = min(difference.mean() for difference in differences)
    assert mean < 6 < max(difference.mean() for difference in differences)


def test_contrast_uses_all_levels() -> None:
    pixels_CHW = torch.arange(50, 114, dtype=torch.uint8).repeat(3, 16, 1)
    for name in ("AutoContrast", "Equalize"):
        changed = OPERATIONS[name](pixels_CHW, 1)
        assert changed.dtype == torch.uint8 and changed.amin() == 0 and changed.amax() >= 254


def test_two_of_ten_each_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: Counter[str] = Counter()

    def counting(name: str) -> Any:
        return lambda pixels_CHW, sign: applied.update([name, sign]) or pixels_CHW

    monkeypatch.setattr(module, "OPERATIONS", {name: counting(name) for name in OPERATIONS})
    numbers = random.Random(0)
    for _ in range(5000):
        rand_augment(torch.zeros(3, 2, 2, dtype=torch.uint8), numbers)
    assert all(applied[name] == pytest.approx(500, abs=80) for name in OPERATIONS)
    assert applied[1] == pytest.approx(2500, abs=150)


def test_the_same_numbers_give_the_same_pixels() -> None:
    pixels_CHW = pictures(1, SIZE)[0]
    augmented = [rand_augment(pixels_CHW, random.Random(seed)) for seed in (3, 3, *range(20))]
    assert torch.equal(augmented[0], augmented[1])
    assert len({pixels.numpy().tobytes() for pixels in augmented}) > 2
