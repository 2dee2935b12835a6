"""Maps the names of tensors between LAVIS or BLIP's repository, whose names capfilt uses, and Hugging Face.

One tensor of BLIP-2 differs beyond its name, the bias of the image encoder's attention: EVA has one for queries and one
for values; Hugging Face has one tensor of both, with zeros for the keys between them.
"""

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from schemas.errors import CapfiltError
from schemas.names import printable

Family = Literal["opt", "t5"]

# (LAVIS, Hugging Face). {n}: a number; {cross}: "cross" or nothing; {family}: of the language model; {rest}: anything.
# The first match counts. The image encoder is BLIP's too.
_VISION_PAIRS = (
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj.{rest}", "vision_model.embeddings.patch_embedding.{rest}"),
    ("visual_encoder.blocks.{n}.norm1.{rest}", "vision_model.encoder.layers.{n}.layer_norm1.{rest}"),
    ("visual_encoder.blocks.{n}.norm2.{rest}", "vision_model.encoder.layers.{n}.layer_norm2.{rest}"),
    (
        "visual_encoder.blocks.{n}.attn.proj.{rest}",
        "vision_model.encoder.layers.{n}.self_attn.projection.{rest}",
    ),
    ("visual_encoder.blocks.{n}.mlp.{rest}", "vision_model.encoder.layers.{n}.mlp.{rest}"),
)
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
    ("{family}_proj.{rest}", "language_projection.{rest}"),
    ("language_model.{rest}", "language_model.{rest}"),
    ("visual_encoder.blocks.{n}.attn.qkv.weight", "vision_model.encoder.layers.{n}.self_attn.qkv.weight"),
    *_VISION_PAIRS,
)
# (BLIP, Hugging Face's ``Blip*``): the text models have the same names in both.
_BLIP_PAIRS = (
    *_VISION_PAIRS,
    ("visual_encoder.blocks.{n}.attn.qkv.{rest}", "vision_model.encoder.layers.{n}.self_attn.qkv.{rest}"),
    ("visual_encoder.norm.{rest}", "vision_model.post_layernorm.{rest}"),
    ("{part}.{rest}", "{part}.{rest}"),
)
_FIELDS = {
    "part": "text_encoder|text_decoder|vision_proj|text_proj|itm_head",
    "n": r"\d+",
    "cross": "(?:cross)?",
    "family": "opt|t5",
    "rest": ".+",
}
_QKV_BIAS = "vision_model.encoder.layers.{}.self_attn.qkv.bias"
_LAVIS_BIAS = re.compile(r"visual_encoder\.blocks\.(\d+)\.attn\.([qv])_bias")
_HF_BIAS = re.compile(re.escape(_QKV_BIAS).replace(r"\{\}", r"(\d+)"))


def _pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    for field, expression in _FIELDS.items():
        pattern = pattern.replace(rf"\{{{field}\}}", f"(?P<{field}>{expression})")
    return re.compile(pattern)


_TO_HF = [(_pattern(lavis), hf) for lavis, hf in _PAIRS]
_FROM_HF = [(_pattern(hf), lavis) for lavis, hf in _PAIRS]
_BLIP_TO_HF = [(_pattern(blip), hf) for blip, hf in _BLIP_PAIRS]
_BLIP_FROM_HF = [(_pattern(hf), blip) for blip, hf in _BLIP_PAIRS]


def hf_name(name: str) -> str | None:
    """Return Hugging Face's name of a tensor; None if its classes do not have it."""
    return _rename(name, _TO_HF)


def lavis_name(name: str, family: Family | None) -> str | None:
    """Return LAVIS's name of a tensor of Hugging Face's; ``family`` is that of its language model."""
    return _rename(name, _FROM_HF, family)


def to_hf(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors that Hugging Face's classes have, under its names, and the others under LAVIS's."""
    mapped: dict[str, Tensor] = {}
    unmapped: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if bias := _LAVIS_BIAS.fullmatch(name):
            block = bias[1]
            q_D, v_D = (tensors[f"visual_encoder.blocks.{block}.attn.{part}_bias"] for part in "qv")
            mapped[_QKV_BIAS.format(block)] = torch.cat([q_D, torch.zeros_like(q_D), v_D])
        elif hf := hf_name(name):
            mapped[hf] = tensor
        else:
            unmapped[name] = tensor
    return mapped, unmapped


def from_hf(tensors: Mapping[str, Tensor], family: Family | None, where: str) -> dict[str, Tensor]:
    """Return the tensors under LAVIS's names.

    Args:
        tensors: under Hugging Face's names.
        family: of the language model, None where there is none.
        where: the folder, for messages.

    Raises:
        CapfiltError: a tensor that BLIP-2 does not have, or a bias of the keys, which EVA does not have.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if bias := _HF_BIAS.fullmatch(name):
            q_D, k_D, v_D = tensor.chunk(3)
            if k_D.any():
                raise CapfiltError(f"{where}: {name} has a bias of the keys; EVA's image encoder has none")
            renamed[f"visual_encoder.blocks.{bias[1]}.attn.q_bias"] = q_D.clone()
            renamed[f"visual_encoder.blocks.{bias[1]}.attn.v_bias"] = v_D.clone()
        elif lavis := lavis_name(name, family):
            renamed[lavis] = tensor
        else:
            raise CapfiltError(f"{where}: {printable(name)[:100]} is not a tensor of BLIP-2")
    return renamed


def blip_to_hf(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors that Hugging Face's ``Blip*`` have, under its names, and the others under BLIP's."""
    names = {name: _rename(name, _BLIP_TO_HF) for name in tensors}
    mapped = {hf: tensors[name] for name, hf in names.items() if hf}
    return mapped, {name: tensors[name] for name, hf in names.items() if not hf}


def blip_from_hf(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return the tensors of a ``Blip*`` under BLIP's names. Raises CapfiltError for one that BLIP does not have."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        blip = _rename(name, _BLIP_FROM_HF)
        if blip is None:
            raise CapfiltError(f"{where}: {printable(name)[:100]} is not a tensor of BLIP")
        renamed[blip] = tensor
    return renamed


def _rename(name: str, table: list[tuple[re.Pattern[str], str]], family: Family | None = None) -> str | None:
    for pattern, template in table:
        if match := pattern.fullmatch(name):
            return template.format(**{"family": family, **match.groupdict()})
    return None
