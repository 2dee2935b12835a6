"""What BLIP-2's tensors are called here, which is as in LAVIS, and in Hugging Face's ``Blip2*``: both ways.

A difference beyond names: the bias of the image encoder's attention. EVA has one of the queries and one of the
values, Hugging Face the two and zeros for the keys between them, in one tensor.
"""

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from schemas.errors import CapfiltError
from schemas.names import printable

Family = Literal["opt", "t5"]

# {n}: a number; {cross}: "cross" or nothing; {rest}: anything. The first pair that fits a name counts.
_PAIRS = (
    ("query_tokens", "query_tokens"),
    ("ln_vision.{rest}", "vision_model.post_layernorm.{rest}"),
    ("Qformer.bert.embeddings.LayerNorm.{rest}", "qformer.layernorm.{rest}"),
    ("Qformer.bert.embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight"),
    ("Qformer.bert.embeddings.position_embeddings.weight", "embeddings.position_embeddings.weight"),
    (
        "Qformer.bert.encoder.layer.{n}.{cross}attention.self.{rest}",
        "qformer.encoder.layer.{n}.{cross}attention.attention.{rest}",
    ),
    ("Qformer.bert.encoder.layer.{n}.{rest}", "qformer.encoder.layer.{n}.{rest}"),
    ("vision_proj.{rest}", "vision_projection.{rest}"),
    ("text_proj.{rest}", "text_projection.{rest}"),
    ("itm_head.{rest}", "itm_head.{rest}"),
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj.{rest}", "vision_model.embeddings.patch_embedding.{rest}"),
    ("visual_encoder.blocks.{n}.norm1.{rest}", "vision_model.encoder.layers.{n}.layer_norm1.{rest}"),
    ("visual_encoder.blocks.{n}.norm2.{rest}", "vision_model.encoder.layers.{n}.layer_norm2.{rest}"),
    ("visual_encoder.blocks.{n}.attn.qkv.weight", "vision_model.encoder.layers.{n}.self_attn.qkv.weight"),
    (
        "visual_encoder.blocks.{n}.attn.proj.{rest}",
        "vision_model.encoder.layers.{n}.self_attn.projection.{rest}",
    ),
    ("visual_encoder.blocks.{n}.mlp.{rest}", "vision_model.encoder.layers.{n}.mlp.{rest}"),
)
_FIELDS = {"n": r"\d+", "cross": "(?:cross)?", "rest": ".+"}
_QKV_BIAS = "vision_model.encoder.layers.{}.self_attn.qkv.bias"
_OUR_BIAS = re.compile(r"visual_encoder\.blocks\.(\d+)\.attn\.([qv])_bias")
_THEIR_BIAS = re.compile(re.escape(_QKV_BIAS).replace(r"\{\}", r"(\d+)"))


def _pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    for field, expression in _FIELDS.items():
        pattern = pattern.replace(rf"\{{{field}\}}", f"(?P<{field}>{expression})")
    return re.compile(pattern)


_TO_HF = [(_pattern(ours), theirs) for ours, theirs in _PAIRS]
_FROM_HF = [(_pattern(theirs), ours) for ours, theirs in _PAIRS]


def hf_name(name: str) -> str | None:
    """Return what Hugging Face calls a tensor of ours; None where it has no home there."""
    if name.startswith(("opt_proj.", "t5_proj.")):
        return f"language_projection.{name.partition('.')[2]}"
    if name.startswith("language_model."):
        return name
    return _rename(name, _TO_HF)


def our_name(name: str, family: Family | None) -> str | None:
    """Return what we call a tensor of Hugging Face's; ``family`` is that of its language model."""
    if name.startswith("language_projection."):
        return f"{family}_proj.{name.partition('.')[2]}"
    if name.startswith("language_model."):
        return name
    return _rename(name, _FROM_HF)


def to_hf(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors under Hugging Face's names, and those that have no home there under ours."""
    mapped: dict[str, Tensor] = {}
    unmapped: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if bias := _OUR_BIAS.fullmatch(name):
            block = bias[1]
            q_D, v_D = (tensors[f"visual_encoder.blocks.{block}.attn.{part}_bias"] for part in "qv")
            mapped[_QKV_BIAS.format(block)] = torch.cat([q_D, torch.zeros_like(q_D), v_D])
        elif there := hf_name(name):
            mapped[there] = tensor
        else:
            unmapped[name] = tensor
    return mapped, unmapped


def from_hf(tensors: Mapping[str, Tensor], family: Family | None, where: str) -> dict[str, Tensor]:
    """Return the tensors under our names.

    Args:
        tensors: under Hugging Face's names.
        family: of the language model, None where there is none.
        where: the folder, for messages.

    Raises:
        CapfiltError: a tensor that BLIP-2 has not, or a bias of the keys, which EVA has no place for.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if bias := _THEIR_BIAS.fullmatch(name):
            q_D, k_D, v_D = tensor.chunk(3)
            if k_D.any():
                raise CapfiltError(f"{where}: {name} has a bias of the keys; EVA's image encoder has none")
            ours[f"visual_encoder.blocks.{bias[1]}.attn.q_bias"] = q_D.clone()
            ours[f"visual_encoder.blocks.{bias[1]}.attn.v_bias"] = v_D.clone()
        elif here := our_name(name, family):
            ours[here] = tensor
        else:
            raise CapfiltError(f"{where}: {printable(name)[:100]} is not a tensor of BLIP-2")
    return ours


def _rename(name: str, table: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in table:
        if match := pattern.fullmatch(name):
            return template.format(**match.groupdict())
    return None
