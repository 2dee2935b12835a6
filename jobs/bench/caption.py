"""Captioning beside transformers' own ``generate``: the same weights, images and knobs, in turn.

The models have the published sizes (BLIP-large, CLIP ViT-L/14) and random weights, loaded from files of the
published layout as a run loads them. Needs no Ray, no network and no weights. A CPU computes in float32 on one
thread, a GPU in bfloat16.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize as unit
from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipImageProcessorPil

import pipeline.decoding
from jobs.bench.compute import counted_flops, matmul_rate, one_thread, seconds
from jobs.bench.models import BLIP_LARGE, END_CHANCE, blip_large, end_after, save_captioner, save_ranker
from jobs.bench.pictures import jpeg
from pipeline.caption import Captioner
from pipeline.decoder import Decoder
from pipeline.decoding import NOTHING, GridSampler, RowSampler
from pipeline.device import compute_dtype, device_name, worker_device
from pipeline.pixels import decode_pixels, stack_pinned
from pipeline.rank import Ranker
from pipeline.sampling import caption_seeds, uniforms
from pipeline.storage import temporary_folder
from pipeline.weights import captioner_weights, ranker_weights
from schemas.config import CaptionConfig

_PICTURE_PX = (512, 512)
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
        agreement = _agreement(model, features_BPE)
        found: dict[str, Any] = {**agreement, **_counted(model, features_BPE[:2])}
        lowered = {} if dtype == torch.float32 else _lowered(model, features_BPE[:8], dtype)
        model, features_BPE = model.to(dtype), features_BPE.to(dtype)
        for name, chance, count in (("", 0.0, sizes.whole), ("_early_stop", END_CHANCE, sizes.ending)):
            found |= _decode(model, features_BPE[:count], chance, rounds, f"decode{name}")
        save_captioner(model.float(), folder / "captioner")
        save_ranker(folder / "ranker", ranker)
        del model, features_BPE
        found |= lowered | _end_to_end(folder, sizes, batch_size, rounds)
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


def _config(**knobs: Any) -> CaptionConfig:
    return CaptionConfig(**knobs)


def _prompt(model: BlipForConditionalGeneration) -> list[int]:
    return [model.config.text_config.bos_token_id]


def _uniforms(images: int, config: CaptionConfig) -> Tensor:
    seeds_BN = caption_seeds(0, [str(index) for index in range(images)], config.num_captions)
    return torch.from_numpy(uniforms(seeds_BN, config.max_length - 1))


def _sampler(
    model: BlipForConditionalGeneration, config: CaptionConfig, images: int
) -> RowSampler | GridSampler:
    """Return the engine as the Captioner builds it on this device."""
    on_gpu = model.device.type == "cuda"
    decoder = Decoder(model.text_decoder, compiled=on_gpu).eval()
    if on_gpu:
        return GridSampler(decoder, _prompt(model), config, images)
    return RowSampler(decoder, _prompt(model), config)


@torch.inference_mode()
def _generate(model: BlipForConditionalGeneration, features_BPE: Tensor, config: CaptionConfig) -> Tensor:
    """Sample with transformers, in the way its ``generate`` of the whole model calls the decoder."""
    return model.text_decoder.generate(
        input_ids=torch.tensor(_prompt(model), device=model.device).expand(len(features_BPE), -1),
        encoder_hidden_states=features_BPE,
        encoder_attention_mask=torch.ones(features_BPE.shape[:2], dtype=torch.long, device=model.device),
        do_sample=True,
        num_return_sequences=config.num_captions,
        top_k=config.top_k,
        top_p=config.top_p,
        repetition_penalty=config.repetition_penalty,
        min_length=config.min_length,
        max_length=config.max_length,
        eos_token_id=model.config.text_config.sep_token_id,
        pad_token_id=model.config.text_config.pad_token_id,
    )


# -- agreement -----------------------------------------------------------------------------------------------


@contextmanager
def _recorded_logits() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield a list that grows by (tokens, logits) of every row that the engine computes."""
    recorded: list[tuple[Tensor, Tensor]] = []
    nucleus = pipeline.decoding.nucleus

    def recording(logits_RV: Tensor, tokens_RL: Tensor, *rest: Any) -> Any:
        recorded.append((tokens_RL.clone(), logits_RV.clone()))
        return nucleus(logits_RV, tokens_RL, *rest)

    pipeline.decoding.nucleus = recording
    try:
        yield recorded
    finally:
        pipeline.decoding.nucleus = nucleus


@torch.inference_mode()
def _teacher_forced(model: BlipForConditionalGeneration, tokens_RL: Tensor, features_1PE: Tensor) -> Tensor:
    """Return transformers' logits after the last token."""
    features_RPE = features_1PE.expand(len(tokens_RL), -1, -1)
    return model.text_decoder(tokens_RL, encoder_hidden_states=features_RPE).logits[:, -1]


def _agreement(model: BlipForConditionalGeneration, features_BPE: Tensor) -> dict[str, Any]:
    """Compare logits in float32 where the engine samples, and greedy captions whole."""
    end_after(model, features_BPE[:1], END_CHANCE)
    decoder = Decoder(model.text_decoder).eval()
    config = _config()
    with _recorded_logits() as recorded:
        RowSampler(decoder, _prompt(model), config)(
            features_BPE[:1], _uniforms(1, config).to(model.device)
        )
    differences = [
        float((logits_RV - _teacher_forced(model, tokens_RL, features_BPE[:1])).abs().max())
        for tokens_RL, logits_RV in recorded
    ]
    greedy = _config(top_k=1, num_captions=1, repetition_penalty=1.0, min_length=0)
    ours_BT = RowSampler(decoder, _prompt(model), greedy)(
        features_BPE[:2], _uniforms(2, greedy).to(model.device)
    )[:, 0]
    with torch.inference_mode():
        theirs_BL = model.text_decoder.generate(
            input_ids=torch.tensor(_prompt(model), device=model.device).expand(2, -1),
            encoder_hidden_states=features_BPE[:2],
            do_sample=False,
            max_length=greedy.max_length,
            eos_token_id=decoder.end_id,
            pad_token_id=0,
        )
    theirs_BT = theirs_BL[:, 1:]
    said_BT = ours_BT[:, : theirs_BT.shape[1]]
    return {
        "max_logit_difference": max(differences),
        "logit_rows_compared": sum(len(tokens_RL) for tokens_RL, _ in recorded),
        "greedy_equal": bool(((said_BT == theirs_BT) | (said_BT == NOTHING)).all()),
    }


def _lowered(
    model: BlipForConditionalGeneration, features_BPE: Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the root-mean-square error of logits in the lower precision, ours and transformers'."""
    config = _config()
    errors: dict[str, list[float]] = {"ours": [], "transformers": []}
    with _recorded_logits() as recorded:
        RowSampler(Decoder(model.text_decoder).eval(), _prompt(model), config)(
            features_BPE[:1], _uniforms(1, config).to(model.device)
        )
    with torch.inference_mode():
        exact = [_teacher_forced(model, tokens_RL, features_BPE[:1]) for tokens_RL, _ in recorded]
        model.to(dtype)
        lowered_BPE = features_BPE.to(dtype)
        decoder = Decoder(model.text_decoder).eval()
        image_kv = decoder.image_keys_values(lowered_BPE[:1])
        for (tokens_RL, _), exact_RV in zip(recorded, exact, strict=True):
            for row, exact_V in zip(tokens_RL, exact_RV, strict=True):
                ours_1V, _ = decoder.prefix(row.tolist(), image_kv)
                theirs_1V = _teacher_forced(model, row[None], lowered_BPE[:1]).float()
                errors["ours"].append(float((ours_1V[0] - exact_V).square().mean()))
                errors["transformers"].append(float((theirs_1V[0] - exact_V).square().mean()))
    model.float()
    return {f"rms_logit_error_{name}": (sum(each) / len(each)) ** 0.5 for name, each in errors.items()}


# -- the decoder alone ---------------------------------------------------------------------------------------


def _counted(model: BlipForConditionalGeneration, features_BPE: Tensor) -> dict[str, Any]:
    """Count the decoder's operations per image, and the rows that the design allows for."""
    images, config = len(features_BPE), _config()
    decoder = Decoder(model.text_decoder).eval()
    uniforms_BNT = _uniforms(images, config).to(model.device)
    ours = RowSampler(decoder, _prompt(model), config)
    counts = {}
    for name, chance in (("", 0.0), ("_early_stop", END_CHANCE)):
        end_after(model, features_BPE, chance)
        decoder = Decoder(model.text_decoder).eval()
        ours = RowSampler(decoder, _prompt(model), config)
        said_BNT = ours(features_BPE, uniforms_BNT)
        flops = counted_flops(partial(ours, features_BPE, uniforms_BNT)) / images
        # Each token but an image's first ten comes of a row of its own; these ten come of one.
        rows = (int((said_BNT != NOTHING).sum()) / images) - (config.num_captions - 1)
        counts |= {
            f"gflop_ours{name}": round(flops / 1e9, 2),
            f"gflop_bound{name}": round(1.05 * (_GFLOP_IMAGE + _GFLOP_ROW * rows), 2),
        }
    end_after(model, features_BPE, 0.0)
    theirs = counted_flops(partial(_generate, model, features_BPE, config)) / images
    return {
        "decode_flops_ratio": round(theirs / 1e9 / counts["gflop_ours"], 2),
        **counts,
        "gflop_transformers": round(theirs / 1e9, 2),
    }


def _decode(
    model: BlipForConditionalGeneration, features_BPE: Tensor, chance: float, rounds: int, name: str
) -> dict[str, Any]:
    """Time the decoder alone, image features given, both ways in turn."""
    config, images = _config(), len(features_BPE)
    end_after(model, features_BPE[:8], chance)
    sampler = _sampler(model, config, images)
    uniforms_BNT = _uniforms(images, config).to(model.device)
    # transformers repeats every image ten times before it decodes: as much of the batch as its memory holds.
    share = min(images, 64)

    def theirs() -> None:
        for start in range(0, images, share):
            _generate(model, features_BPE[start : start + share], config)

    ours = partial(sampler, features_BPE, uniforms_BNT)
    said_BNT = ours()
    theirs()
    timed = _in_turn({"ours": ours, "theirs": theirs}, rounds, model.device)
    return {
        f"{name}_ratio" if chance == 0 else "decode_ratio_early_stop": _ratio(timed),
        f"{name}_mean_tokens": round(float((said_BNT != NOTHING).sum(-1).double().mean()), 2),
        f"{name}_s_per_image": round(median(timed["ours"]) / images, 6),
        f"{name}_s_per_image_transformers": round(median(timed["theirs"]) / images, 6),
    }


# -- from JPEG to the top two --------------------------------------------------------------------------------


def _end_to_end(folder: Path, sizes: _Sizes, batch_size: int, rounds: int) -> dict[str, Any]:
    """Time the way from JPEG bytes to each image's best two captions, both ways in turn."""
    device = worker_device()
    files = [jpeg(seed, _PICTURE_PX) for seed in range(min(sizes.top_two, 16))]
    ours = _ours(folder, min(batch_size, sizes.top_two))
    found: dict[str, Any] = {}
    timed: dict[str, list[float]] = {"ours": [], "theirs": []}
    per_image = {}
    for share in sizes.theirs:
        theirs = _theirs(folder, share)
        data = _repeated(files, share if device.type == "cuda" else sizes.top_two)
        theirs(data)
        per_image[share] = min(seconds(partial(theirs, data), device) for _ in range(2)) / len(data)
    best = min(per_image, key=lambda share: per_image[share])
    theirs = _theirs(folder, best)
    many, few = _repeated(files, sizes.top_two), _repeated(files, best)
    ours(many)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        ours(many)
        found["peak_bytes"] = torch.cuda.max_memory_reserved()
    for _ in range(rounds):
        timed["ours"].append(seconds(partial(ours, many), device) / len(many))
        timed["theirs"].append(seconds(partial(theirs, few), device) / len(few))
    return found | {
        "end_to_end_ratio": _ratio(timed),
        "images_per_s": round(1 / median(timed["ours"]), 3),
        "transformers_images_per_s": round(1 / median(timed["theirs"]), 3),
        "transformers_batch_size": best,
    }


def _ours(folder: Path, batch_size: int) -> Callable[[list[bytes]], Any]:
    config = _config(model=str(folder / "captioner"), batch_size=batch_size)
    captioner = Captioner(config, captioner_weights(config), 0)
    ranker = Ranker(ranker_weights(f"local-dir:{folder / 'ranker'}", ""), "auto", batch_size)
    recipes = [captioner.recipe, ranker.recipe]

    def top_two(files: list[bytes]) -> list[list[str]]:
        best = []
        for start in range(0, len(files), batch_size):
            pixels = [decode_pixels(data, recipes, "exact") for data in files[start : start + batch_size]]
            uids = [str(start + index) for index in range(len(pixels))]
            sampled = captioner.sample([each[0] for each in pixels], uids)
            texts = [[caption.text for caption in row] for row in captioner.texts(sampled)]
            scores = ranker.score_pixels(stack_pinned([each[1] for each in pixels]), texts)
            best += [
                [text for _, text in sorted(zip((s.similarity for s in row), words, strict=True))[-2:]]
                for row, words in zip(scores, texts, strict=True)
            ]
        return best

    return top_two


def _theirs(folder: Path, batch_size: int) -> Callable[[list[bytes]], Any]:
    device = worker_device()
    dtype = compute_dtype("auto", device)
    model = BlipForConditionalGeneration.from_pretrained(folder / "captioner", dtype=dtype).to(device).eval()
    processor = BlipImageProcessorPil.from_pretrained(folder / "captioner")
    words = AutoTokenizer.from_pretrained(folder / "captioner")
    clip, _, transform = open_clip.create_model_and_transforms(
        f"local-dir:{folder / 'ranker'}", precision="bf16" if dtype == torch.bfloat16 else "fp32"
    )
    clip, tokenizer, config = clip.to(device).eval(), open_clip.get_tokenizer("ViT-L-14"), _config()

    @torch.inference_mode()
    def top_two(files: list[bytes]) -> Tensor:
        best = []
        for start in range(0, len(files), batch_size):
            part = files[start : start + batch_size]
            blip_BCHW = processor([_open(data) for data in part], return_tensors="pt").pixel_values
            features_BPE = model.vision_model(blip_BCHW.to(device, dtype)).last_hidden_state
            captions = words.batch_decode(_generate(model, features_BPE, config), skip_special_tokens=True)
            clip_BCHW = torch.stack([transform(_open(data)) for data in part]).to(device, dtype)
            image_BE = unit(clip.encode_image(clip_BCHW).float(), dim=-1)
            text_BNE = unit(clip.encode_text(tokenizer(captions).to(device)).float(), dim=-1).unflatten(
                0, (len(part), -1)
            )
            best.append((image_BE[:, None] * text_BNE).sum(-1).topk(2).indices.cpu())
        return torch.cat(best)

    return top_two


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _repeated(files: list[bytes], count: int) -> list[bytes]:
    return [files[index % len(files)] for index in range(count)]


def _in_turn(
    ways: dict[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    timed: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            timed[name].append(seconds(way, device))
    return timed


def _ratio(timed: dict[str, list[float]]) -> float:
    return round(median(t / o for t, o in zip(timed["theirs"], timed["ours"], strict=True)), 2)
