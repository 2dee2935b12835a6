"""The demo's models: the full-size classes at widths that two cores can train.

Each folder of weights has the layout of the published models, so that the production loaders read it unchanged. Its
config and tokenizer say what the model is: a word of the world's grammar is a token, weights start at 1 / sqrt(width),
since BLIP's and OPT's 0.02 is right at the published widths only. Training replaces the weights alone.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BlipForConditionalGeneration,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5ForConditionalGeneration,
)

WEIGHTS_DIR = Path(__file__).parent.parent / "weights"
CAPTIONER_DIR = WEIGHTS_DIR / "captioner"
FILTER_DIR = WEIGHTS_DIR / "filter"
VIT_DIR = WEIGHTS_DIR / "vit"
RANKER_DIR = WEIGHTS_DIR / "ranker"
TOWER_DIR = WEIGHTS_DIR / "tower"
OPT_DIR = WEIGHTS_DIR / "opt"
T5_DIR = WEIGHTS_DIR / "t5"

_CLIP_CONFIG, _CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_CLASSES = {"blip": BlipForConditionalGeneration, "opt": OPTForCausalLM, "t5": T5ForConditionalGeneration}


def untrained(folder: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """Make the model that a folder describes, at random weights, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if (folder / _CLIP_CONFIG).exists():
        shape = json.loads((folder / _CLIP_CONFIG).read_text())["model_cfg"]
        kind = open_clip.CustomTextCLIP if shape.pop("custom_text", False) else open_clip.CLIP
        return kind(**shape), tokenizer
    config = AutoConfig.from_pretrained(folder)
    return _CLASSES[config.model_type](config), tokenizer


def save(model: nn.Module, folder: Path, out: Path) -> None:
    """Write a trained model of a folder: the folder's own config and tokenizer, and the weights in half precision."""
    described = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".safetensors"}
    out.mkdir(parents=True, exist_ok=True)
    half = in_half(model.state_dict().items())
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(out, state_dict=half)
    else:
        save_file(half, out / _CLIP_WEIGHTS)
    # Last: ``save_pretrained`` wrote a config of half precision, and the models are loaded as float32.
    for name, content in described.items():
        (out / name).write_bytes(content)


def in_half(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return named tensors as files hold them: those of floating point in half precision."""
    return {
        name: tensor.detach().half().contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in tensors
    }


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    """Take one step down the gradient of a loss, clipped to a norm of 1."""
    [group] = optimizer.param_groups
    group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
