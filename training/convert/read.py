"""Reads weights from outside a run: LAVIS's checkpoints, Hugging Face's ``Blip2*`` folders and capfilt's exports.

Tensors have LAVIS's names here. A stage must be given exactly what it trains: a missing, unexpected or misshapen tensor
is an error that names it.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.models.checks import require_finite_weights
from pipeline.models.model_files import (
    not_safetensors,
    read_object,
    safetensors_header,
    unwrapped_names,
    wrong_file,
)
from schemas.errors import CapfiltError, first_line
from schemas.names import printable, shown
from training.convert.key_map import Family, from_hf
from training.models.parameters import tensor_differences

# Beside a Hugging Face export: the tensors that its classes do not have.
EXTRA_FILE = "capfilt_extra.safetensors"
# capfilt's own format.
OWN_FORMAT, OWN_VERSION = "capfilt-blip2", 1
OWN_CONFIG_FILE, OWN_WEIGHTS_FILE = "capfilt.json", "model.safetensors"

# In files but not trained: buffers, second names of tied tensors, and the frozen models.
_NOT_TRAINED = re.compile(
    r"Qformer\.bert\.embeddings\.position_ids|Qformer\.cls\.predictions\.decoder\.(weight|bias)"
    r"|visual_encoder\..+|(opt|t5|language)_model\..+"
)
# What stage 2 drops of stage 1: the text side of the Q-Former and the heads.
_STAGE1_ONLY = re.compile(
    r"Qformer\.cls\..+|Qformer\.bert\.embeddings\.(word|position)_embeddings\.weight"
    r"|Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..+|(vision|text)_proj\..+|itm_head\..+|temp"
)
# torch's message for a global that a pickle refers to.
_GLOBAL = re.compile(r"GLOBAL (\S+) was not an allowed global")
_PROJECTION = re.compile(r"(opt|t5)_proj\..+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalCheckpoint:
    """Weights under LAVIS's names, and the format that they were read from.

    ``config``: the run's, which capfilt's exports have; it is not checked yet.
    """

    kind: Literal["lavis", "huggingface", "capfilt"]
    path: str
    tensors: dict[str, Tensor]
    config: Any = None

    @property
    def trained(self) -> dict[str, Tensor]:
        """The tensors that a stage trains: without frozen models, buffers and second names."""
        return {name: tensor for name, tensor in self.tensors.items() if not _NOT_TRAINED.fullmatch(name)}

    @property
    def files(self) -> list[Path]:
        """The files that it was read from."""
        path = Path(self.path)
        if path.is_file():
            return [path]
        configs = ("config.json", OWN_CONFIG_FILE)
        return sorted(
            file for file in path.iterdir() if file.suffix == ".safetensors" or file.name in configs
        )

    @property
    def vision(self) -> dict[str, Tensor]:
        """The image encoder's tensors, by their names in it; empty for most of LAVIS's files."""
        prefix = "visual_encoder."
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def read_external(path: str) -> ExternalCheckpoint | None:
    """Return the weights of a LAVIS ``.pth``, a ``Blip2*`` folder or an export of capfilt; None for anything else.

    Raises:
        CapfiltError: it is one of these, but cannot be read.
    """
    local = Path(path).expanduser()
    if local.suffix in (".pth", ".pt"):
        return read_lavis(local)
    if (local / "config.json").is_file() and read_object(local / "config.json").get("model_type") == "blip-2":
        return read_blip2(local)
    if (local / OWN_CONFIG_FILE).is_file():
        return read_own(local)
    return None


def read_lavis(path: Path) -> ExternalCheckpoint:
    """Read a LAVIS checkpoint, ``{"model": {name: tensor}, ...}``, without running code of the file."""
    if not path.is_file():
        raise CapfiltError(f"{path}: no such file")
    content = _unpickled(path)
    tensors = content.get("model") if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise CapfiltError(f'{path} is not a LAVIS checkpoint: there are no tensors under "model"')
    if unfilled := [name for name, tensor in tensors.items() if not _is_filled(tensor)]:
        raise CapfiltError(
            f"{path}: {len(unfilled)} tensors are larger than what is stored of them, or are not plain tensors, "
            f"{printable(unfilled[0])[:80]} first; it is not read"
        )
    tensors = unwrapped_names(tensors)
    if "query_tokens" not in tensors:
        raise CapfiltError(f"{path} is not a BLIP-2: it has no query_tokens")
    return ExternalCheckpoint(kind="lavis", path=str(path), tensors=tensors)


def _is_filled(tensor: Tensor) -> bool:
    """Return whether a tensor is dense and stores each of its values: copying an expanded one could fill the memory."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def _reject_compressed(path: Path) -> None:
    """Raise CapfiltError where a zip's entries are larger than the file: torch.save does not compress or share them."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        num_bytes = sum(entry.file_size for entry in archive.infolist())
    if num_bytes > path.stat().st_size:
        raise CapfiltError(f"{path} is not a file of torch.save: it is compressed, or its entries overlap")


def _unpickled(path: Path) -> Any:
    """Return what torch.load reads without running code. Its advice to run the code is not shown."""
    try:
        _reject_compressed(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except CapfiltError:
        raise
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            start = file.read(64)
        if not start.startswith((b"\x80", b"PK")) and (what := wrong_file(start)):
            raise CapfiltError(f"{path} is not a file of torch.save: {what}") from error
        named = _GLOBAL.search(str(error))
        asked = f" (it asks for {printable(named[1])[:80]})" if named else ""
        raise CapfiltError(
            f"{path} holds more than tensors and plain values{asked}, and is not read"
        ) from error
    except Exception as error:  # torch does not document what it raises for a damaged file
        reason = "it is empty" if not path.stat().st_size else printable(first_line(error))[:200]
        raise CapfiltError(f"{path} is not a file of torch.save: {reason}") from error


def read_blip2(folder: Path) -> ExternalCheckpoint:
    """Read ``Blip2ForImageTextRetrieval`` or ``Blip2ForConditionalGeneration`` as ``save_pretrained`` wrote it.

    The side file of capfilt's exports is read too, so that capfilt -> Hugging Face -> capfilt is exact.
    """
    config = read_object(folder / "config.json")
    if config.get("model_type") != "blip-2":
        raise CapfiltError(
            f"{folder} is a {shown(config.get('model_type'))} model; only 'blip-2' models can be read"
        )
    tensors: dict[str, Tensor] = {}
    files = [path for path in sorted(folder.glob("*.safetensors")) if path.name != EXTRA_FILE]
    if not files:
        raise CapfiltError(f"{folder} has no .safetensors; only safetensors are read")
    for path in files:
        tensors |= _read_safetensors(path)
    renamed = from_hf(unwrapped_names(tensors), _family(config, folder), str(folder))
    if (folder / EXTRA_FILE).is_file():
        renamed |= _read_safetensors(folder / EXTRA_FILE)
    own_config = folder / OWN_CONFIG_FILE
    run_config = read_object(own_config).get("config") if own_config.is_file() else None
    return ExternalCheckpoint(kind="huggingface", path=str(folder), tensors=renamed, config=run_config)


def read_own(folder: Path) -> ExternalCheckpoint:
    """Read an export in capfilt's own format."""
    config = read_object(folder / OWN_CONFIG_FILE)
    if (config.get("format"), config.get("version")) != (OWN_FORMAT, OWN_VERSION):
        raise CapfiltError(
            f"{folder / OWN_CONFIG_FILE} is of format {shown(config.get('format'))}, version "
            f"{shown(config.get('version'))}; "
            f"this capfilt reads {OWN_FORMAT!r}, version {OWN_VERSION}"
        )
    tensors = unwrapped_names(_read_safetensors(folder / OWN_WEIGHTS_FILE))
    return ExternalCheckpoint(kind="capfilt", path=str(folder), tensors=tensors, config=config.get("config"))


def stage_state(
    given: Mapping[str, Tensor], fresh: Mapping[str, Tensor], *, stage: Literal[1, 2], where: str
) -> dict[str, Tensor]:
    """Return the state that a stage begins with, from weights of the same stage or, for stage 2, of stage 1.

    Args:
        given: the trained weights, under LAVIS's names.
        fresh: the stage's initial trainable state: its names and shapes, and the language projection's values if
            ``given``, from stage 1, has none.
        stage: which one begins.
        where: the file, for messages.

    Raises:
        CapfiltError: a tensor is missing, unexpected, of another shape, or holds NaN or infinity.
    """
    state = require_same_shapes(given, fresh, stage=stage, where=where)
    require_finite_weights(state, where)
    # Files may be in half precision; training continues in the stage's own precision.
    return {name: state[name].to(fresh[name].dtype) for name in fresh}


def require_same_shapes(
    given: Mapping[str, Tensor], fresh: Mapping[str, Tensor], *, stage: Literal[1, 2], where: str
) -> dict[str, Tensor]:
    """Return the tensors that a stage begins with, as ``stage_state``, from names and shapes alone.

    Raises:
        CapfiltError: a tensor is missing, unexpected or of another shape.
    """
    state = dict(given)
    if stage == 2:
        state = {name: tensor for name, tensor in state.items() if not _STAGE1_ONLY.fullmatch(name)}
        if not any(_PROJECTION.fullmatch(name) for name in state):
            state |= {name: tensor for name, tensor in fresh.items() if _PROJECTION.fullmatch(name)}
    if problems := tensor_differences(state, fresh):
        raise CapfiltError(f"{where} is not a checkpoint of this stage {stage} model: {problems}")
    return state


def _family(config: Mapping[str, Any], folder: Path) -> Family | None:
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or "Blip2ForConditionalGeneration" not in architectures:
        return None
    text_config = config.get("text_config")
    model_type = text_config.get("model_type") if isinstance(text_config, dict) else None
    if model_type not in ("opt", "t5"):
        raise CapfiltError(
            f"{folder}: its language model is {shown(model_type)}; only opt and t5 can be read"
        )
    return model_type


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    safetensors_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, FileNotFoundError) as error:
        raise not_safetensors(path, printable(first_line(error))[:200]) from error
