"""The first weights of BLIP's parts: an image encoder from a ViT or DeiT, text models from BERT (section 4.1).

What those do not have, such as the cross-attention, keeps its random values.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.models.checks import require_finite_weights
from schemas.errors import CapfiltError
from training.blip.text import TextModel
from training.blip.vision import ViT, resize_positions
from training.models.bert import copy_bert_weights, copy_tensor
from training.models.pretrained import read_weights

# (transformers, BLIP) parts of a tensor's name; those that contain others come first.
_RENAMED = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("encoder.layer.", "blocks."),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("layernorm", "norm"),
    ("attention.output.dense", "attn.proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)
_QUERY = "attention.attention.query."
_CLASS_TOKEN, _DISTILLATION_TOKEN = "embeddings.cls_token", "embeddings.distillation_token"


def read_vit(folder: Path, where: str) -> dict[str, Tensor]:
    """Return a ViT's or DeiT's weights under BLIP's names, from transformers' layout or timm's.

    Raises:
        CapfiltError: the files are damaged, or are not a ViT's.
    """
    tensors = read_weights(folder, where)
    require_finite_weights(tensors, f"{where}: {folder}")
    if "cls_token" in tensors:
        return tensors
    prefix = next((name.removesuffix(_CLASS_TOKEN) for name in tensors if name.endswith(_CLASS_TOKEN)), None)
    if prefix is None:
        raise CapfiltError(f"{where}: {folder} is not a ViT: it has no class token")
    return _from_transformers(
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    )


def _from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if _QUERY in name:
            # timm has queries, keys and values as one matrix.
            parts = (tensors[name.replace("query", part)] for part in ("query", "key", "value"))
            name, tensor = name.replace(_QUERY, "attn.qkv."), torch.cat(tuple(parts))
        for old, new in _RENAMED:
            name = name.replace(old, new)
        renamed[name] = tensor
    if _DISTILLATION_TOKEN in tensors:
        # DeiT's second token, behind the class token, has a position of its own.
        positions_1PE = renamed["pos_embed"]
        renamed["pos_embed"] = torch.cat((positions_1PE[:, :1], positions_1PE[:, 2:]), dim=1)
    return renamed


def copy_vit(vit: ViT, tensors: Mapping[str, Tensor]) -> None:
    """Copy a ViT's weights, the position embeddings resized to the encoder's own image size.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a tensor has another shape.
    """
    for name, parameter in vit.named_parameters():
        tensor = tensors[name]
        if name == "pos_embed":
            tensor = resize_positions(tensor, parameter.shape[1])
        copy_tensor(parameter, tensor, name)


def copy_text(model: nn.Module, bert: Mapping[str, Tensor]) -> None:
    """Copy BERT's weights to a text encoder or a decoder; [DEC] and [ENC] keep their values.

    Raises as ``copy_bert_weights``.

    Args:
        model: ``TextModel`` or ``TextDecoder``.
    """
    prefix = "bert." if isinstance(model, TextModel) else ""
    copy_bert_weights(model, bert, lambda name: prefix + name)
