"""From JPEG to the pixels of both models: the libraries' own preprocessing and this project's, on the same files.

``naive`` is what a plain loop does: for BLIP and for CLIP each, decode, resize with Pillow, normalise in float32.
``exact`` and ``fast`` are our two paths: decode once, resize for both, and hand out uint8.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from transformers import BlipImageProcessorPil

from jobs.bench.fixtures.machine import Stopwatch
from jobs.bench.fixtures.pictures import jpeg
from pipeline.images.decode import decode_rgb
from pipeline.images.preprocess import Preprocess, decode_pixels
from pipeline.prefetch import decode_threads, prefetch_map
from schemas.config import PixelPath

# The first is what a crawl stores of a photograph; the others are what shards of other makers hold.
_SIZES_PX = ((512, 384), (512, 512), (1024, 768))
_ROUNDS = 5

_Decoder = Callable[[bytes], Any]


def measure_images(images: int) -> dict[str, Any]:
    """Decode ``images`` pictures of each size in every way: on one thread, then on as many as there are cores."""
    decoders, recipes = _decoders()
    # Every decoding thread is one thread: PyTorch must not bring its own.
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sizes = [_measure_size(size_px, images, decoders, recipes) for size_px in _SIZES_PX]
    finally:
        torch.set_num_threads(torch_threads)
    return {
        "images": images,
        "rounds": _ROUNDS,
        "threads": decode_threads(1, feeds_gpu=True),
        "sizes": {measured.pop("size"): measured for measured in sizes},
        "max_level_difference": max(measured["max_level_difference"] for measured in sizes),
    }


def _decoders() -> tuple[dict[str, _Decoder], list[Preprocess]]:
    """Return the ways to prepare an image for BLIP-large and for CLIP ViT-L/14, and their recipes."""
    processor, cfg = BlipImageProcessorPil(), PreprocessCfg()
    transform = image_transform_v2(cfg, is_train=False)
    recipes = [Preprocess.of_blip(processor), Preprocess.of_open_clip(asdict(cfg))]

    def naive(data: bytes) -> Any:
        blip_CHW = processor(decode_rgb(data), return_tensors="pt").pixel_values[0]
        return blip_CHW, transform(decode_rgb(data))

    def capfilt(path: PixelPath) -> _Decoder:
        return lambda data: decode_pixels(data, recipes, path)

    return {"naive": naive, "exact": capfilt("exact"), "fast": capfilt("fast")}, recipes


def _measure_size(
    size_px: tuple[int, int], images: int, decoders: dict[str, _Decoder], recipes: list[Preprocess]
) -> dict[str, Any]:
    pictures = [jpeg(seed, size_px) for seed in range(images)]
    threads = decode_threads(1, feeds_gpu=True)
    one_thread: dict[str, list[float]] = {name: [] for name in decoders}
    all_cores: dict[str, list[float]] = {name: [] for name in decoders}
    # The first round warms caches: not counted.
    for _ in range(_ROUNDS + 1):
        for name, decode in decoders.items():
            # By CPU time: what a core does when it has nothing else to do.
            one_thread[name].append(images / _decode_all(decode, pictures, 1).cpu_s)
            all_cores[name].append(images / _decode_all(decode, pictures, threads).seconds)
    return {
        "size": "x".join(map(str, size_px)),
        "bytes_per_picture": sum(map(len, pictures)) // images,
        **{
            name: _summary(one_thread[name][1:], all_cores[name][1:], one_thread["naive"][1:])
            for name in decoders
        },
        **_differences(pictures, recipes),
    }


def _decode_all(decode: _Decoder, pictures: Sequence[bytes], threads: int) -> Stopwatch:
    """Decode through the pool that workers use."""
    with Stopwatch() as watch:
        for pixels in prefetch_map(decode, pictures, ahead=2 * threads, threads=threads):
            assert pixels is not None
    return watch


def _summary(
    one_thread: Sequence[float], all_cores: Sequence[float], naive: Sequence[float]
) -> dict[str, float]:
    return {
        "images_per_core_s": round(median(one_thread), 1),
        "images_per_s_all_cores": round(median(all_cores), 1),
        "ratio": round(
            median(rate / reference for rate, reference in zip(one_thread, naive, strict=True)), 3
        ),
    }


def _differences(pictures: Sequence[bytes], recipes: Sequence[Preprocess]) -> dict[str, Any]:
    """Say how far the fast path's levels are from the exact one's."""
    levels = torch.cat(
        [
            (fast.int() - exact.int()).abs().flatten()
            for data in pictures
            for fast, exact in zip(
                decode_pixels(data, recipes, "fast") or (),
                decode_pixels(data, recipes, "exact") or (),
                strict=True,
            )
        ]
    )
    return {
        "max_level_difference": int(levels.max()),
        "share_one_level": round(float((levels == 1).float().mean()), 5),
        "share_more": float((levels > 1).double().mean()),
    }
