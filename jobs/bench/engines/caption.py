"""``capfilt bench caption``: captioning beside transformers' ``generate``, and JPEG to the best two captions.

The same weights, images and settings, in turn. The models have the published sizes (BLIP-large, CLIP ViT-L/14) and
random weights, loaded from files of the published layout as a run loads them. A CPU computes in float32 on one thread,
a GPU in bfloat16. That both sides compute the same is tests/test_decoding.py; what only a GPU can show is compared
here: its graphs sample the tokens of the CPU's engine (``grid_same_tokens``).

The legend of the names: B images, N samples of an image, T tokens of a sample or texts, P image positions, E width,
L tokens of a text.
"""

import io
from collections.abc import Callable, Mapping
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipImageProcessorPil

from jobs.bench.engines.rank import open_clip_side, similarities
from jobs.bench.engines.shard import Stages
from jobs.bench.fixtures.compute import (
    counted_flops,
    device_seconds_by_variant,
    matmul_rate,
    one_thread,
    peak_memory,
    seconds,
)
from jobs.bench.fixtures.corpus import SyntheticCorpus
from jobs.bench.fixtures.machine import median_ratio
from jobs.bench.fixtures.models import (
    BLIP_LARGE,
    END_CHANCE,
    blip_large,
    end_after,
    image_features,
    save_captioner,
    save_ranker,
)
from jobs.bench.fixtures.pictures import jpegs
from pipeline.models.blip.decoder import BlipDecoder
from pipeline.models.blip.generation import NO_TOKEN, GridSampler, RowSampler
from pipeline.models.device import compute_dtype, device_name, worker_device
from pipeline.prefetch import decode_threads, prefetch_map
from pipeline.rng import caption_seeds, uniforms
from pipeline.storage.scratch import temporary_folder
from schemas.config import CaptionConfig

# Counted operations of the design, in GFLOP at BLIP-large: keys and values of an image, and one row of one step.
_GFLOP_IMAGE, _GFLOP_ROW = 21.8, 0.267
_GFLOP_TOWERS = {"vision": 382, "clip_image": 162, "clip_text": 26}
# Images of each part, by device: a CPU takes seconds for each.
_DECODED = {"cpu": 2, "cuda": 256}
_DECODED_ENDING = {"cpu": 4, "cuda": 256}
_TOP_TWO = {"cpu": 4, "cuda": 1024}
# transformers and open_clip run at the fastest of these.
_REFERENCE_BATCHES = {"cpu": (4,), "cuda": (16, 32, 64, 128)}
_PICTURE_PX = (512, 512)


def measure_caption(
    batch_size: int, rounds: int, captioner: Mapping[str, Any] = BLIP_LARGE, ranker: str = "ViT-L-14"
) -> dict[str, Any]:
    """Measure counted operations, the decoder alone, and JPEG to top two.

    Args:
        batch_size: capfilt's, on a GPU.
        rounds: pairs; the ratios are medians over them.
        captioner: its sizes; the shares and bounds that are derived from counted operations hold for BLIP-large.
        ranker: its architecture; as ``captioner``.
    """
    device = worker_device()
    dtype, kind = compute_dtype("auto", device), device.type
    with one_thread(device), temporary_folder() as folder:
        model = blip_large(device, sizes=captioner)
        features_BPE = image_features(model, _DECODED_ENDING[kind])
        result = {"grid_same_tokens": _grid_same_tokens(model, features_BPE[:1])}
        result |= _counted(model, features_BPE[:2])
        model, features_BPE = model.to(dtype), features_BPE.to(dtype)
        result |= _decode(model, features_BPE[: _DECODED[kind]], 0.0, rounds, "")
        result |= _decode(model, features_BPE, END_CHANCE, rounds, "_early_stop")
        save_captioner(model.float(), folder / "captioner")
        save_ranker(folder / "ranker", ranker)
        del model, features_BPE
        result |= _top_two(folder, batch_size, rounds)
        rate = matmul_rate(device, dtype)
    gflop = sum(_GFLOP_TOWERS.values()) + result["gflop_ours"]
    return {
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "batch_size": batch_size if kind == "cuda" else _DECODED_ENDING[kind],
        "rounds": rounds,
        **result,
        "matmul_tflop_per_s": round(rate / 1e12, 3),
        "matmul_share": round(result["images_per_s"] * gflop * 1e9 / rate, 3),
        "gpu_hours_129m": round(129e6 / result["images_per_s"] / 3600, 1),
    }


def _uniforms(model: BlipForConditionalGeneration, images: int) -> Tensor:
    """Return the numbers that decide the captions of so many images: float64 (B, N, T)."""
    config = CaptionConfig()
    seeds_BN = caption_seeds(0, [str(index) for index in range(images)], config.num_captions)
    return torch.from_numpy(uniforms(seeds_BN, config.max_length - 1)).to(model.device)


def _sampler(
    model: BlipForConditionalGeneration, images: int, grid: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the engine: on a grid as BlipCaptioner builds it on a GPU, else by rows as on a CPU."""
    decoder = BlipDecoder(model.text_decoder, compiled=grid and model.device.type == "cuda").eval()
    prompt_ids = [model.config.text_config.bos_token_id]
    if grid:
        return GridSampler(decoder, prompt_ids, CaptionConfig(), images)
    return RowSampler(decoder, prompt_ids, CaptionConfig())


@torch.inference_mode()
def _generate(model: BlipForConditionalGeneration, features_BPE: Tensor) -> Tensor:
    """Sample with transformers, in the way its ``generate`` of the whole model calls the decoder."""
    config, text = CaptionConfig(), model.config.text_config
    return model.text_decoder.generate(
        input_ids=torch.full((len(features_BPE), 1), text.bos_token_id, device=model.device),
        encoder_hidden_states=features_BPE,
        encoder_attention_mask=torch.ones(features_BPE.shape[:2], dtype=torch.long, device=model.device),
        do_sample=True,
        num_return_sequences=config.num_captions,
        top_k=config.top_k,
        top_p=config.top_p,
        repetition_penalty=config.repetition_penalty,
        min_length=config.min_length,
        max_length=config.max_length,
        eos_token_id=text.sep_token_id,
        pad_token_id=text.pad_token_id,
    )


def _grid_same_tokens(model: BlipForConditionalGeneration, features_1PE: Tensor) -> float:
    """Return the share of tokens that the grid of a GPU samples as the rows do: captured, then replayed."""
    end_after(model, features_1PE, END_CHANCE)
    uniforms_1NT = _uniforms(model, 1)
    rows_1NT = _sampler(model, 1, grid=False)(features_1PE, uniforms_1NT)
    grid = _sampler(model, 1, grid=True)
    same = [grid(features_1PE, uniforms_1NT) == rows_1NT for _ in range(2)]
    # Other shapes than those that are timed: they must not count among the compilations that torch allows.
    torch.compiler.reset()
    return round(float(torch.stack(same).double().mean()), 5)


def _counted(model: BlipForConditionalGeneration, features_BPE: Tensor) -> dict[str, Any]:
    """Count the decoder's operations per image, and what the design allows for (``gflop_bound``)."""
    images, uniforms_BNT = len(features_BPE), _uniforms(model, len(features_BPE))
    counts: dict[str, float] = {}
    for suffix, chance in (("_early_stop", END_CHANCE), ("", 0.0)):
        end_after(model, features_BPE, chance)
        sample = partial(_sampler(model, images, grid=False), features_BPE, uniforms_BNT)
        tokens_BNT = sample()
        # Each token but an image's first ten comes of a row of its own; these ten come of one.
        rows = int((tokens_BNT != NO_TOKEN).sum()) / images - (tokens_BNT.shape[1] - 1)
        counts[f"gflop_ours{suffix}"] = round(counted_flops(sample) / images / 1e9, 2)
        counts[f"gflop_bound{suffix}"] = round(1.05 * (_GFLOP_IMAGE + _GFLOP_ROW * rows), 2)
    reference = counted_flops(partial(_generate, model, features_BPE)) / images / 1e9
    ratio = round(reference / counts["gflop_ours"], 2)
    return {"decode_flops_ratio": ratio, **counts, "gflop_transformers": round(reference, 2)}


def _decode(
    model: BlipForConditionalGeneration, features_BPE: Tensor, end_chance: float, rounds: int, suffix: str
) -> dict[str, Any]:
    """Time the decoder alone, image features given, both ways in turn."""
    images = len(features_BPE)
    end_after(model, features_BPE[:8], end_chance)
    sampler = _sampler(model, images, grid=model.device.type == "cuda")
    capfilt = partial(sampler, features_BPE, _uniforms(model, images))

    def reference() -> None:
        # transformers repeats every image ten times before it decodes: as many at once as its memory holds.
        for part_BPE in features_BPE.split(64):
            _generate(model, part_BPE)

    tokens_BNT = capfilt()
    reference()
    timed = device_seconds_by_variant({"capfilt": capfilt, "reference": reference}, rounds, model.device)
    return {
        f"decode_ratio{suffix}": median_ratio(timed["reference"], timed["capfilt"], 2),
        f"decode{suffix}_mean_tokens": round(float((tokens_BNT != NO_TOKEN).sum(-1).double().mean()), 2),
        f"decode{suffix}_s_per_image": round(median(timed["capfilt"]) / images, 6),
        f"decode{suffix}_s_per_image_transformers": round(median(timed["reference"]) / images, 6),
    }


def _top_two(folder: Path, batch_size: int, rounds: int) -> dict[str, Any]:
    """Time a raw shard's way to captions and scores, and the libraries' own at the fastest of their batch sizes."""
    device = worker_device()
    images, pictures = _TOP_TWO[device.type], jpegs(_PICTURE_PX)
    corpus = SyntheticCorpus(folder, images, samples_per_shard=4 * images, pictures=pictures)
    capfilt = Stages(corpus, folder / "captioner", folder / "ranker", min(batch_size, images)).run
    capfilt()  # compiles and captures
    memory = {"peak_bytes": peak_memory(capfilt, device)} if device.type == "cuda" else {}
    files = list(islice(cycle(pictures), images))
    reference = _reference_top_two(folder)
    sizes = _REFERENCE_BATCHES[device.type]
    took_s = {}
    for size in sizes:
        run = partial(reference, files[: 2 * max(sizes)], size)
        run()
        took_s[size] = seconds(run, device)
    batch = min(took_s, key=lambda size: took_s[size])
    timed = device_seconds_by_variant(
        {"capfilt": capfilt, "reference": partial(reference, files, batch)},
        rounds,
        device,
    )
    return memory | {
        "end_to_end_ratio": median_ratio(timed["reference"], timed["capfilt"], 2),
        "images_per_s": round(images / median(timed["capfilt"]), 3),
        "transformers_images_per_s": round(images / median(timed["reference"]), 3),
        "transformers_batch_size": batch,
    }


def _reference_top_two(folder: Path) -> Callable[[list[bytes], int], Tensor]:
    device = worker_device()
    dtype = compute_dtype("auto", device)
    blip = BlipForConditionalGeneration.from_pretrained(folder / "captioner", dtype=dtype).to(device).eval()
    processor = BlipImageProcessorPil.from_pretrained(folder / "captioner")
    vocabulary = AutoTokenizer.from_pretrained(folder / "captioner")
    clip, _, transform = open_clip.create_model_and_transforms(
        f"local-dir:{folder / 'ranker'}", precision="bf16" if dtype == torch.bfloat16 else "fp32"
    )
    side = open_clip_side(clip.to(device).eval(), open_clip.get_tokenizer("ViT-L-14"))

    def prepare(data: bytes) -> tuple[Tensor, Tensor]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return processor(image, return_tensors="pt").pixel_values[0], transform(image)

    def collate(batch: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        return [torch.stack(part) for part in zip(*batch, strict=True)]

    @torch.inference_mode()
    def top_two(files: list[bytes], batch_size: int) -> Tensor:
        best = []
        # Decoded and collated ahead, on a GPU on all cores, as the workers of a data loader do.
        threads = decode_threads(1, feeds_gpu=device.type == "cuda")
        prepared = prefetch_map(prepare, files, ahead=2 * batch_size, threads=threads)
        batches = iter(lambda: list(islice(prepared, batch_size)), [])
        for pixels in prefetch_map(collate, batches, ahead=2, threads=1):
            blip_BCHW, clip_BCHW = (part.to(device, dtype) for part in pixels)
            features_BPE = blip.vision_model(blip_BCHW).last_hidden_state
            captions = vocabulary.batch_decode(_generate(blip, features_BPE), skip_special_tokens=True)
            best.append(similarities(side, side["tokenize"](captions), clip_BCHW).topk(2).indices.cpu())
        return torch.cat(best)

    return top_two
