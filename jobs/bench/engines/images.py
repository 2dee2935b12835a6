"""From JPEG to the pixels of both models: the libraries' own preprocessing and this project's, on the same files.

``naive`` is what a plain loop does: for BLIP and for CLIP each, decode, resize with Pillow, normalise in float32.
``exact`` and ``fast`` are our two paths: decode once, resize for both, and hand out uint8.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from transformers import BlipImageProcessorPil

from jobs.bench.fixtures.compute import device_seconds_by_variant, one_thread
from jobs.bench.fixtures.machine import median_ratio
from jobs.bench.fixtures.pictures import jpegs
from pipeline.images.decode import decode_rgb
from pipeline.images.preprocess import Preprocess, decode_pixels
from pipeline.prefetch import prefetch_map

# The first is what a crawl stores of a photograph; the others are what shards of other makers hold.
_SIZES_PX = ((512, 384), (512, 512), (1024, 768))
_ROUNDS = 5
_CPU = torch.device("cpu")

_Decoder = Callable[[bytes], Any]


def measure_images(images: int) -> dict[str, Any]:
    """Decode ``images`` pictures of each size in every way, on one thread."""
    decoders = _decoders()
    # Every decoding thread is one thread: PyTorch must not bring its own.
    with one_thread(_CPU):
        rows = [row for size_px in _SIZES_PX for row in _measure_size(size_px, images, decoders)]
    return {"images": images, "rounds": _ROUNDS, "sizes": rows}


def _decoders() -> dict[str, _Decoder]:
    """Return the ways to prepare an image for BLIP-large and for CLIP ViT-L/14."""
    processor, cfg = BlipImageProcessorPil(), PreprocessCfg()
    transform = image_transform_v2(cfg, is_train=False)
    recipes = [Preprocess.of_blip(processor), Preprocess.of_open_clip(asdict(cfg))]

    def naive(data: bytes) -> Any:
        blip_CHW = processor(decode_rgb(data), return_tensors="pt").pixel_values[0]
        return blip_CHW, transform(decode_rgb(data))

    return {
        "naive": naive,
        "exact": partial(decode_pixels, preprocesses=recipes, path="exact"),
        "fast": partial(decode_pixels, preprocesses=recipes, path="fast"),
    }


def _measure_size(
    size_px: tuple[int, int], images: int, decoders: dict[str, _Decoder]
) -> list[dict[str, Any]]:
    """Return a row for each way: by CPU time, what a core does when it has nothing else to do."""
    pictures = jpegs(size_px, images)
    variants = {name: partial(_decode_all, decode, pictures) for name, decode in decoders.items()}
    # The first round warms caches: not counted.
    timed = {
        name: seconds[1:] for name, seconds in device_seconds_by_variant(variants, _ROUNDS + 1, _CPU).items()
    }
    return [
        {
            "size": "x".join(map(str, size_px)),
            "way": name,
            "images_per_core_s": round(images / median(seconds), 1),
            "ratio": median_ratio(timed["naive"], seconds),
        }
        for name, seconds in timed.items()
    ]


def _decode_all(decode: _Decoder, pictures: Sequence[bytes]) -> None:
    """Decode through the pool that workers use."""
    for pixels in prefetch_map(decode, pictures, ahead=2, threads=1):
        assert pixels is not None
