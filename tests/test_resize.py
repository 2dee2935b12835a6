"""The resize of the crawl: the bytes of img2dataset's Resizer in each of its modes, on any number of threads."""

import io
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.bench.fixtures.pictures import jpeg
from pipeline.images.decode import EncodedImage, ImageError
from pipeline.images.resize import Resizer, resize, to_bgr
from tests.hostile import encoded, picture, rotated_jpeg

MODES = ("no", "border", "keep_ratio", "keep_ratio_largest", "center_crop")
# Logs to stdout while four threads resize; what is lost is what img2dataset's own class would lose.
FOUR_THREADS = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from PIL import Image
from pipeline.images.resize import Resizer
resizer = Resizer(96, "keep_ratio", only_if_bigger=True, quality=95)
before = [os.readlink(f"/proc/self/fd/{number}") for number in (1, 2)]
image = Image.effect_noise((640, 480), 64).convert("RGB")
def work(number):
    jpeg = resizer(image)[0]
    os.write(1, b"out\\n")
    os.write(2, b"err\\n")
    return jpeg
with ThreadPoolExecutor(4) as pool:
    assert len(set(pool.map(work, range(100)))) == 1
assert before == [os.readlink(f"/proc/self/fd/{number}") for number in (1, 2)]
"""


def img2dataset_resizer(**settings: Any) -> Any:
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    from img2dataset import resizer

    return resizer.Resizer(**settings)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("only_if_bigger", [True, False])
def test_bytes_are_those_of_img2dataset(mode: str, only_if_bigger: bool) -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        height, width = random.integers(1, 300, 2)
        size_px, quality = int(random.integers(16, 200)), int(random.integers(1, 101))
        noise = random.integers(0, 256, (height, width, 3), np.uint8)
        image = Image.fromarray(noise if random.random() < 0.7 else noise[..., 0])
        expected = img2dataset_resizer(
            image_size=size_px, resize_mode=mode, resize_only_if_bigger=only_if_bigger, encode_quality=quality
        )(io.BytesIO(encoded(image, "BMP")))
        resized = Resizer(size_px, mode, only_if_bigger=only_if_bigger, quality=quality)(image)
        assert resized == expected[:3], (width, height, size_px)


def test_pixels_are_the_same_in_one_block_of_memory_and_in_several() -> None:
    # Pillow's blocks hold 16 MB: four million pixels.
    for size in ((400, 300), (3000, 1500)):
        image = picture(*size)
        decoded = EncodedImage(encoded(image, "JPEG", quality=95)).srgb(10_000_000)
        for pixels in (image, decoded):
            assert np.array_equal(to_bgr(pixels), np.asarray(pixels)[..., ::-1])


@pytest.mark.parametrize("mode", ["keep_ratio", "keep_ratio_largest", "center_crop", "border"])
def test_a_jpeg_decoded_smaller_stays_in_place_and_near(mode: str) -> None:
    resizer = Resizer(48, mode, only_if_bigger=True, quality=95)
    for width, height, grey in ((801, 803, False), (417, 615, True), (400, 400, False), (1211, 199, False)):
        data = jpeg(0, (width, height))
        if grey:
            data = encoded(Image.open(io.BytesIO(data)).convert("L"), "JPEG", quality=88)
        image = EncodedImage(data)
        scale = image.jpeg_scale(resizer.spare_scale(width, height))
        assert scale == max(s for s in (1, 2, 4, 8) if resizer.spare_scale(width, height) >= s)
        scaled = image.srgb(10_000_000, scale)
        assert scaled.size == (-(-width // scale), -(-height // scale))
        full = resize(to_bgr(EncodedImage(data).srgb(10_000_000)), 48, mode, True)
        near = resize(to_bgr(scaled), 48, mode, True, (width / scale, height / scale))
        assert near.shape == full.shape
        # Without the part of a pixel at the end it was up to 12 levels.
        assert np.abs(near.astype(int) - full).mean() < 1.0, (width, height, mode)


def test_only_jpegs_that_are_large_enough_are_decoded_smaller() -> None:
    resizer = Resizer(48, "keep_ratio", only_if_bigger=True, quality=95)
    assert resizer.spare_scale(191, 500) < 2 <= resizer.spare_scale(192, 500)
    assert Resizer(48, "no", only_if_bigger=True, quality=95).spare_scale(9_000, 9_000) == 1
    assert EncodedImage(encoded(picture(), "PNG")).jpeg_scale(8) == 1
    # Turned by EXIF, the part of a pixel at the end would become the first one: 160 x 120 in whole pixels alone.
    assert EncodedImage(rotated_jpeg(6)).jpeg_scale(8) == 8
    turned = encoded(picture(164, 122), "JPEG", exif=orientation_6())
    assert [EncodedImage(turned).jpeg_scale(at_most) for at_most in (8, 3.9, 1.9)] == [2, 2, 1]
    # What is missing is noticed at each scale.
    whole = jpeg(0, (640, 480))
    for scale in (2, 4, 8):
        with pytest.raises(ImageError, match="image_truncated"):
            EncodedImage(whole[: len(whole) // 2] + whole[-2:]).srgb(10_000_000, scale)


def orientation_6() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_four_threads_leave_the_processs_own_output_alone() -> None:
    done = subprocess.run([sys.executable, "-c", FOUR_THREADS], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"out\n" * 100, b"err\n" * 100)
