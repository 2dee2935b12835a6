"""``crawl.jpeg_scaling``: how far images lie from those of full decoding, and what CPU it saves, at the default target.

The distance is that of the pixels before they are encoded; beside it stands what encoding them loses.
"""

import functools
import io
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jobs.bench.fixtures.machine import Stopwatch, median_ratio
from jobs.bench.fixtures.pictures import jpegs
from pipeline.images.decode import EncodedImage, decode_rgb
from pipeline.images.resize import Resizer, resize, to_bgr
from schemas.config import MAX_PIXELS, CrawlConfig

_SIZES = ((1601, 1538), (2048, 1536), (2501, 2001), (4032, 3024), (4201, 3201))
_LETTERING_SIZES = ((2101, 1601), (4201, 3201))


def measure_jpeg_scaling(images: int, rounds: int) -> dict[str, Any]:
    """Decode and resize JPEGs of several sizes in full and scaled, in turn."""
    pictures = {f"{width}x{height}": jpegs((width, height), images) for width, height in _SIZES}
    for size_px in _LETTERING_SIZES:
        pictures["lettering_{}x{}".format(*size_px)] = [_lettering(seed, size_px) for seed in range(images)]
    return {
        "target_px": CrawlConfig().image_size_px,
        "rounds": rounds,
        "pictures": {name: _compared(files, rounds) for name, files in pictures.items()},
    }


def _compared(files: list[bytes], rounds: int) -> dict[str, float]:
    config = CrawlConfig()
    resizer = Resizer(
        config.image_size_px,
        config.resize_mode,
        only_if_bigger=config.resize_only_if_bigger,
        quality=config.encode_quality,
    )
    scaled_cpu_s, full_cpu_s = [], []
    for _ in range(rounds):
        with Stopwatch() as full_watch:
            full = [_pixels(resizer, data, scaled=False) for data in files]
        with Stopwatch() as scaled_watch:
            scaled = [_pixels(resizer, data, scaled=True) for data in files]
        full_cpu_s.append(full_watch.cpu_s)
        scaled_cpu_s.append(scaled_watch.cpu_s)
    stored = [_stored(resizer, data) for data in files]
    return {
        "scale": _scale(resizer, EncodedImage(files[0])),
        "mean_levels": _mean_levels(full, scaled),
        "psnr_db": _psnr_db(full, scaled),
        "encoding_psnr_db": _psnr_db(full, stored),
        "cpu_ratio": median_ratio(scaled_cpu_s, full_cpu_s),
    }


def _pixels(resizer: Resizer, data: bytes, *, scaled: bool) -> np.ndarray:
    config, image = CrawlConfig(), EncodedImage(data)
    scale = _scale(resizer, image) if scaled else 1
    shown_px = (image.header.width / scale, image.header.height / scale) if scale > 1 else None
    pixels = to_bgr(image.srgb(MAX_PIXELS, scale))
    return resize(pixels, config.image_size_px, config.resize_mode, config.resize_only_if_bigger, shown_px)


def _scale(resizer: Resizer, image: EncodedImage) -> int:
    return image.jpeg_scale(resizer.spare_scale(image.header.width, image.header.height))


def _stored(resizer: Resizer, data: bytes) -> np.ndarray:
    jpeg, _, _ = resizer(EncodedImage(data).srgb(MAX_PIXELS))
    return np.asarray(decode_rgb(jpeg))[..., ::-1]


def _mean_levels(before: list[np.ndarray], after: list[np.ndarray]) -> float:
    return round(
        float(np.mean([np.abs(a.astype(int) - b).mean() for a, b in zip(before, after, strict=True)])), 3
    )


def _psnr_db(before: list[np.ndarray], after: list[np.ndarray]) -> float:
    squares = [np.square(a.astype(float) - b).mean() for a, b in zip(before, after, strict=True)]
    # 10 log10(255^2 / mean squared error).
    return round(float(10 * np.log10(255**2 / np.mean(squares))), 1)


# Reading a font takes longer than drawing with it.
_font = functools.cache(ImageFont.load_default)


def _lettering(seed: int, size_px: tuple[int, int]) -> bytes:
    """Return words and thin lines on white: edges as sharp as a picture can have."""
    rng = np.random.default_rng(seed)
    width, height = size_px
    image = Image.new("RGB", size_px, "white")
    draw = ImageDraw.Draw(image)
    for _ in range(width * height // 3_000):
        place = int(rng.integers(width)), int(rng.integers(height))
        colour = tuple(rng.integers(0, 160, 3).tolist())
        draw.text(place, f"caption {rng.integers(999)}", fill=colour, font=_font(int(rng.integers(12, 40))))
    for _ in range(60):
        draw.line(rng.integers(0, width, 4).tolist(), fill=tuple(rng.integers(0, 255, 3).tolist()))
    body = io.BytesIO()
    image.save(body, "JPEG", quality=88)
    return body.getvalue()
