"""What a model's folder may tell transformers and open_clip: allow-lists, and a view of the folder that has no more.

Both libraries look into a folder for more than a model needs: Python files, other repositories, kernels, adapters,
templates, paths of further files. So they are never given the folder itself, but a view of it: links to the files
with weights and vocabularies, and copies of its JSON with the keys that are known here. A key that is not known is
left out where it cannot matter (transformers' configs carry dozens) and refused where the library would refuse it;
what asks for code is always refused, so that nobody takes for loaded what was not.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.models.model_files import MAX_TOKENIZER_BYTES, impostor, read_object
from pipeline.regular_files import open_regular
from schemas.errors import CapfiltError
from schemas.names import printable

TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)

_MAX_TEXT_GROWTH, _MAX_TOKENIZER_STEPS = 16, 32

_ASKS_FOR_CODE = ("auto_map", "trust_remote_code", "custom_pipelines", "custom_generate")
_TOKENIZER_KEYS = {
    "add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder", "additional_special_tokens",
    "backend", "clean_up_tokenization_spaces", "do_basic_tokenize", "do_lower_case", "errors", "extra_ids",
    "extra_special_tokens", "keep_accents", "lang_codes", "legacy", "legacy_behaviour", "model_input_names",
    "model_max_length", "never_split", "padding_side", "remove_space", "sp_model_kwargs",
    "spaces_between_special_tokens", "split_special_tokens", "src_lang", "strip_accents", "tgt_lang",
    "tokenize_chinese_chars", "tokenizer_class",
    "trim_offsets", "truncation_side", "use_default_system_prompt", "wordpieces_prefix",
}  # fmt: skip
# Classes of transformers that read a vocabulary and nothing else.
_TOKENIZER_CLASSES = {
    "AlbertTokenizer", "BartTokenizer", "BertTokenizer", "CLIPTokenizer", "CamembertTokenizer",
    "DebertaV2Tokenizer", "DistilBertTokenizer", "ElectraTokenizer", "GPT2Tokenizer", "GemmaTokenizer",
    "LlamaTokenizer", "MPNetTokenizer", "MT5Tokenizer", "NllbTokenizer", "PreTrainedTokenizer", "RobertaTokenizer",
    "T5Tokenizer", "TokenizersBackend", "XLMRobertaTokenizer",
}  # fmt: skip
# Of these model types, transformers takes one of the classes above where a folder names none.
_TOKENIZER_MODEL_TYPES = {
    "albert", "bart", "bert", "blip", "blip-2", "camembert", "clip", "deberta-v2", "distilbert", "electra", "gemma",
    "gpt2", "mpnet", "mt5", "opt", "roberta", "t5", "umt5", "xlm-roberta",
}  # fmt: skip

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
_PROCESSOR_KEYS = {
    "crop_size", "default_to_square", "image_mean", "image_std", "pad_size", "resample", "rescale_factor", "size",
}  # fmt: skip

# Far beyond any model; without bounds a few bytes of JSON ask for any amount of memory.
_MAX_LAYERS = 1024
_MAX_IMAGE_PX = 4096
_MAX_NUMBER = 1 << 31
_TIMM_NAME = re.compile(r"\w+(\.\w+)?")


@contextmanager
def folder_view(folder: Path, files: Mapping[str, dict[str, Any] | None], what: str) -> Iterator[Path]:
    """Give a library a folder that holds these files alone; turn what it raises into one line.

    Args:
        folder: of the model.
        files: by name: what a JSON file holds, or None for a link to the folder's own.
        what: is loaded, for messages: the setting and the folder.

    Raises:
        CapfiltError: whatever the library raises inside. Three libraries read here, two of them in Rust: what they
            raise for a damaged file is not declared.
    """
    with TemporaryDirectory(prefix="capfilt-model-") as name:
        view = Path(name)
        for file, content in files.items():
            (view / file).parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                (view / file).symlink_to((folder / file).resolve())
            else:
                (view / file).write_text(json.dumps(content))
        try:
            yield view
        except CapfiltError:
            raise
        except Exception as error:
            raise CapfiltError(f"{what} does not load: {_said(error, view, folder)}") from error
        except BaseException as error:
            # What a panic in Rust is in Python; the class cannot be imported.
            if type(error).__name__ != "PanicException":
                raise
            raise CapfiltError(f"{what} does not load: {_said(error, view, folder)}") from error


def _said(error: BaseException, view: Path, folder: Path) -> str:
    """Return in one line what a library says, of a list of tensors the first."""
    parts = str(error).replace(str(view), str(folder)).split("\n\t")
    return " ".join(printable(parts[min(1, len(parts) - 1)]).split())[:300] or type(error).__name__


def refuse_code(values: Mapping[str, Any], path: Path) -> None:
    """Raise CapfiltError where a JSON object, at any depth, asks to run code that comes with the model."""
    stack: list[Any] = [values]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            if asked := next((key for key in _ASKS_FOR_CODE if value.get(key)), None):
                raise CapfiltError(
                    f"{path} asks to run code of its own ({asked}); no code that comes with a model is run. If the "
                    f"model works without it, remove {asked} from a copy of the folder"
                )
            stack += value.values()
        elif isinstance(value, list):
            stack += value


def tokenizer_view(folder: Path, where: str) -> dict[str, dict[str, Any] | None]:
    """Return the files of a folder that decide how texts are split, as ``folder_view`` takes them.

    Raises:
        CapfiltError: a file is damaged or too large, asks for code, or names a class that does more than read a
            vocabulary.
    """
    files: dict[str, dict[str, Any] | None] = {}
    for name in TOKENIZER_FILES:
        path = folder / name
        if not path.is_file():
            continue
        files[name] = None
        if name.endswith(".json"):
            content = read_object(path, where, MAX_TOKENIZER_BYTES)
            if name in ("tokenizer_config.json", "special_tokens_map.json"):
                files[name] = _tokenizer_config(content, path)
            elif name == "tokenizer.json":
                _refuse_growth(content, path)
        elif path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise CapfiltError(f"{path} ({where}) is larger than a vocabulary may be")
        else:
            _refuse_impostor(path, where)
    if (folder / "config.json").is_file():
        files["config.json"] = _tokenizer_hints(
            read_object(folder / "config.json", where), folder / "config.json"
        )
    return files


def _refuse_growth(tokenizer: Mapping[str, Any], path: Path) -> None:
    """Refuse steps that make a text many times as long: twelve that make 100 letters of one fill any memory."""
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        steps = list(_steps(tokenizer.get(part)))
        growth = math.prod(
            max(1, len(str(step.get("content", "")))) for step in steps if step.get("type") == "Replace"
        )
        # Each of these maps a letter to several, and the letters that come to several again.
        repeated = [
            kind for kind in ("ByteLevel", "Precompiled") if sum(s.get("type") == kind for s in steps) > 1
        ]
        if growth > _MAX_TEXT_GROWTH or repeated or len(steps) > _MAX_TOKENIZER_STEPS:
            raise CapfiltError(
                f"{path}: its {part} can make a text more than {_MAX_TEXT_GROWTH} times as long, or has more than "
                f"{_MAX_TOKENIZER_STEPS} steps; a published tokenizer does not"
            )


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of a part of a tokenizer.json, those inside sequences too."""
    if isinstance(part, list):
        for step in part:
            yield from _steps(step)
    elif isinstance(part, dict):
        yield part
        for inner in ("normalizers", "pretokenizers", "decoders"):
            yield from _steps(part.get(inner))


def _refuse_impostor(path: Path, where: str) -> None:
    with open_regular(path) as file:
        what = impostor(file.read(64))
    # A vocabulary may begin with any byte and word: only what is certain.
    if what and ("git clone" in what or path.suffix == ".model"):
        raise CapfiltError(f"{path} ({where}) is not a vocabulary: {what}")


def _tokenizer_config(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    refuse_code(values, path)
    kept = {key: value for key, value in values.items() if key in _TOKENIZER_KEYS or key.endswith("_token")}
    # Of sentencepiece's own options, a model that was converted needs none.
    if not isinstance(kept.get("sp_model_kwargs", {}), dict) or kept.get("sp_model_kwargs"):
        raise CapfiltError(
            f"{path}: sp_model_kwargs is not supported; save the tokenizer as a tokenizer.json"
        )
    name = kept.get("tokenizer_class")
    if name is not None and (
        not isinstance(name, str) or name.removesuffix("Fast") not in _TOKENIZER_CLASSES
    ):
        raise CapfiltError(
            f"{path}: tokenizer_class = {printable(repr(name))[:80]} is not a tokenizer that is known to read a "
            "vocabulary alone; save it as a tokenizer.json of the class PreTrainedTokenizerFast"
        )
    return kept


def _tokenizer_hints(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return what a model's config says of its tokenizer."""
    refuse_code(values, path)
    hints = {}
    if (
        isinstance(name := values.get("tokenizer_class"), str)
        and name.removesuffix("Fast") in _TOKENIZER_CLASSES
    ):
        hints["tokenizer_class"] = name
    if isinstance(name := values.get("model_type"), str) and name in _TOKENIZER_MODEL_TYPES:
        hints["model_type"] = name
    return hints


def clip_config(folder: Path, where: str) -> dict[str, Any]:
    """Return the ``open_clip_config.json`` of a folder, with what open_clip may be told and nothing else.

    Raises:
        CapfiltError: it is damaged, asks for code, names another repository, or has a key or a value that
            open_clip's own models do not have.
    """
    path = folder / "open_clip_config.json"
    values = read_object(path, where)
    refuse_code(values, path)
    model = _section(values, "model_cfg", path)
    _refuse_unknown(model, _CLIP_KEYS, "model_cfg", path)
    checked = dict(model)
    for name, keys in _CLIP_SECTIONS.items():
        if name in model or name != "multimodal_cfg":
            checked[name] = _tower(_section(model, name, path), keys, name, path)
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
    _refuse_unknown(values, keys, name, path)
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
            raise _unusable(path, f"{name}.{key}", options)
        _refuse_unknown(options, set(kinds), f"{name}.{key}", path)
        for option, kind in kinds.items():
            if option in options and not isinstance(options[option], kind):
                raise _unusable(path, f"{name}.{key}.{option}", options[option])
    check_numbers(values, name, path)
    return values


def check_numbers(values: Mapping[str, Any], name: str, path: Path) -> None:
    """Refuse sizes that no model has."""
    for key, value in values.items():
        limit = (
            _MAX_LAYERS if key.endswith("layers") else _MAX_IMAGE_PX if key == "image_size" else _MAX_NUMBER
        )
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, list) or (isinstance(number, int | float) and not abs(number) <= limit):
                raise _unusable(path, f"{name}.{key}", value)


def _preprocess(values: Any, path: Path) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise _unusable(path, "preprocess_cfg", values)
    kept = {key: values[key] for key in _PREPROCESS_KEYS if values.get(key) is not None}
    for key in ("mean", "std"):
        if key in kept and not _is_by_channel(kept[key], above_zero=key == "std"):
            raise _unusable(path, f"preprocess_cfg.{key}", kept[key])
    choices = {
        "interpolation": ("bicubic", "bilinear", "random"),
        "resize_mode": ("shortest", "longest", "squash"),
        "mode": ("RGB",),
        "fill_color": range(256),
    }
    for key, allowed in choices.items():
        if key in kept and (isinstance(kept[key], list | dict) or kept[key] not in allowed):
            raise _unusable(path, f"preprocess_cfg.{key}", kept[key])
    return kept


def processor_config(folder: Path, image_size_px: Any, where: str) -> dict[str, Any]:
    """Return the settings of a captioner's image processor, wherever transformers wrote them.

    Args:
        image_size_px: that the model's config names.

    Raises:
        CapfiltError: they are damaged, ask for code, or make images of another size than the model takes.
    """
    path = folder / processor_file(folder)
    values = read_object(path, where)
    refuse_code(values, path)
    if path.name == "processor_config.json":
        values = _section(values, "image_processor", path)
    kept = {key: value for key, value in values.items() if key in _PROCESSOR_KEYS or key.startswith("do_")}
    size = kept.get("size")
    sides = [size.get("height"), size.get("width")] if isinstance(size, dict) else [size, size]
    if size is not None and sides != [image_size_px, image_size_px]:
        raise CapfiltError(
            f"{path}: size = {printable(repr(size))[:80]}, but the model takes images of "
            f"{printable(repr(image_size_px))[:40]} pixels (config.json, vision_config.image_size)"
        )
    for key in ("image_mean", "image_std"):
        if kept.get(key) is not None and not _is_by_channel(kept[key], above_zero=key == "image_std"):
            raise _unusable(path, key, kept[key])
    for key in ("resample", "rescale_factor"):
        if not isinstance(kept.get(key, 0), int | float):
            raise _unusable(path, key, kept[key])
    return kept


def processor_file(folder: Path) -> str:
    """Return the name of the file with the image processor's settings: transformers 5 writes the second."""
    names = ("preprocessor_config.json", "processor_config.json")
    return next((name for name in names if (folder / name).is_file()), names[0])


def _is_by_channel(values: Any, *, above_zero: bool) -> bool:
    return (
        isinstance(values, list)
        and len(values) == 3
        and all(isinstance(value, int | float) and math.isfinite(value) for value in values)
        and (not above_zero or min(values) > 0)
    )


def _section(values: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    section = values.get(name)
    if not isinstance(section, dict):
        raise CapfiltError(f"{path}: {name} is {'not a JSON object' if name in values else 'missing'}")
    return section


def _refuse_unknown(values: Mapping[str, Any], known: set[str], name: str, path: Path) -> None:
    if unknown := sorted(values.keys() - known):
        raise CapfiltError(f"{path}: {name} has a key that is not known: {printable(unknown[0])[:80]!r}")


def _unusable(path: Path, key: str, value: Any) -> CapfiltError:
    return CapfiltError(f"{path}: {key} = {printable(repr(value))[:80]} is not a value that a model has")
