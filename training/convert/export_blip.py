"""Exports a model of BLIP: as Hugging Face's ``Blip*``, or as a file of BLIP's own repository.

A captioner becomes ``BlipForConditionalGeneration`` and a filter ``BlipForImageTextRetrieval``: folders that a corpus
takes as ``caption.model`` and ``filter.model``. Hugging Face has no class of a pretrained MED, which has both text
models: it is exported in capfilt's own format, under BLIP's names.
"""

import re
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    PretrainedConfig,
)

from pipeline.models.transformers_loader import load_tokenizer
from training.blip.stage import BlipStage
from training.blip.vision import VIT_NORM_EPS
from training.convert.key_map import blip_to_hf
from training.models.layers import NORM_EPS
from training.models.pretrained import save_model, tokenizer_folder

_HEAD = "text_decoder.cls.predictions"
_EMBEDDINGS = "text_decoder.bert.embeddings.word_embeddings.weight"
# The parts that have momentum encoders.
_OF_ITC = re.compile(r"(visual_encoder|text_encoder|vision_proj|text_proj)\.(.+)")


def write_hugging_face(stage: BlipStage, folder: Path) -> dict[str, Tensor] | None:
    """Write a captioner or a filter as Hugging Face's class; return the tensors that it has no place for.

    None where there is no class, and nothing was written.
    """
    if stage.encodes_text and stage.decodes_text:
        return None
    kind = BlipForImageTextRetrieval if stage.encodes_text else BlipForConditionalGeneration
    mapped, unmapped = blip_to_hf(_with_second_names(stage.trainable_state()))
    save_model(kind, blip_config(stage), mapped, folder)
    name = stage.shape.text.tokenizer
    key = "blip.text.tokenizer"
    load_tokenizer(tokenizer_folder(name, "main", key), key).save_pretrained(folder)
    side = stage.visual_encoder.image_size_px
    BlipImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    return unmapped


def write_repository_file(stage: BlipStage, path: Path) -> None:
    """Write ``{"model": {name: tensor}}`` with all that BLIP's loaders ask for (models/blip.py, blip_retrieval.py).

    Shared tensors stand under both names, but are stored once. So are the encoders: BLIP's retrieval training begins
    with the momentum encoders of the file, and here they are the encoders themselves.
    """
    auxiliary = stage.auxiliary_state()
    tensors = {name: t.cpu() for name, t in stage.state_dict().items() if name not in auxiliary}
    tensors = _with_second_names(tensors) | _position_ids(stage)
    torch.save({"model": tensors | _momentum_encoders(stage, tensors)}, path)


def _position_ids(stage: BlipStage) -> dict[str, Tensor]:
    """Return the buffer of BLIP's text models that numbers positions; its captioner is not loaded without."""
    ids_1L = torch.arange(stage.shape.text.max_positions)[None]
    prefixes = ["text_encoder"] * stage.encodes_text + ["text_decoder.bert"] * stage.decodes_text
    return {f"{prefix}.embeddings.position_ids": ids_1L for prefix in prefixes}


def _momentum_encoders(stage: BlipStage, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of ITC's encoders under the names of the momentum encoders."""
    names = {name: _OF_ITC.fullmatch(name) for name in tensors} if stage.encodes_text else {}
    return {f"{match[1]}_m.{match[2]}": tensors[name] for name, match in names.items() if match}


def _with_second_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the names under which others have the head's matrix and bias once more."""
    if f"{_HEAD}.bias" not in tensors:
        return tensors
    matrix_VD = tensors.get(f"{_HEAD}.decoder.weight", tensors.get(_EMBEDDINGS))
    assert matrix_VD is not None, "a decoder has word embeddings"
    return tensors | {f"{_HEAD}.decoder.weight": matrix_VD, f"{_HEAD}.decoder.bias": tensors[f"{_HEAD}.bias"]}


def blip_config(stage: BlipStage) -> PretrainedConfig:
    """Return Hugging Face's config of a model."""
    shape, config = stage.shape, stage.config
    vision, text = shape.vision, shape.text
    assert stage.tokenizer is not None, "a model with weights has a tokenizer"
    end_id = stage.tokenizer.tokenizer.sep_token_id
    return BlipConfig(
        vision_config={
            "hidden_size": vision.width,
            "intermediate_size": round(vision.mlp_ratio * vision.width),
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": config.data.image_size_px,
            "patch_size": vision.patch_px,
            "layer_norm_eps": VIT_NORM_EPS,
        },
        text_config={
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "encoder_hidden_size": vision.width,
            "intermediate_size": text.ffn_width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "max_position_embeddings": text.max_positions,
            "layer_norm_eps": NORM_EPS,
            "hidden_dropout_prob": text.dropout,
            "attention_probs_dropout_prob": text.dropout,
            # Readers of a filter take [ENC] to be the token behind this one.
            "bos_token_id": stage.begin_id if stage.decodes_text else stage.match_id - 1,
            "eos_token_id": end_id,
            "sep_token_id": end_id,
            "pad_token_id": stage.tokenizer.tokenizer.pad_token_id,
            "label_smoothing": config.objective.label_smoothing,
        },
        image_text_hidden_size=shape.projection_width,
    )
