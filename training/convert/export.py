"""Exports a trained model: as Hugging Face's ``Blip2*`` if its image encoder is EVA's, else in capfilt's own format.

Hugging Face's image encoder is EVA's ViT, without the norm before the blocks that a CLIP ViT has.

The own format: ``model.safetensors`` holds what was trained, under LAVIS's names; ``capfilt.json`` names the format
and its version, the stage and the resolved config, which names the frozen models. A Hugging Face export has that
file too, and ``capfilt_extra.safetensors`` with what its classes lack: the temperature and the head of captions.
"""

import copy
import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pipeline.models.files.model_files import OWN_CONFIG_FILE
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from training.blip.stage import BlipStage
from training.blip2.stage1 import Stage1
from training.blip2.stage2 import Stage2
from training.build import Blip2Stage, Stage
from training.convert.export_blip import write_hugging_face, write_repository_file
from training.convert.key_map import to_hf
from training.convert.read import EXTRA_FILE, OWN_FORMATS, OWN_VERSION, OWN_WEIGHTS_FILE
from training.models.language import FrozenLanguage
from training.models.layers import NORM_EPS
from training.models.pretrained import save_model
from training.models.vision import FrozenVision

Format = Literal["huggingface", "capfilt", "blip"]


def export_model(stage: Stage, folder: Path, checkpoint: str = "") -> Format:
    """Write a model as a new folder, or a model of BLIP as a file; return which format it is.

    Args:
        stage: with its frozen models in full precision, on the CPU.
        folder: must be absent or empty; with the ending ``.pth`` the file of BLIP's own repository.
        checkpoint: path of the checkpoint that the model is, by which ``capfilt trace`` finds what it learnt from.

    Raises:
        CapfiltError: the folder has files, or there is a file, or Hugging Face's classes cannot hold the model.
    """
    if folder.suffix == ".pth":
        _export_file(stage, folder)
        return "blip"
    if folder.is_dir() and any(folder.iterdir()):
        raise CapfiltError(f"{folder} is not empty; name a new folder")
    if isinstance(stage, Stage2):
        _require_one_width(stage.language)
    folder.mkdir(parents=True, exist_ok=True)
    write = write_hugging_face if isinstance(stage, BlipStage) else _write_blip2
    unmapped = write(stage, folder)
    if unmapped is None:
        save_file(_whole(stage.trainable_state()), folder / OWN_WEIGHTS_FILE)
    elif unmapped:
        save_file(_whole(unmapped), folder / EXTRA_FILE)
    description = {
        "format": OWN_FORMATS["blip2" if stage.config.blip is None else "blip"],
        "version": OWN_VERSION,
        "stage": stage.config.run.stage,
        "config": stage.config.model_dump(mode="json"),
        **({"checkpoint": checkpoint} if checkpoint else {}),
    }
    (folder / OWN_CONFIG_FILE).write_text(json.dumps(description, indent=1) + "\n")
    return "capfilt" if unmapped is None else "huggingface"


def _require_one_width(language: FrozenLanguage) -> None:
    """Refuse OPT-350m, whose embeddings are narrower than its blocks: Blip2 projects queries to the blocks' width."""
    width = language.model.config.hidden_size
    if language.width != width:
        raise CapfiltError(
            f"language.model = {language.config.model!r} has embeddings of width {language.width} "
            f"(word_embed_proj_dim) and blocks of width {width} (hidden_size); Hugging Face's Blip2 has no place for a "
            "projection to the former. capfilt evaluate reads the run itself"
        )


def _export_file(stage: Stage, path: Path) -> None:
    if not isinstance(stage, BlipStage):
        raise CapfiltError(f"{path}: only a model of BLIP is exported as a .pth; name a folder")
    if path.exists():
        raise CapfiltError(f"{path} is there already; name a new file")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_repository_file(stage, path)


def _write_blip2(stage: Blip2Stage, folder: Path) -> dict[str, Tensor] | None:
    """Write a stage as Hugging Face's class, as ``write_hugging_face`` a model of BLIP."""
    tower = stage.visual_encoder.tower.state_dict()
    vision, unmapped_vision = to_hf({f"visual_encoder.{name}": tensor for name, tensor in tower.items()})
    if unmapped_vision:
        return None
    trained, unmapped = to_hf(stage.trainable_state())
    write = _write_retrieval if isinstance(stage, Stage1) else _write_generation
    write(stage, vision | trained, folder)
    return unmapped


def _write_retrieval(stage: Stage1, tensors: dict[str, Tensor], folder: Path) -> None:
    assert stage.tokenizer is not None, "a stage with weights has a tokenizer"
    config = blip2_config(stage.config, stage.visual_encoder)
    save_model(Blip2ForImageTextRetrieval, config, tensors, folder)
    # Without a number of query tokens the processor adds no image tokens to a text, and the model expects none.
    _processor(stage.visual_encoder, stage.tokenizer.tokenizer, None).save_pretrained(folder)


def _write_generation(stage: Stage2, tensors: dict[str, Tensor], folder: Path) -> None:
    language = stage.language
    processor = _processor(stage.visual_encoder, language.tokenizer, stage.config.qformer.num_queries)
    image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token.content)
    language_model = _with_token(language.model, image_token)
    shape = copy.deepcopy(language_model.config)
    # generate() takes the end of text from the language model's own config, not from a generation_config beside it.
    shape.eos_token_id = language.end_of_text_id
    config = blip2_config(
        stage.config, stage.visual_encoder, text_config=shape, image_token_index=image_token
    )
    tensors |= {f"language_model.{name}": tensor for name, tensor in language_model.state_dict().items()}
    save_model(Blip2ForConditionalGeneration, config, tensors, folder)
    processor.save_pretrained(folder)


def _with_token(model: PreTrainedModel, token: int) -> PreTrainedModel:
    """Return a language model whose embeddings have a row for a token: where there is none, a copy with more rows.

    They are copies of the padding token's, which no model learns to write: a caption stays what it was.
    """
    rows = model.get_input_embeddings().num_embeddings
    if token < rows:
        return model
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(token + 1, mean_resizing=False)
    with torch.no_grad():
        for embeddings in (larger.get_input_embeddings(), larger.get_output_embeddings()):
            embeddings.weight[rows:] = embeddings.weight[model.config.pad_token_id]
    return larger


def blip2_config(config: PretrainConfig, vision: FrozenVision, **more: Any) -> Blip2Config:
    """Return Hugging Face's config of a model; ``more``: of the language model."""
    shape, tower = config.qformer, vision.tower
    block = tower.blocks[0]
    return Blip2Config(
        vision_config={
            "hidden_size": vision.width,
            "intermediate_size": block.mlp.fc1.out_features,
            "num_hidden_layers": len(tower.blocks),
            "num_attention_heads": block.attn.num_heads,
            "image_size": vision.image_size_px,
            "patch_size": tower.patch_embed.proj.weight.shape[-1],
            "hidden_act": "gelu",
            "layer_norm_eps": block.norm1.eps,
            "qkv_bias": block.attn.q_bias is not None,
        },
        qformer_config={
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.width,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "intermediate_size": shape.ffn_width,
            "hidden_dropout_prob": shape.dropout,
            "attention_probs_dropout_prob": shape.dropout,
            "max_position_embeddings": shape.max_positions,
            "layer_norm_eps": NORM_EPS,
            "cross_attention_frequency": shape.cross_attention_every,
            "encoder_hidden_size": vision.width,
            "use_qformer_text_input": config.run.stage == 1,
        },
        num_query_tokens=shape.num_queries,
        image_text_hidden_size=shape.projection_width,
        **more,
    )


def _processor(
    vision: FrozenVision, tokenizer: PreTrainedTokenizerBase, num_query_tokens: int | None
) -> Blip2Processor:
    # FrozenVision computes p * scale + shift with scale = 1 / (255 std) and shift = -mean / std.
    std_C = 1 / (255 * vision.scale_C.double().cpu())
    mean_C = -vision.shift_C.double().cpu() * std_C
    images = BlipImageProcessor(
        size={"height": vision.image_size_px, "width": vision.image_size_px},
        image_mean=[round(value, 8) for value in mean_C.tolist()],
        image_std=[round(value, 8) for value in std_C.tolist()],
    )
    # A copy: the processor adds a token to it.
    return Blip2Processor(images, copy.deepcopy(tokenizer), num_query_tokens=num_query_tokens)


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
