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
    device_seconds_by_variant,
    matmul_rate,
    one_thread,
    peak_memory,
)
from jobs.bench.fixtures.machine import median_ratio
from pipeline.models.clip.tokenizer import ClipTokenizer
from pipeline.models.clip.towers import image_encoder, text_encoder
from pipeline.models.device import compute_dtype, device_name, worker_device

# One way to rank: "tokenize" texts, "text" and "image" to embeddings.
Side = dict[str, Callable[[Any], Tensor]]

# Every so many captions one fills the context, as some web captions do.
_LONG_EVERY = 40
# Start, end, and two words.
_MIN_TOKENS = 4


@torch.inference_mode()
def measure_rank(
    images: int, captions: int, mean_tokens: int, rounds: int, model_name: str = "ViT-L-14"
) -> dict[str, Any]:
    """Rank ``captions`` captions of each of ``images`` images, both ways in turn, ``rounds`` times.

    Args:
        mean_tokens: of a caption, start and end included.
    """
    device = worker_device()
    dtype = compute_dtype("auto", device)
    with one_thread(device):
        model, tokenizer = _clip(model_name, device, dtype), open_clip.get_tokenizer(model_name)
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
        # This warms up, too.
        counts = {name: _counts(side, inputs, images) for name, side in sides.items()}
        timed = {
            part: device_seconds_by_variant(
                {name: partial(side[part], values) for name, side in sides.items()},
                rounds,
                device,
            )
            for part, values in inputs.items()
        }
        rate = matmul_rate(device, dtype)
        similar = [similarities(side, tokens_TL, pixels_BCHW) for side in sides.values()]
    return {
        "model": model_name,
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "images": images,
        "captions": captions,
        "mean_tokens": round(float((tokens_TL != 0).sum(-1).double().mean()), 2),
        "rounds": rounds,
        **{
            f"{part}_ratio": median_ratio(timed[part]["open_clip"], timed[part]["capfilt"], 2)
            for part in ("text", "image", "tokenize")
        },
        **_agreement(*similar),
        "matmul_tflop_per_s": round(rate / 1e12, 3),
        **{
            name: counts[name]
            | _rates({part: timed[part][name] for part in inputs}, counts[name], images, rate)
            for name in sides
        },
    }


def random_captions(tokenizer: SimpleTokenizer, count: int, mean_tokens: int) -> list[str]:
    """Return distinct captions of words that are a token each; a few fill CLIP's context."""
    rng = np.random.default_rng(0)
    is_long = np.arange(count) % _LONG_EVERY == _LONG_EVERY // 2
    num_short = count - int(is_long.sum())
    # The others make up for the long ones, so that the mean is as asked for.
    total = mean_tokens * count - tokenizer.context_length * int(is_long.sum())
    mean = min(max(total // num_short, _MIN_TOKENS), tokenizer.context_length - 1)
    short = np.full(num_short, mean)
    short[: max(total - mean * num_short, 0)] += 1
    # Each pair keeps its sum: one caption is as much longer than the mean as the other is shorter.
    pairs = num_short // 2
    half_width = max(0, min(mean // 3, mean - _MIN_TOKENS, tokenizer.context_length - 2 - mean))
    shift = rng.integers(-half_width, half_width + 1, pairs)
    short[:pairs] += shift
    short[num_short - pairs :] -= shift
    lengths = np.full(count, tokenizer.context_length)
    lengths[~is_long] = short
    words = [word.removesuffix("</w>") for word in tokenizer.encoder if word.endswith("</w>")]
    words = [word for word in words if len(word) > 2 and word.isascii() and word.isalpha()]
    return [" ".join(rng.choice(words, length - 2)) for length in lengths]


def _clip(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    # OpenAI's weights, the recipe's, were trained with this activation.
    return open_clip.create_model(
        name, pretrained=None, precision=precision, device=device, force_quick_gelu=True
    ).eval()


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


def _counts(side: Side, inputs: dict[str, Any], images: int) -> dict[str, Any]:
    """Count operations of an image with its texts, and the memory of all."""
    gflop = {
        f"gflop_{part}": round(counted_flops(partial(side[part], inputs[part])) / images / 1e9, 3)
        for part in ("text", "image")
    }

    def rank() -> None:
        for part, values in inputs.items():
            side[part](values)

    return gflop | {"peak_bytes": peak_memory(rank, inputs["image"].device)}


def _rates(
    seconds_by_part: dict[str, list[float]], counts: dict[str, Any], images: int, matmul_rate: float
) -> dict[str, Any]:
    """Return the medians of the parts, and the rate of all parts of a round together."""
    total_s = median(map(sum, zip(*seconds_by_part.values(), strict=True)))
    flops = 1e9 * (counts["gflop_text"] + counts["gflop_image"]) * images
    return {f"{part}_s": round(median(values), 5) for part, values in seconds_by_part.items()} | {
        "images_per_s": round(images / total_s, 3),
        "matmul_share": round(flops / total_s / matmul_rate, 3),
    }


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
