"""Loads models and tokenizers of transformers from untrusted folders: weights and vocabularies only, never code."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BlipImageProcessorPil,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from pipeline.images.preprocess import Preprocess
from pipeline.models.checks import reject_larger, require_finite_weights
from pipeline.models.files.folder_view import (
    check_numbers,
    folder_view,
    processor_config,
    reject_code,
    section,
    unusable,
)
from pipeline.models.files.model_files import (
    TensorEntry,
    read_object,
    reject_wrapped_names,
    safetensors_header,
    weight_files,
)
from pipeline.models.files.tokenizer_files import tokenizer_view
from schemas.errors import CapfiltError

# Keys of the architecture that no config class declares as its own.
_SHARED_KEYS = {
    "add_cross_attention", "bos_token_id", "chunk_size_feed_forward", "decoder_start_token_id", "eos_token_id",
    "is_decoder", "is_encoder_decoder", "pad_token_id", "sep_token_id", "tie_word_embeddings",
}  # fmt: skip
_SPARE_VALUES = 1_000_000


def load_model(
    model_class: type[PreTrainedModel],
    folder: Path,
    where: str,
    name: str = "",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Load a model of transformers on the CPU; reject files that leave a part of it untrained.

    Args:
        model_class: decides what of ``config.json`` counts.
        folder: with ``config.json`` and safetensors.
        where: the config key that names the model, for messages.
        name: its value, where that is more than the folder.
        dtype: of the weights in memory, whatever that of the files is.

    Raises:
        CapfiltError: a file is missing, damaged or asks for code, or the tensors are not those of the config.
    """
    what = f"{where} = {name!r} in {folder}" if name else f"{where}: {folder}"
    names = weight_files(folder, where)
    headers = {file: safetensors_header(folder / file) for file in names if file.endswith(".safetensors")}
    for file, header in headers.items():
        reject_wrapped_names(header, folder / file)
    path = folder / "config.json"
    values = read_object(path, where)
    kind = model_class.config_class
    # transformers reads the end-of-text token from the config file.
    files = dict.fromkeys(names) | {"config.json": _checked(kind, values, path)}
    with folder_view(folder, files, what) as view, _Quiet():
        config = kind(**files["config.json"])
        _reject_other_shapes(model_class, config, headers, what)
        model, info = model_class.from_pretrained(
            view,
            config=config,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            # Mismatched tensors are reported below, with both shapes.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=dtype,
        )
    model.config.name_or_path = str(folder)
    _reject_incomplete(model_class, info, what)
    # In half precision a finite number of the file may become infinite.
    lowered = "" if model.dtype == torch.float32 else f", read as {model.dtype}"
    require_finite_weights(model.state_dict(), f"{what}{lowered}")
    return model


def model_config(kind: type[PretrainedConfig], values: Mapping[str, Any], path: Path) -> PretrainedConfig:
    """Return a model's config, made of the keys that its class declares.

    All other keys of a ``config.json`` name code, kernels, adapters, files or quantisation, or are not needed.

    Raises:
        CapfiltError: it asks for code, is of quantised weights, or has values that no model has.
    """
    with folder_view(path.parent, {}, str(path)):
        return kind(**_checked(kind, values, path))


def _checked(kind: type[PretrainedConfig], values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    reject_code(values, path)
    if values.get("quantization_config"):
        raise CapfiltError(f"{path}: the weights are quantised (quantization_config); use those before that")
    return _declared(kind, values, path)


def _declared(kind: type[PretrainedConfig], values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    # Attributes that a class sets beside its fields are saved and read too, such as T5's scale_decoder_outputs.
    known = (vars(kind()).keys() - vars(PretrainedConfig()).keys()) | _SHARED_KEYS | kind.attribute_map.keys()
    kept = {key: value for key, value in values.items() if key in known and key not in kind.sub_configs}
    check_numbers(kept, kind.model_type, path)
    for key, value in kept.items():
        if isinstance(value, dict) or (isinstance(value, str) and len(value) > 100):
            raise unusable(path, key, value)
    for name, sub_kind in kind.sub_configs.items():
        # A part that may be of any class, as BLIP-2's language model, is no part of the models that are loaded so.
        if name in values and sub_kind is not AutoConfig:
            kept[name] = _declared(sub_kind, section(values, name, path), path)
    return kept


def load_tokenizer(
    folder: Path, where: str, kind: type[PreTrainedTokenizerBase] | type[AutoTokenizer] = AutoTokenizer
) -> PreTrainedTokenizerBase:
    """Load a tokenizer from its vocabulary; raises CapfiltError as ``tokenizer_view`` does, or if it does not load."""
    with folder_view(folder, tokenizer_view(folder, where), f"{where}: {folder}") as view, _Quiet():
        tokenizer = kind.from_pretrained(view, local_files_only=True, trust_remote_code=False)
        # Some classes finish their construction at the first text: do that inside the view.
        tokenizer("a")
    tokenizer.name_or_path = str(folder)
    return tokenizer


def load_preprocess(folder: Path, image_size_px: int, where: str) -> Preprocess:
    """Return what BLIP's image processor does with the settings of a folder; raises as ``processor_config``."""
    settings = processor_config(folder, image_size_px, where)
    with folder_view(folder, {}, f"{where}: {folder}"):
        processor = BlipImageProcessorPil(**settings)
    return Preprocess.of_blip(processor)


def _reject_other_shapes(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    headers: Mapping[str, Mapping[str, TensorEntry]],
    what: str,
) -> None:
    """Reject weights that do not fit the config, and a config that asks for far more memory than they could fill.

    The model is built on ``meta``, which allocates none of that memory.
    """
    with torch.device("meta"):
        model = model_class(config)
    stored = {name: entry.shape for header in headers.values() for name, entry in header.items()}
    asked = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    mismatched = [
        (name, stored[name], asked[name]) for name in asked if stored.get(name, asked[name]) != asked[name]
    ]
    _reject_mismatched(mismatched, what)
    reject_larger(model, headers.values(), f"{what}: config.json", _SPARE_VALUES)


def _reject_mismatched(mismatched: Sequence[tuple[str, Sequence[int], Sequence[int]]], what: str) -> None:
    if mismatched:
        name, stored, asked = mismatched[0]
        raise CapfiltError(
            f"{what}: {len(mismatched)} tensors are of another shape than config.json says, {name} first: "
            f"{_shape(stored)} instead of {_shape(asked)}"
        )


def _reject_incomplete(model_class: type, info: Mapping[str, Any], what: str) -> None:
    _reject_mismatched(sorted(info["mismatched_keys"]), what)
    if missing := sorted(info["missing_keys"]):
        raise CapfiltError(
            f"{what} is not a {model_class.__name__}: {len(missing)} tensors are missing, {missing[0]} first"
        )


def _shape(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))})"


class _Quiet:
    """Hide transformers' reports and progress bars, which show names from untrusted files."""

    def __enter__(self) -> None:
        self._verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity(transformers_logging.CRITICAL)
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_verbosity(self._verbosity)
