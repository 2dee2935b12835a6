"""Pictures of the demo world as a web serves them and as a crawler stores them."""

import io
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from PIL import Image

from jobs.demo.world.drawing import render, render_mask
from jobs.demo.world.scenes import Scene

ImageFormat = Literal["jpg", "png", "webp"]
STORED_MAX_SIDE_PX = 128
STORED_JPEG_QUALITY = 95
INPUT_PX = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How one site happened to publish a picture."""

    size_px: tuple[int, int]
    format: ImageFormat
    quality: int

    @staticmethod
    def random(rng: random.Random) -> "Encoding":
        """Draw sides of 96 to 256 pixels, seven JPEGs of ten, and any usual quality."""
        short = rng.choice((96, 96, 112, 112, 128, 128, 144, 160, 192))
        aspect = rng.choice((1.0, 1.0, 1.0, 1.2, 4 / 3))
        size = (short, round(short * aspect))
        if rng.random() < 0.5:
            size = size[::-1]
        kind: ImageFormat = rng.choices(("jpg", "png", "webp"), (70, 15, 15))[0]
        return Encoding(size_px=size, format=kind, quality=rng.randint(55, 95))


def encode(image: Image.Image, encoding: Encoding) -> bytes:
    """Write the image file that a site would serve."""
    body = io.BytesIO()
    match encoding.format:
        case "jpg":
            image.save(body, "JPEG", quality=encoding.quality)
        case "png":
            image.save(body, "PNG", compress_level=1)
        case "webp":
            image.save(body, "WEBP", quality=encoding.quality, method=0)
    return body.getvalue()


def published(scene: Scene, encoding: Encoding, seed: int) -> bytes:
    """Render and encode one picture; equal arguments give equal bytes."""
    return encode(render(scene, encoding.size_px, seed), encoding)


def stored(body: bytes) -> bytes:
    """Decode, shrink and re-encode as the crawler does (img2dataset: keep_ratio_largest)."""
    image = Image.open(io.BytesIO(body)).convert("RGB")
    image.thumbnail((STORED_MAX_SIDE_PX, STORED_MAX_SIDE_PX), Image.Resampling.BOX)
    again = io.BytesIO()
    image.save(again, "JPEG", quality=STORED_JPEG_QUALITY)
    return again.getvalue()


@dataclass(frozen=True, slots=True)
class DemoImages:
    """Scenes and the 64-pixel inputs that a model sees of them."""

    scenes: list[Scene]
    pixels_NHWC: np.ndarray


def _unserved(index: int, seed: int) -> tuple[Scene, Encoding, int]:
    """Return what decides a picture that no site serves: its scene, its encoding and its own seed."""
    rng = random.Random(f"{seed}/{index}")
    return Scene.random(rng), Encoding.random(rng), rng.getrandbits(32)


def demo_picture(index: int, seed: int) -> tuple[Scene, np.ndarray]:
    """Make the picture with this number of those that ``demo_images`` makes."""
    scene, encoding, own_seed = _unserved(index, seed)
    image = Image.open(io.BytesIO(stored(published(scene, encoding, own_seed)))).convert("RGB")
    return scene, np.asarray(image.resize((INPUT_PX, INPUT_PX), Image.Resampling.BICUBIC))


def _mask(index: int, seed: int) -> np.ndarray:
    scene, encoding, own_seed = _unserved(index, seed)
    mask = render_mask(scene, encoding.size_px, own_seed)
    return np.asarray(mask.resize((INPUT_PX, INPUT_PX), Image.Resampling.BILINEAR))


def demo_images(num_images: int, seed: int, workers: int = 1) -> DemoImages:
    """Make pictures that no site serves; sets of different seeds share none."""
    make = partial(demo_picture, seed=seed)
    if workers == 1:
        pictures = list(map(make, range(num_images)))
    else:
        with ProcessPoolExecutor(workers) as pool:
            pictures = list(pool.map(make, range(num_images), chunksize=64))
    return DemoImages([scene for scene, _ in pictures], np.stack([pixels_HWC for _, pixels_HWC in pictures]))


def demo_masks(num_images: int, seed: int) -> np.ndarray:
    """Return where the objects of ``demo_images`` are: (N, H, W), 255 inside."""
    return np.stack([_mask(index, seed) for index in range(num_images)])
