"""Loads a CLIP of open_clip: an architecture that it knows with a weights file, or a published folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from timm.models import register_model
from timm.models.eva import Eva
from torch import nn

from pipeline.models.checks import reject_larger
from pipeline.models.clip_config import clip_config
from pipeline.models.files.folder_view import folder_view
from pipeline.models.files.model_files import safetensors_header
from pipeline.models.files.tokenizer_files import tokenizer_view
from pipeline.models.weights import Weights, clip_checkpoint

# Values that a model may have beyond its file: open_clip interpolates positions that the file lacks.
_SPARE_VALUES = 100_000_000


def load_clip(weights: Weights, where: str, precision: str = "fp32") -> nn.Module:
    """Load on the CPU in float32, then lower the precision of what open_clip lowers.

    Args:
        weights: of the model, its files verified.
        where: the config key that names it, for messages.
        precision: one of open_clip's.

    Raises:
        CapfiltError: a file is damaged, asks for more than open_clip may be told, or does not fit the architecture.
    """
    path = Path(weights.path)
    if path.is_dir():
        return _load_folder(path, where, precision)
    # Given a file, open_clip uses the architecture's defaults. What the pretrained tag says (OpenAI's weights need
    # QuickGELU, others their own mean and resize) must be passed on here; open_clip 3.3 only warns.
    tag = open_clip.get_pretrained_cfg(weights.name, weights.revision)
    preprocess = {name: tag[name] for name in ("mean", "std", "interpolation", "resize_mode") if name in tag}
    with folder_view(path, {}, f"{where}: {path}"):
        return open_clip.create_model(
            weights.name,
            pretrained=weights.path,
            precision=precision,
            require_pretrained=True,
            force_quick_gelu=tag.get("quick_gelu", False),
            force_preprocess_cfg=preprocess,
        )


def load_clip_tokenizer(weights: Weights, where: str) -> Any:
    """Load the tokenizer that open_clip gives a model; of a folder's tokenizer, the vocabulary alone is read."""
    path = Path(weights.path)
    if not path.is_dir():
        with folder_view(path, {}, f"{where}: {path}"):
            return open_clip.get_tokenizer(weights.name)
    config = clip_config(path, where)
    files: dict[str, dict[str, Any] | None] = {"open_clip_config.json": config}
    if config["model_cfg"]["text_cfg"].get("hf_tokenizer_name"):
        files |= tokenizer_view(path, where)
    with folder_view(path, files, f"{where}: {path}") as view:
        return open_clip.get_tokenizer(f"local-dir:{view}")


def register_eva(
    name: str, *, image_size_px: int, patch_px: int, width: int, blocks: int, heads: int
) -> None:
    """Let ``timm_model_name`` of an ``open_clip_config.json`` name a small image encoder of EVA's architecture.

    open_clip takes EVA from timm, whose EVA01 is a giant. The architecture is that of ``EVA01-g-14``: learned
    positions, biases of queries and values but not of keys, GELU.
    """

    def build(**options: Any) -> Eva:
        # timm asks every model for its pretrained weights; these have none.
        for key in ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            options.pop(key, None)
        return Eva(
            img_size=image_size_px,
            patch_size=patch_px,
            embed_dim=width,
            depth=blocks,
            num_heads=heads,
            **options,
        )

    build.__name__ = name
    register_model(build)


# The demo's, known before any CLIP with such an encoder is built.
register_eva("eva_tiny_patch8_64", image_size_px=64, patch_px=8, width=128, blocks=4, heads=4)


def _load_folder(folder: Path, where: str, precision: str) -> nn.Module:
    config, checkpoint = clip_config(folder, where), clip_checkpoint(folder)
    with folder_view(
        folder, {"open_clip_config.json": config, checkpoint: None}, f"{where}: {folder}"
    ) as view:
        name = f"local-dir:{view}"
        _reject_larger(config["model_cfg"], folder / checkpoint)
        return open_clip.create_model(name, precision=precision, require_pretrained=True)


def _reject_larger(config: Mapping[str, Any], checkpoint: Path) -> None:
    """Reject a config that asks for far more memory than its weights could fill, before any is allocated."""
    shape = {key: value for key, value in config.items() if key != "custom_text"}
    kind = open_clip.CLIP
    if config.get("custom_text"):
        kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    with torch.device("meta"):
        model = kind(**shape)
    config_path = checkpoint.parent / "open_clip_config.json"
    reject_larger(model, [safetensors_header(checkpoint)], str(config_path), _SPARE_VALUES)
