"""The ranking beside open_clip's own: both towers and the tokenizer, in turn, on the same images and captions.

The CLIP has the published size and random weights. Needs no Ray, no network and no weights.

The legend of the names: B images, K captions of an image, T texts, L tokens, E width of the embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn
from torch.nn.functional import normalize

from jobs.bench.fixtures.compute import counted_flops, matmul_rate, one_thread, peak_memory, seconds
from pipeline.models.clip.tokenizer import ClipTokenizer
from pipeline.models.clip.towers import image_encoder, text_encoder
from pipeline.models.device import compute_dtype, device_name

# Every so many captions one fills the context, as some web captions do.
_LONG_EVERY = 40
_SHORTEST = 4
# The spread of the others' lengths around their mean: BLIP's captions end when they are done.
_SPREAD = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """One way to rank: from texts to tokens, from tokens to embeddings, from pixels to embeddings."""

    tokenize: Callable[[list[str]], Tensor]
    encode_text: Callable[[Tensor], Tensor]
    encode_image: Callable[[Tensor], Tensor]


def measure_rank(
    images: int,
    captions: int,
    mean_tokens: int,
    repeats: int,
    device: torch.device,
    model_name: str = "ViT-L-14",
) -> dict[str, Any]:
    """Rank ``captions`` captions of each of ``images`` images, both ways in turn, ``repeats`` times.

    Args:
        mean_tokens: of a caption, start and end included.
        device: a CPU computes in float32 on one thread, a GPU in bfloat16.
    """
    dtype = compute_dtype("auto", device)
    with one_thread(device), torch.inference_mode():
        model = _model(model_name, device, dtype)
        tokenizer = open_clip.get_tokenizer(model_name)
        texts = random_captions(tokenizer, images * captions, mean_tokens)
        size = model.visual.image_size
        height, width = (size, size) if isinstance(size, int) else size
        pixels_BCHW = torch.randn(images, 3, height, width, generator=torch.Generator().manual_seed(0))
        pixels_BCHW = pixels_BCHW.to(device, dtype)
        tokens_TL = tokenizer(texts)
        sides = {"open_clip": _theirs(model, tokenizer, device), "capfilt": _ours(model, tokenizer, images)}
        found = {name: _facts(side, texts, tokens_TL, pixels_BCHW) for name, side in sides.items()}
        timed = _timed_in_turn(sides, texts, tokens_TL, pixels_BCHW, repeats)
        rate = matmul_rate(device, dtype)
        similar = {
            name: _similarities(side, tokens_TL, pixels_BCHW, captions) for name, side in sides.items()
        }
        if dtype != torch.float32:
            exact = _theirs(_model(model_name, device, torch.float32), tokenizer, device)
            exact_BK = _similarities(exact, tokens_TL, pixels_BCHW.float(), captions)
            for name, similar_BK in similar.items():
                found[name]["rms_error"] = float((similar_BK - exact_BK).square().mean().sqrt())
    for name, parts in timed.items():
        total = [sum(round_) for round_ in zip(*parts.values(), strict=True)]
        found[name] |= {f"{part}_s": round(median(values), 5) for part, values in parts.items()}
        found[name]["images_per_s"] = round(images / median(total), 3)
        flops = 1e9 * (found[name]["gflop_text"] + found[name]["gflop_image"]) * images
        found[name]["matmul_share"] = round(flops / median(total) / rate, 3)
    return {
        "model": model_name,
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "images": images,
        "captions": captions,
        "mean_tokens": round(float((tokens_TL != 0).sum(-1).double().mean()), 2),
        "rounds": repeats,
        **{f"{part}_ratio": _ratio(timed, part) for part in ("text", "image", "tokenize")},
        **_agreement(similar["open_clip"], similar["capfilt"]),
        "matmul_tflop_per_s": round(rate / 1e12, 3),
        **found,
    }


def random_captions(tokenizer: SimpleTokenizer, count: int, mean_tokens: int) -> list[str]:
    """Return distinct captions of words that are a token each; a few fill CLIP's context."""
    rng = np.random.default_rng(0)
    longest = tokenizer.context_length
    lengths = rng.normal(mean_tokens, _SPREAD * mean_tokens, count).round().astype(int)
    is_long = np.arange(count) % _LONG_EVERY == _LONG_EVERY // 2
    lengths[is_long] = longest
    # The others make up for it, one token at a time.
    others = np.flatnonzero(~is_long)
    lengths[others] = lengths[others].clip(_SHORTEST, longest - 1)
    while (excess := lengths.sum() - mean_tokens * count) != 0:
        step = -int(np.sign(excess))
        room = others[(lengths[others] + step >= _SHORTEST) & (lengths[others] + step < longest)]
        if not len(room):
            break
        lengths[rng.choice(room, min(abs(excess), len(room)), replace=False)] += step
    words = [word.removesuffix("</w>") for word in tokenizer.encoder if word.endswith("</w>")]
    words = [word for word in words if len(word) > 2 and word.isascii() and word.isalpha()]
    return [" ".join(rng.choice(words, length - 2)) for length in lengths]


def _model(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    # OpenAI's weights, the recipe's, were trained with this activation.
    model = open_clip.create_model(
        name, pretrained=None, precision=precision, device=device, force_quick_gelu=True
    )
    return model.eval()


def _theirs(model: nn.Module, tokenizer: SimpleTokenizer, device: torch.device) -> _Side:
    return _Side(
        tokenize=tokenizer,
        encode_text=lambda tokens_TL: model.encode_text(tokens_TL.to(device)),
        encode_image=model.encode_image,
    )


def _ours(model: nn.Module, tokenizer: SimpleTokenizer, images: int) -> _Side:
    on_gpu = next(model.parameters()).is_cuda
    tokenize = ClipTokenizer(tokenizer)
    return _Side(
        tokenize=lambda texts: tokenize(texts)[0],
        encode_text=text_encoder(model, compiled=on_gpu),
        encode_image=image_encoder(model, compiled_batch=images if on_gpu else None),
    )


def _facts(side: _Side, texts: list[str], tokens_TL: Tensor, pixels_BCHW: Tensor) -> dict[str, Any]:
    """Count operations and memory; this warms up, too."""
    images = len(pixels_BCHW)

    def rank() -> None:
        side.encode_image(pixels_BCHW)
        side.encode_text(side.tokenize(texts))

    return {
        "gflop_text": round(counted_flops(partial(side.encode_text, tokens_TL)) / images / 1e9, 3),
        "gflop_image": round(counted_flops(partial(side.encode_image, pixels_BCHW)) / images / 1e9, 3),
        "peak_bytes": peak_memory(rank, pixels_BCHW.device),
    }


def _timed_in_turn(
    sides: dict[str, _Side], texts: list[str], tokens_TL: Tensor, pixels_BCHW: Tensor, repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of each round by side and part."""
    timed: dict[str, dict[str, list[float]]] = {
        name: {"tokenize": [], "text": [], "image": []} for name in sides
    }
    device = pixels_BCHW.device
    for _ in range(repeats):
        for part in ("tokenize", "text", "image"):
            for name, side in sides.items():
                run = {
                    "tokenize": partial(side.tokenize, texts),
                    "text": partial(side.encode_text, tokens_TL),
                    "image": partial(side.encode_image, pixels_BCHW),
                }[part]
                timed[name][part].append(seconds(run, device))
    return timed


def _ratio(timed: dict[str, dict[str, list[float]]], part: str) -> float:
    pairs = zip(timed["open_clip"][part], timed["capfilt"][part], strict=True)
    return round(median(theirs / ours for theirs, ours in pairs), 2)


def _similarities(side: _Side, tokens_TL: Tensor, pixels_BCHW: Tensor, captions: int) -> Tensor:
    """Return the similarity of each image with its own captions: (B, K)."""
    image_BE = normalize(side.encode_image(pixels_BCHW).float(), dim=-1)
    text_BKE = normalize(side.encode_text(tokens_TL).float(), dim=-1).unflatten(0, (-1, captions))
    return (image_BE[:, None] * text_BKE).sum(-1)


def _agreement(theirs_BK: Tensor, ours_BK: Tensor) -> dict[str, Any]:
    same_B = (theirs_BK.topk(2).indices == ours_BK.topk(2).indices).all(-1)
    return {
        "max_similarity_difference": float((theirs_BK - ours_BK).abs().max()),
        "same_top_two": float(same_B.float().mean()),
        "similarity_spread": round(float(theirs_BK.std(-1).mean()), 4),
    }
