"""An image encoder of EVA's kind, of a few kilobytes, in the layout of open_clip."""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from tiny_models import IMAGE_PX, SPECIAL, WORDS, tokenizer

from pipeline.models.clip.loader import register_eva

NAME = "eva_tiny_capfilt"
WIDTH, BLOCKS, HEADS = 32, 3, 4


register_eva(NAME, image_size_px=IMAGE_PX, patch_px=8, width=WIDTH, blocks=BLOCKS, heads=HEADS)


def save_eva(folder: Path, *, seed: int = 0) -> Path:
    """Save a CLIP with such an encoder for ``local-dir:``; no bias and no norm is at its first value."""
    torch.manual_seed(seed)
    model_cfg = {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": IMAGE_PX,
            "timm_model_name": NAME,
            "timm_model_pretrained": False,
            "timm_pool": "token",
            "timm_proj": None,
        },
        "text_cfg": {
            "context_length": 16,
            "width": 32,
            "heads": 2,
            "layers": 1,
            "vocab_size": len(SPECIAL) + len(WORDS) + 2,
            "hf_tokenizer_name": "tiny/ranker",
        },
        "custom_text": True,
    }
    config = {key: value for key, value in model_cfg.items() if key != "custom_text"}
    model = open_clip.CustomTextCLIP(**config)
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess})
    )
    tokenizer().save_pretrained(folder)
    return folder
