"""Captioning beside transformers' own ``generate``: the same weights, images and knobs, in turn.

The models have the published sizes (BLIP-large, CLIP ViT-L/14) and random weights, loaded from files of the
published layout as a run loads them. Needs no Ray, no network and no weights. A CPU computes in float32 on one
thread, a GPU in bfloat16.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import BlipForConditionalGeneration

from jobs.bench.agreement import agreement, lowered_agreement
from jobs.bench.fixtures.compute import counted_flops, in_turn, matmul_rate, median_ratio, one_thread
from jobs.bench.fixtures.models import (
    BLIP_LARGE,
    END_CHANCE,
    blip_large,
    end_after,
    save_captioner,
    save_ranker,
)
from jobs.bench.generate import engine, generate, prompt_ids, uniform_numbers
from jobs.bench.toptwo import measure_top_two
from pipeline.corpus.scratch import temporary_folder
from pipeline.models.blip.decoder import Decoder
from pipeline.models.blip.generation import NO_TOKEN, RowSampler
from pipeline.models.device import compute_dtype, device_name, worker_device
from schemas.config import CaptionConfig

# Counted operations of the design, in GF at BLIP-large: keys and values of an image, and one row of one step.
_GFLOP_IMAGE, _GFLOP_ROW = 21.8, 0.267
_GFLOP_TOWERS = {"vision": 382, "clip_image": 162, "clip_text": 26}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """How many images each part takes, by device: a CPU takes seconds for each."""

    whole: int
    ending: int
    top_two: int
    theirs: tuple[int, ...]


_SIZES = {
    "cpu": _Sizes(whole=2, ending=4, top_two=4, theirs=(4,)),
    "cuda": _Sizes(whole=256, ending=256, top_two=1024, theirs=(16, 32, 64, 128)),
}


def measure_caption(
    batch_size: int, rounds: int, captioner: Mapping[str, Any] = BLIP_LARGE, ranker: str = "ViT-L-14"
) -> dict[str, Any]:
    """Measure agreement, counted operations, the decoder alone, and JPEG to top two.

    Args:
        batch_size: of ours on a GPU.
        rounds: pairs; the ratios are medians over them.
        captioner: its sizes; the shares and bounds that are derived from counted operations hold for BLIP-large.
        ranker: its architecture; as ``captioner``.
    """
    device = worker_device()
    dtype = compute_dtype("auto", device)
    sizes = _SIZES[device.type]
    with one_thread(device), temporary_folder() as folder:
        model = blip_large(device, sizes=captioner)
        features_BPE = _features(model, sizes.ending)
        found: dict[str, Any] = {**agreement(model, features_BPE), **_counted(model, features_BPE[:2])}
        lowered = {} if dtype == torch.float32 else lowered_agreement(model, features_BPE[:8], dtype)
        model, features_BPE = model.to(dtype), features_BPE.to(dtype)
        for name, chance, count in (("", 0.0, sizes.whole), ("_early_stop", END_CHANCE, sizes.ending)):
            found |= _decode(model, features_BPE[:count], chance, rounds, f"decode{name}")
        save_captioner(model.float(), folder / "captioner")
        save_ranker(folder / "ranker", ranker)
        del model, features_BPE
        found |= lowered | measure_top_two(folder, sizes.top_two, batch_size, sizes.theirs, rounds)
        rate = matmul_rate(device, dtype)
    total_gflop = sum(_GFLOP_TOWERS.values()) + found["gflop_ours"]
    return {
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "batch_size": batch_size if device.type == "cuda" else sizes.ending,
        "rounds": rounds,
        **found,
        "matmul_tflop_per_s": round(rate / 1e12, 3),
        "matmul_share": round(found["images_per_s"] * total_gflop * 1e9 / rate, 3),
        "gpu_hours_129m": round(129e6 / found["images_per_s"] / 3600, 1),
    }


def _features(model: BlipForConditionalGeneration, images: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    pixels_BCHW = torch.randn(min(images, 8), 3, 384, 384, generator=generator)
    with torch.inference_mode():
        features = model.vision_model(pixels_BCHW.to(model.device)).last_hidden_state
    return features.repeat(-(-images // len(features)), 1, 1)[:images]


def _counted(model: BlipForConditionalGeneration, features_BPE: Tensor) -> dict[str, Any]:
    """Count the decoder's operations per image, and the rows that the design allows for."""
    images, config = len(features_BPE), CaptionConfig()
    decoder = Decoder(model.text_decoder).eval()
    uniforms_BNT = uniform_numbers(images, config).to(model.device)
    ours = RowSampler(decoder, prompt_ids(model), config)
    counts = {}
    for name, chance in (("", 0.0), ("_early_stop", END_CHANCE)):
        end_after(model, features_BPE, chance)
        decoder = Decoder(model.text_decoder).eval()
        ours = RowSampler(decoder, prompt_ids(model), config)
        said_BNT = ours(features_BPE, uniforms_BNT)
        flops = counted_flops(partial(ours, features_BPE, uniforms_BNT)) / images
        # Each token but an image's first ten comes of a row of its own; these ten come of one.
        rows = (int((said_BNT != NO_TOKEN).sum()) / images) - (config.num_captions - 1)
        counts |= {
            f"gflop_ours{name}": round(flops / 1e9, 2),
            f"gflop_bound{name}": round(1.05 * (_GFLOP_IMAGE + _GFLOP_ROW * rows), 2),
        }
    end_after(model, features_BPE, 0.0)
    theirs = counted_flops(partial(generate, model, features_BPE, config)) / images
    return {
        "decode_flops_ratio": round(theirs / 1e9 / counts["gflop_ours"], 2),
        **counts,
        "gflop_transformers": round(theirs / 1e9, 2),
    }


def _decode(
    model: BlipForConditionalGeneration, features_BPE: Tensor, chance: float, rounds: int, name: str
) -> dict[str, Any]:
    """Time the decoder alone, image features given, both ways in turn."""
    config, images = CaptionConfig(), len(features_BPE)
    end_after(model, features_BPE[:8], chance)
    sampler = engine(model, config, images)
    uniforms_BNT = uniform_numbers(images, config).to(model.device)
    # transformers repeats every image ten times before it decodes: as much of the batch as its memory holds.
    share = min(images, 64)

    def theirs() -> None:
        for start in range(0, images, share):
            generate(model, features_BPE[start : start + share], config)

    ours = partial(sampler, features_BPE, uniforms_BNT)
    said_BNT = ours()
    theirs()
    timed = in_turn({"ours": ours, "theirs": theirs}, rounds, model.device)
    return {
        f"{name}_ratio" if chance == 0 else "decode_ratio_early_stop": median_ratio(timed),
        f"{name}_mean_tokens": round(float((said_BNT != NO_TOKEN).sum(-1).double().mean()), 2),
        f"{name}_s_per_image": round(median(timed["ours"]) / images, 6),
        f"{name}_s_per_image_transformers": round(median(timed["theirs"]) / images, 6),
    }
