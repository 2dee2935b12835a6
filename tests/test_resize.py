"""The resize of the crawl: the bytes of img2dataset's Resizer in each of its modes, on any number of threads."""

import io
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.images.decode import EncodedImage
from pipeline.images.resize import Resizer, to_bgr
from tests.hostile import encoded, picture

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


def test_four_threads_leave_the_processs_own_output_alone() -> None:
    done = subprocess.run([sys.executable, "-c", FOUR_THREADS], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"out\n" * 100, b"err\n" * 100)
