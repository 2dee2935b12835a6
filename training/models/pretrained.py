"""Folders of transformers' models: a local one, or the hub's in the local cache. Only safetensors are read."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.models.files.model_files import (
    WEIGHTS_FILE,
    WEIGHTS_INDEX,
    FirstMissingFile,
    first_missing_weights_file,
    not_safetensors,
    read_object,
    safetensors_header,
    weight_files,
)
from pipeline.models.files.model_folder import model_folder as find_model_folder
from pipeline.models.files.tokenizer_files import TOKENIZER_FILES
from pipeline.models.weights import lacks_all_of
from schemas.errors import CapfiltError, first_line
from schemas.names import printable

_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model")
_CLASS_NAME = re.compile(r"[A-Z][A-Za-z0-9]{2,60}")


def model_folder(name: str, revision: str, where: str) -> Path:
    """Return the folder of a model with its config and weights.

    Raises:
        CapfiltError: no such folder, hub id or revision, a file is missing, or the hub cannot be reached and the
            cache does not have it.
    """
    patterns = ("config.json", WEIGHTS_FILE, WEIGHTS_INDEX, "model-*.safetensors")
    return _folder(name, revision, where, patterns, first_missing_weights_file)


def tokenizer_folder(name: str, revision: str, where: str) -> Path:
    """Return the folder of a tokenizer; raises as ``model_folder``."""
    return _folder(name, revision, where, ("config.json", *TOKENIZER_FILES), lacks_all_of(_VOCABULARIES))


def model_files(folder: Path) -> list[str]:
    """Return the names of the files in a folder that decide what a model computes."""
    return ["config.json", *weight_files(folder)]


def read_weights(folder: Path, where: str) -> dict[str, Tensor]:
    """Return all tensors of a model's folder, on the CPU. Raises CapfiltError where a file is damaged."""
    tensors: dict[str, Tensor] = {}
    for name in weight_files(folder, where):
        if name.endswith(".safetensors"):
            tensors |= read_safetensors(folder / name)
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return a file's tensors, on the CPU. Raises CapfiltError where it is not a safetensors file."""
    safetensors_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, FileNotFoundError) as error:
        raise not_safetensors(path, printable(first_line(error))[:200]) from error


def save_model(
    kind: type[PreTrainedModel], config: PretrainedConfig, tensors: Mapping[str, Tensor], folder: Path
) -> None:
    """Write the folder of a model with exactly these tensors."""
    with torch.device("meta"):
        model = kind(config)
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)


def tokenizer_files(folder: Path) -> list[str]:
    """Return the names of the files in a folder that decide how a text is split."""
    return [name for name in TOKENIZER_FILES if (folder / name).is_file()]


def config_file(name: str, revision: str, where: str) -> dict[str, Any]:
    """Return a model's config.json; raises as ``model_folder``."""
    folder = _folder(name, revision, where, ("config.json",), lacks_all_of(("config.json",)))
    return read_object(folder / "config.json", where)


def _folder(
    name: str, revision: str, where: str, patterns: tuple[str, ...], first_missing_file: FirstMissingFile
) -> Path:
    folder = find_model_folder(name, revision, patterns, first_missing_file, where)
    if missing := first_missing_file(folder):
        hint = _how_to_convert(name, folder, where) if missing == WEIGHTS_FILE else ""
        raise CapfiltError(f"{missing} is missing in {folder} ({where} = {name!r}){hint}")
    return folder


def _how_to_convert(name: str, folder: Path, where: str) -> str:
    """Return the command that converts older files, as the hub has of OPT, to safetensors."""
    classes = read_object(folder / "config.json", where).get("architectures")
    kind = classes[0] if isinstance(classes, list) and classes else "AutoModel"
    if not (isinstance(kind, str) and _CLASS_NAME.fullmatch(kind)):
        # A value of the file must not get into a command that the user is asked to run.
        kind = "AutoModel"
    new = f"{name.rstrip('/').rpartition('/')[2]}-safetensors"
    return (
        f'; only safetensors are read. Convert once, and set {where} = {new!r}: python -c "from transformers import '
        f"AutoTokenizer, {kind}; [one.from_pretrained({name!r}).save_pretrained({new!r}) for one in (AutoTokenizer, "
        f'{kind})]"'
    )
