"""The `open_clip_config.json` of a folder, reduced to what open_clip may be told: known keys, values that models have.

A key that is not known is rejected, as open_clip would; what names code or another repository is rejected too.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.models.files.folder_view import check_numbers, is_by_channel, reject_code, section, unusable
from pipeline.models.files.model_files import read_object
from schemas.errors import CapfiltError
from schemas.names import printable

_TOWER_KEYS = {
    "act_kwargs", "block_type", "final_ln_after_pool", "layers", "ls_init_value", "mlp_ratio", "norm_kwargs",
    "output_tokens", "pool_type", "qk_norm", "scale_attn", "scale_attn_inner", "scale_fc", "scale_heads",
    "scaled_cosine_attn", "width",
}  # fmt: skip
_VISION_KEYS = _TOWER_KEYS | {
    "attentional_pool", "attn_pooler_heads", "attn_pooler_queries", "head_width", "image_size", "no_ln_pre",
    "patch_dropout", "patch_size", "pos_embed_type", "timm_drop", "timm_drop_path", "timm_model_name",
    "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias",
}  # fmt: skip
_TEXT_KEYS = _TOWER_KEYS | {
    "context_length", "embed_cls", "eos_id", "heads", "hf_pooler_type", "hf_proj_type", "hf_tokenizer_name",
    "no_causal_mask", "pad_id", "proj_bias", "proj_type", "tokenizer_kwargs", "tokenizer_mode", "vocab_size",
}  # fmt: skip
_CLIP_SECTIONS = {
    "vision_cfg": _VISION_KEYS,
    "text_cfg": _TEXT_KEYS,
    "multimodal_cfg": _TEXT_KEYS | {"attn_pooler_heads", "dim_head", "n_queries"},
}
_CLIP_KEYS = {
    "custom_text", "embed_dim", "init_logit_bias", "init_logit_scale", "nonscalar_logit_scale", "quick_gelu",
    *_CLIP_SECTIONS,
}  # fmt: skip
_ANOTHER_REPOSITORY = ("hf_model_name", "hf_model_pretrained")
_OPTIONS: dict[str, dict[str, type]] = {
    "act_kwargs": {"approximate": str},
    "norm_kwargs": {"eps": float},
    "tokenizer_kwargs": {
        "additional_special_tokens": list,
        "clean": str,
        "language": str,
        "strip_sep_token": bool,
        "use_fast": bool,
    },
}
_PREPROCESS_KEYS = ("size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color")
_TIMM_NAME = re.compile(r"\w+(\.\w+)?")


def clip_config(folder: Path, where: str) -> dict[str, Any]:
    """Return the ``open_clip_config.json`` of a folder, with what open_clip may be told and nothing else.

    Raises:
        CapfiltError: it is damaged, asks for code, names another repository, or has a key or a value that
            open_clip's own models do not have.
    """
    path = folder / "open_clip_config.json"
    values = read_object(path, where)
    reject_code(values, path)
    model = section(values, "model_cfg", path)
    _reject_unknown(model, _CLIP_KEYS, "model_cfg", path)
    checked = dict(model)
    for name, keys in _CLIP_SECTIONS.items():
        if name in model or name != "multimodal_cfg":
            checked[name] = _tower(section(model, name, path), keys, name, path)
    check_numbers(checked, "model_cfg", path)
    preprocess = _preprocess(values.get("preprocess_cfg") or {}, path)
    return {"model_cfg": checked, "preprocess_cfg": preprocess}


def _tower(values: Mapping[str, Any], keys: set[str], name: str, path: Path) -> dict[str, Any]:
    for key in _ANOTHER_REPOSITORY:
        if values.get(key):
            raise CapfiltError(
                f"{path}: {name}.{key} names a model of another repository, which is not fetched; use a CLIP whose "
                "text tower is open_clip's own"
            )
    values = {key: value for key, value in values.items() if key not in _ANOTHER_REPOSITORY}
    _reject_unknown(values, keys, name, path)
    timm = values.get("timm_model_name")
    if timm is not None and not (isinstance(timm, str) and _TIMM_NAME.fullmatch(timm)):
        raise CapfiltError(
            f"{path}: {name}.timm_model_name = {printable(repr(timm))[:80]} is not the name of an architecture of "
            "timm's own; other repositories are not asked"
        )
    # Of ImageNet, from the hub; what counts is the folder's own file.
    values.pop("timm_model_pretrained", None)
    for key, kinds in _OPTIONS.items():
        options = values.get(key) or {}
        if not isinstance(options, dict):
            raise unusable(path, f"{name}.{key}", options)
        _reject_unknown(options, set(kinds), f"{name}.{key}", path)
        for option, kind in kinds.items():
            if option in options and not isinstance(options[option], kind):
                raise unusable(path, f"{name}.{key}.{option}", options[option])
    check_numbers(values, name, path)
    return values


def _preprocess(values: Any, path: Path) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise unusable(path, "preprocess_cfg", values)
    kept = {key: values[key] for key in _PREPROCESS_KEYS if values.get(key) is not None}
    for key in ("mean", "std"):
        if key in kept and not is_by_channel(kept[key], above_zero=key == "std"):
            raise unusable(path, f"preprocess_cfg.{key}", kept[key])
    choices = {
        "interpolation": ("bicubic", "bilinear", "random"),
        "resize_mode": ("shortest", "longest", "squash"),
        "mode": ("RGB",),
        "fill_color": range(256),
    }
    for key, allowed in choices.items():
        if key in kept and (isinstance(kept[key], list | dict) or kept[key] not in allowed):
            raise unusable(path, f"preprocess_cfg.{key}", kept[key])
    return kept


def _reject_unknown(values: Mapping[str, Any], known: set[str], name: str, path: Path) -> None:
    if unknown := sorted(values.keys() - known):
        raise CapfiltError(f"{path}: {name} has a key that is not known: {printable(unknown[0])[:80]!r}")
