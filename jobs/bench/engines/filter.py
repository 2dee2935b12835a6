"""``capfilt bench filter``: match probabilities beside transformers' own classes of BLIP and BLIP-2, in turn.

The same weights, images and token ids. transformers as it is encodes an image for each of its texts; with the features
computed once, it still projects keys and values for each text, and pads. The model has a published size and random
weights. A CPU computes in float32 on one thread, a GPU in bfloat16.

The legend of the names: B images, P image positions, E width, T texts, L tokens of a text.
"""

from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForImageTextRetrieval,
    BlipConfig,
    BlipForImageTextRetrieval,
    PreTrainedModel,
)

from jobs.bench.fixtures.compute import (
    counted_flops,
    device_seconds_by_variant,
    matmul_rate,
    one_thread,
)
from jobs.bench.fixtures.machine import median_ratio
from jobs.bench.fixtures.models import BLIP_LARGE
from pipeline.models.blip.matcher import MatchEncoder
from pipeline.models.blip.qformer_matcher import QFormerMatchEncoder
from pipeline.models.blip.vision import VisionTower
from pipeline.models.device import compute_dtype, device_name, worker_device

Tokens = list[list[list[int]]]

# Salesforce/blip-itm-large-coco and blip-itm-base-coco.
_LARGE: dict[str, Any] = {**BLIP_LARGE, "image_text_hidden_size": 256}
_BASE_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
SIZES: dict[str, dict[str, Any]] = {
    "large": _LARGE,
    "base": _LARGE
    | {
        "text_config": _LARGE["text_config"] | {"encoder_hidden_size": 768},
        "vision_config": _LARGE["vision_config"] | _BASE_VISION,
    },
    # Salesforce/blip2-itm-vit-g.
    "blip2": {
        "model_type": "blip-2",
        "vision_config": {
            "hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16,
            "image_size": 224, "patch_size": 14, "initializer_range": 0.02,
        },
        "qformer_config": {
            "vocab_size": 30_523, "hidden_size": 768, "encoder_hidden_size": 1408, "num_hidden_layers": 12,
            "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512,
            "cross_attention_frequency": 2, "use_qformer_text_input": True,
        },
        "num_query_tokens": 32,
        "image_text_hidden_size": 256,
    },
}  # fmt: skip
# [ENC], which BLIP adds as its last token.
_FIRST = 30_523


@torch.inference_mode()
def measure_filter(
    images: int, captions: int, mean_tokens: int, rounds: int, sizes: Mapping[str, Any]
) -> dict[str, Any]:
    """Judge ``captions`` texts of each of ``images`` images, the three ways in turn, ``rounds`` times.

    Args:
        mean_tokens: of a text, the first and the last one included.
        sizes: of the model, as ``BlipConfig`` takes them, or with the type "blip-2" as ``Blip2Config`` does.
    """
    device = worker_device()
    dtype = compute_dtype("auto", device)
    with one_thread(device):
        model = _model(sizes, device, dtype)
        side = model.config.vision_config.image_size
        generator = torch.Generator().manual_seed(0)
        pixels_BCHW = torch.randn(images, 3, side, side, generator=generator).to(device, dtype)
        is_blip2 = isinstance(model, Blip2ForImageTextRetrieval)
        text = model.config.qformer_config if is_blip2 else model.config.text_config
        tokens = random_tokens(images, captions, mean_tokens, text.vocab_size)
        vision = VisionTower(model.vision_model)
        encode = QFormerMatchEncoder(model) if is_blip2 else MatchEncoder(model)
        variants: dict[str, Callable[[], Tensor]] = {
            "transformers": partial(_as_it_is, model, pixels_BCHW, tokens),
            "features_once": partial(_features_once, model, pixels_BCHW, tokens),
            "capfilt": lambda: encode(vision(pixels_BCHW), tokens),
        }
        # This warms up, too.
        gflop = {name: counted_flops(run) / images / 1e9 for name, run in variants.items()}
        probability_T = {name: run().float().softmax(-1)[:, 1] for name, run in variants.items()}
        timed = device_seconds_by_variant(variants, rounds, device)
        rate = matmul_rate(device, dtype)
    return {
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "images": images,
        "captions": captions,
        "mean_tokens": mean_tokens,
        "rounds": rounds,
        "ratio": median_ratio(timed["transformers"], timed["capfilt"], 2),
        "features_once_ratio": median_ratio(timed["features_once"], timed["capfilt"], 2),
        "max_difference": float((probability_T["transformers"] - probability_T["capfilt"]).abs().max()),
        "spread": round(float(probability_T["transformers"].std()), 4),
        "matmul_tflop_per_s": round(rate / 1e12, 3),
        **{
            name: {
                "gflop": round(gflop[name], 4),
                "images_per_s": round(images / median(timed[name]), 3),
                "matmul_share": round(gflop[name] * 1e9 * images / median(timed[name]) / rate, 3),
            }
            for name in variants
        },
    }


def random_tokens(images: int, captions: int, mean_tokens: int, vocabulary: int) -> Tokens:
    """Return token ids of texts for each image, their lengths spread evenly around the mean."""
    rng = np.random.default_rng(0)
    spread = mean_tokens // 2
    lengths = np.linspace(mean_tokens - spread, mean_tokens + spread, captions).round().astype(int)
    return [
        [
            [min(_FIRST, vocabulary - 1), *rng.integers(5, vocabulary - 2, length - 1).tolist()]
            for length in rng.permutation(lengths)
        ]
        for _ in range(images)
    ]


def _model(sizes: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    with device:
        if sizes.get("model_type") == "blip-2":
            model: PreTrainedModel = Blip2ForImageTextRetrieval(Blip2Config.from_dict(dict(sizes)))
            # transformers begins with queries that are all alike.
            torch.nn.init.normal_(model.query_tokens)
        else:
            model = BlipForImageTextRetrieval(BlipConfig.from_dict(dict(sizes)))
    # With their first values, small ones, the model says the same of every text.
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and name.startswith(("text_encoder", "embeddings", "qformer", "itm_head")):
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model.to(dtype).eval()


def _padded(tokens: Tokens, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the ids of all texts, padded to the longest, and which of them are tokens: (T, L)."""
    texts = [torch.tensor(ids) for of_image in tokens for ids in of_image]
    ids_TL = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    lengths_T = torch.tensor([len(ids) for ids in texts])
    return ids_TL.to(device), (torch.arange(ids_TL.shape[1]) < lengths_T[:, None]).long().to(device)


def _as_it_is(model: PreTrainedModel, pixels_BCHW: Tensor, tokens: Tokens) -> Tensor:
    ids_TL, mask_TL = _padded(tokens, pixels_BCHW.device)
    pixels_TCHW = pixels_BCHW.repeat_interleave(len(tokens[0]), 0)
    if isinstance(model, Blip2ForImageTextRetrieval):
        output = model(pixels_TCHW, ids_TL, attention_mask=mask_TL, use_image_text_matching_head=True)
        blip2_logits_T2: Tensor = output.logits_per_image
        return blip2_logits_T2
    logits_T2: Tensor = model(ids_TL, pixels_TCHW, attention_mask=mask_TL).itm_score
    return logits_T2


def _features_once(model: PreTrainedModel, pixels_BCHW: Tensor, tokens: Tokens) -> Tensor:
    ids_TL, mask_TL = _padded(tokens, pixels_BCHW.device)
    features_BPE = model.vision_model(pixels_BCHW).last_hidden_state
    features_TPE = features_BPE.repeat_interleave(len(tokens[0]), 0)
    image = {
        "encoder_hidden_states": features_TPE,
        "encoder_attention_mask": torch.ones(features_TPE.shape[:2], dtype=torch.long, device=ids_TL.device),
    }
    if isinstance(model, Blip2ForImageTextRetrieval):
        # As its forward does it.
        query_TND = model.query_tokens.expand(len(ids_TL), -1, -1)
        num_queries = query_TND.shape[1]
        hidden_TLD = model.qformer(
            query_embeds=model.embeddings(input_ids=ids_TL, query_embeds=query_TND),
            query_length=num_queries,
            attention_mask=torch.cat((mask_TL.new_ones(len(ids_TL), num_queries), mask_TL), dim=1),
            **image,
        ).last_hidden_state
        of_queries_TN2: Tensor = model.itm_head(hidden_TLD[:, :num_queries])
        return of_queries_TN2.mean(dim=1)
    hidden_TLD = model.text_encoder(ids_TL, attention_mask=mask_TL, **image).last_hidden_state
    logits_T2: Tensor = model.itm_head(hidden_TLD[:, 0])
    return logits_T2
