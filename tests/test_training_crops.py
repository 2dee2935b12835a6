"""What a training image and its caption become: decoding, crops, clean-up."""

import io
import random
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from jobs.bench.fixtures.pictures import jpeg
from pipeline.images.decode import ImageError, decode_rgb
from pipeline.images.preprocess import resize
from training.data.transforms import (
    NoCaptionError,
    blip_caption,
    crop_box,
    decode,
    random_crop,
    sample_random,
    usable_captions,
)


def encoded(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    body = io.BytesIO()
    image.save(body, format, **options)
    return body.getvalue()


PICTURE = Image.open(io.BytesIO(jpeg(3, (97, 61))))


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(PICTURE, exif=exif)


# -- decoding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        jpeg(1, (96, 64)),
        encoded(PICTURE, progressive=True),
        encoded(PICTURE, subsampling=2),
        encoded(PICTURE.convert("L")),
        encoded(PICTURE.convert("CMYK")),
        encoded(PICTURE, "PNG"),
        encoded(PICTURE.convert("LA"), "PNG"),
        encoded(PICTURE, "WEBP"),
        turned(1),
        turned(6),
    ],
    ids=["rgb", "progressive", "subsampled", "grey", "cmyk", "png", "alpha", "webp", "upright", "turned"],
)
def test_pixels_are_those_of_the_careful_decoder(data: bytes) -> None:
    expected_HWC = np.asarray(decode_rgb(data))
    pixels_CHW = decode(data)
    assert pixels_CHW.dtype == torch.uint8
    assert np.array_equal(pixels_CHW.permute(1, 2, 0).numpy(), expected_HWC)


@pytest.mark.parametrize("data", [b"", b"no image", jpeg(1, (96, 64))[:900], encoded(PICTURE, "PNG")[:300]])
def test_damage_is_an_image_error(data: bytes) -> None:
    with pytest.raises(ImageError):
        decode(data)


def test_a_bomb_is_refused_by_its_header() -> None:
    bomb = encoded(Image.new("L", (9000, 9000)))
    with pytest.raises(ImageError, match="too_many_pixels"):
        decode(bomb)


# -- crops -----------------------------------------------------------------------------------------------------


@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 10**6), st.sampled_from([0.2, 0.5, 1.0]))
def test_a_crop_lies_in_the_image(width: int, height: int, seed: int, min_scale: float) -> None:
    box = crop_box(width, height, random.Random(seed), min_scale)
    assert box.height > 0 and box.width > 0 and box.top >= 0 and box.left >= 0
    assert box.top + box.height <= height and box.left + box.width <= width
    if min(width, height) > 100 and 3 / 4 < width / height < 4 / 3:
        assert 0.98 * min_scale < box.width * box.height / (width * height) <= 1
        assert 0.74 < box.width / box.height < 1.35


@pytest.mark.parametrize("size", [(200, 200), (300, 200), (120, 260), (400, 100), (100, 400)])
def test_crops_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    width, height = size
    numbers, num_crops = random.Random(1), 3000
    actual = np.array([crop_box(width, height, numbers, 0.5) for _ in range(num_crops)], float)
    torch.manual_seed(1)
    image = torch.empty(3, height, width)
    reference = np.array(
        [RandomResizedCrop.get_params(image, (0.5, 1.0), (3 / 4, 4 / 3)) for _ in range(num_crops)], float
    )
    for quantile in (0.1, 0.5, 0.9):
        assert np.quantile(actual, quantile, axis=0) == pytest.approx(
            np.quantile(reference, quantile, axis=0), abs=0.04 * max(size)
        )


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_crop_is_torchvisions_resized_crop(mirrored: bool) -> None:
    pixels_CHW = decode(jpeg(2, (320, 240)))
    seed = next(seed for seed in range(99) if (random.Random(seed).random() < 0.5) == mirrored)
    numbers = random.Random(seed)
    numbers.random()
    box = crop_box(320, 240, numbers, 0.5)
    expected_CHW = F.resized_crop(pixels_CHW, *box, [56, 56], InterpolationMode.BICUBIC, antialias=True)
    crop_CHW = random_crop(pixels_CHW, random.Random(seed), size_px=56, min_scale=0.5, flip=True)
    assert torch.equal(crop_CHW, expected_CHW.flip(-1) if mirrored else expected_CHW)
    without = random_crop(pixels_CHW, random.Random(seed), size_px=56, min_scale=0.5, flip=False)
    assert torch.equal(without, expected_CHW)


def test_a_resize_is_pillows_within_rounding() -> None:
    image = decode_rgb(jpeg(2, (320, 200)))
    expected_HWC = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC), int)
    squashed_HWC = resize(decode(jpeg(2, (320, 200))), (64, 64)).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(squashed_HWC - expected_HWC).max() <= 1


def test_random_numbers_are_the_samples_own() -> None:
    streams = [
        sample_random(seed, uid, epoch).random() for seed in (1, 2) for uid in ("a", "b") for epoch in (0, 1)
    ]
    assert len(set(streams)) == 8
    assert sample_random(1, "a", 0).random() == streams[0]


# -- captions --------------------------------------------------------------------------------------------------


def lavis_caption(caption: str, max_words: int = 50) -> str:
    """The rules of LAVIS's BlipCaptionProcessor, written down from recipes: another way to the same end."""
    caption = re.sub(r"([.!\"()*#:;~])", " ", caption.lower())
    caption = re.sub(r"\s{2,}", " ", caption)
    caption = caption.rstrip("\n").strip(" ")
    words = caption.split(" ")
    return " ".join(words[:max_words])


@given(st.text(alphabet="aB c.,!?\"()*#:;~-'é1", max_size=60), st.integers(1, 5))
def test_captions_are_cleaned_as_lavis_does(text: str, max_words: int) -> None:
    assert blip_caption(text, max_words) == lavis_caption(text, max_words).strip()


def test_captions_that_say_nothing_are_not_drawn() -> None:
    captions = ["A Dog!", "...", "a cat", "a bird"]
    assert usable_captions(captions, 3, 50) == ["a dog", "a cat"]
    assert usable_captions(captions, None, 1) == ["a", "a", "a"]
    with pytest.raises(NoCaptionError):
        usable_captions(["...", "!"], None, 50)
    with pytest.raises(NoCaptionError):
        usable_captions(captions[1:], 1, 50)
