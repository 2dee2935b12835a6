"""``capfilt bench rank``: CLIP's towers and tokenizer beside open_clip's own, on the same images and captions in turn.

The CLIP has the published size and random weights. A CPU computes in float32 on one thread, a GPU in bfloat16.

The legend of the names: B images, K captions of an image, T texts, L tokens, E width of the embedding.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn
from torch.nn.functional import normalize

from jobs.bench.fixtures.compute import (
    counted_flops,
    in_turn,
    matmul_rate,
    median_ratio,
    one_thread,
    peak_memory,
)
from pipeline.models.clip.tokenizer import ClipTokenizer
from pipeline.models.clip.towers import image_encoder, text_encoder
from pipeline.models.device import compute_dtype, device_name, worker_device

# One way to rank: "tokenize" texts, "text" and "image" to embeddings.
Side = dict[str, Callable[[Any], Tensor]]

# Every so many captions one fills the context, as some web captions do.
_LONG_EVERY = 40
_MIN_TOKENS = 4
# The standard deviation of the others' lengths, as a share of their mean: BLIP's captions end when they are done.
_SPREAD = 0.2


def measure_rank(
    images: int, captions: int, mean_tokens: int, rounds: int, model_name: str = "ViT-L-14"
) -> dict[str, Any]:
    """Rank ``captions`` captions of each of ``images`` images, both ways in turn, ``rounds`` times.

    Args:
        mean_tokens: of a caption, start and end included.
    """
    device = worker_device()
    dtype = compute_dtype("auto", device)
    with one_thread(device), torch.inference_mode():
        model = _clip(model_name, device, dtype)
        tokenizer = open_clip.get_tokenizer(model_name)
        texts = random_captions(tokenizer, images * captions, mean_tokens)
        height, width = np.broadcast_to(model.visual.image_size, 2)
        generator = torch.Generator().manual_seed(0)
        pixels_BCHW = torch.randn(images, 3, height, width, generator=generator).to(device, dtype)
        tokens_TL = tokenizer(texts)
        inputs = {"tokenize": texts, "text": tokens_TL, "image": pixels_BCHW}
        sides = {
            "open_clip": open_clip_side(model, tokenizer),
            "capfilt": _capfilt_side(model, tokenizer, images),
        }
        result = {name: _rank_facts(side, inputs, images) for name, side in sides.items()}
        timed = {
            part: in_turn(
                {
                    "reference": partial(sides["open_clip"][part], what),
                    "capfilt": partial(sides["capfilt"][part], what),
                },
                rounds,
                device,
            )
            for part, what in inputs.items()
        }
        rate = matmul_rate(device, dtype)
        similar = {name: similarities(side, tokens_TL, pixels_BCHW) for name, side in sides.items()}
        if dtype != torch.float32:
            exact = open_clip_side(_clip(model_name, device, torch.float32), tokenizer)
            exact_BK = similarities(exact, tokens_TL, pixels_BCHW.float())
            for name, similar_BK in similar.items():
                result[name]["rms_error"] = float((similar_BK - exact_BK).square().mean().sqrt())
    for name, timed_as in (("open_clip", "reference"), ("capfilt", "capfilt")):
        parts = {part: by_side[timed_as] for part, by_side in timed.items()}
        total_s = median(map(sum, zip(*parts.values(), strict=True)))
        result[name] |= {f"{part}_s": round(median(values), 5) for part, values in parts.items()}
        flops = 1e9 * (result[name]["gflop_text"] + result[name]["gflop_image"]) * images
        result[name] |= {
            "images_per_s": round(images / total_s, 3),
            "matmul_share": round(flops / total_s / rate, 3),
        }
    return {
        "model": model_name,
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "images": images,
        "captions": captions,
        "mean_tokens": round(float((tokens_TL != 0).sum(-1).double().mean()), 2),
        "rounds": rounds,
        **{f"{part}_ratio": median_ratio(timed[part]) for part in ("text", "image", "tokenize")},
        **_agreement(similar["open_clip"], similar["capfilt"]),
        "matmul_tflop_per_s": round(rate / 1e12, 3),
        **result,
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
    lengths[others] = lengths[others].clip(_MIN_TOKENS, longest - 1)
    while (excess := lengths.sum() - mean_tokens * count) != 0:
        step = -int(np.sign(excess))
        room = others[(lengths[others] + step >= _MIN_TOKENS) & (lengths[others] + step < longest)]
        if not len(room):
            break
        lengths[rng.choice(room, min(abs(excess), len(room)), replace=False)] += step
    words = [word.removesuffix("</w>") for word in tokenizer.encoder if word.endswith("</w>")]
    words = [word for word in words if len(word) > 2 and word.isascii() and word.isalpha()]
    return [" ".join(rng.choice(words, length - 2)) for length in lengths]


def _clip(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    # OpenAI's weights, the recipe's, were trained with this activation.
    model = open_clip.create_model(
        name, pretrained=None, precision=precision, device=device, force_quick_gelu=True
    )
    return model.eval()


def open_clip_side(model: nn.Module, tokenizer: SimpleTokenizer) -> Side:
    """Return open_clip's own way: texts to tokens, tokens to embeddings, pixels to embeddings."""
    device = next(model.parameters()).device
    return {
        "tokenize": tokenizer,
        "text": lambda tokens_TL: model.encode_text(tokens_TL.to(device)),
        "image": model.encode_image,
    }


def _capfilt_side(model: nn.Module, tokenizer: SimpleTokenizer, images: int) -> Side:
    on_gpu = next(model.parameters()).is_cuda
    tokenize = ClipTokenizer(tokenizer)
    return {
        "tokenize": lambda texts: tokenize(texts)[0],
        "text": text_encoder(model, compiled=on_gpu),
        "image": image_encoder(model, compiled_batch=images if on_gpu else None),
    }


def _rank_facts(side: Side, inputs: dict[str, Any], images: int) -> dict[str, Any]:
    """Count operations and memory; this warms up, too."""

    def rank() -> None:
        for part, values in inputs.items():
            side[part](values)

    gflop = {
        f"gflop_{part}": round(counted_flops(partial(side[part], inputs[part])) / images / 1e9, 3)
        for part in ("text", "image")
    }
    return gflop | {"peak_bytes": peak_memory(rank, inputs["image"].device)}


def similarities(side: Side, tokens_TL: Tensor, pixels_BCHW: Tensor) -> Tensor:
    """Return the cosine of each image with its own captions: (B, K), texts in the order of their images."""
    image_BE = normalize(side["image"](pixels_BCHW).float(), dim=-1)
    text_BKE = normalize(side["text"](tokens_TL).float(), dim=-1).unflatten(0, (len(image_BE), -1))
    return (image_BE[:, None] * text_BKE).sum(-1)


def _agreement(reference_BK: Tensor, capfilt_BK: Tensor) -> dict[str, Any]:
    same_B = (reference_BK.topk(2).indices == capfilt_BK.topk(2).indices).all(-1)
    return {
        "max_similarity_difference": float((reference_BK - capfilt_BK).abs().max()),
        "same_top_two": float(same_B.float().mean()),
        "similarity_spread": round(float(reference_BK.std(-1).mean()), 4),
    }
