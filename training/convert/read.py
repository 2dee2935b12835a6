"""Reads weights from outside a run: LAVIS's checkpoints, Hugging Face's ``Blip2*`` folders and capfilt's exports.

Tensors have LAVIS's names here. A stage must be given exactly what it trains: a missing, unexpected or misshapen tensor
is an error that names it.
"""

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.models.files.model_files import (
    OWN_CONFIG_FILE,
    read_object,
    unwrapped_names,
    wrong_file,
)
from schemas.errors import CapfiltError, first_line
from schemas.names import printable, shown
from training.convert.key_map import Family, blip_from_hf, from_hf
from training.models.pretrained import read_safetensors

Method = Literal["blip", "blip2"]

# Beside a Hugging Face export: the tensors that its classes do not have.
EXTRA_FILE = "capfilt_extra.safetensors"
# capfilt's own format.
OWN_FORMATS: dict[Method, str] = {"blip2": "capfilt-blip2", "blip": "capfilt-blip"}
OWN_VERSION = 1
OWN_WEIGHTS_FILE = "model.safetensors"

# In files but not trained: buffers, second names of tied tensors, and the frozen models.
_NOT_TRAINED = re.compile(
    r"Qformer\.bert\.embeddings\.position_ids|Qformer\.cls\.predictions\.decoder\.(weight|bias)"
    r"|visual_encoder\..+|(opt|t5|language)_model\..+"
)
# Of BLIP's files: buffers, the head's second bias, momentum encoders and queues.
_BLIP_NOT_TRAINED = re.compile(
    r".+\.position_ids|text_decoder\.cls\.predictions\.decoder\.bias|(visual|text)_encoder_m\..+"
    r"|(vision|text)_proj_m\..+|(image|text|idx)_queue|queue_ptr|ptr_queue"
)
_HEADS = (("qformer", "heads"), ("blip", "vision", "heads"), ("blip", "text", "heads"))
# torch's message for a global that a pickle refers to.
_GLOBAL = re.compile(r"GLOBAL (\S+) was not an allowed global")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalCheckpoint:
    """Weights under the names of LAVIS, or of BLIP's repository, and the format that they were read from.

    ``config``: the run's, which capfilt's exports have; it is not checked yet. ``heads``: of attention, by the key of
    a recipe that says so, where a file tells; no tensor's shape does.
    """

    kind: Literal["lavis", "huggingface", "capfilt"]
    path: str
    tensors: dict[str, Tensor]
    config: Any = None
    method: Method = "blip2"
    heads: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trained(self) -> dict[str, Tensor]:
        """The tensors that a stage trains: without frozen models, buffers and second names."""
        not_trained = _NOT_TRAINED if self.method == "blip2" else _BLIP_NOT_TRAINED
        return {name: tensor for name, tensor in self.tensors.items() if not not_trained.fullmatch(name)}

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
    """Return the weights of a LAVIS or BLIP ``.pth``, a ``Blip2*`` or ``Blip*`` folder or an export; None for others.

    Raises:
        CapfiltError: it is one of these, but cannot be read.
    """
    local = Path(path).expanduser()
    if local.suffix in (".pth", ".pt"):
        return read_lavis(local)
    if (local / "config.json").is_file():
        match read_object(local / "config.json").get("model_type"):
            case "blip-2":
                return read_blip2(local)
            case "blip":
                return read_blip(local)
    if (local / OWN_CONFIG_FILE).is_file():
        return read_own(local)
    return None


def read_lavis(path: Path) -> ExternalCheckpoint:
    """Read a file of LAVIS or of BLIP's repository, ``{"model": {name: tensor}, ...}``, without running its code."""
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
    if "query_tokens" in tensors:
        return ExternalCheckpoint(kind="lavis", path=str(path), tensors=tensors)
    if "visual_encoder.cls_token" in tensors and any(name.startswith("text_") for name in tensors):
        return ExternalCheckpoint(kind="lavis", path=str(path), tensors=tensors, method="blip")
    raise CapfiltError(f"{path} is neither a BLIP-2, which has query_tokens, nor a BLIP")


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
    return _huggingface(
        folder,
        lambda tensors: from_hf(tensors, _family(config, folder), str(folder)),
        method="blip2",
        heads={"qformer.heads": _value(config, "qformer_config", "num_attention_heads")},
    )


def read_blip(folder: Path) -> ExternalCheckpoint:
    """Read a ``Blip*`` folder as ``save_pretrained`` wrote it, and the side file of capfilt's exports."""
    config = read_object(folder / "config.json")
    heads = {
        f"blip.{part}.heads": _value(config, f"{part}_config", "num_attention_heads")
        for part in ("vision", "text")
    }
    return _huggingface(
        folder, lambda tensors: blip_from_hf(tensors, str(folder)), method="blip", heads=heads
    )


def recorded_heads(config: Any) -> dict[str, Any]:
    """Return the heads of attention by their keys, of a config as it was recorded; unchecked."""
    return {".".join(keys): _value(config, *keys) for keys in _HEADS}


def _value(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _huggingface(
    folder: Path,
    renamed: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    method: Method,
    heads: Mapping[str, Any],
) -> ExternalCheckpoint:
    tensors: dict[str, Tensor] = {}
    files = [path for path in sorted(folder.glob("*.safetensors")) if path.name != EXTRA_FILE]
    if not files:
        raise CapfiltError(f"{folder} has no .safetensors; only safetensors are read")
    for path in files:
        tensors |= read_safetensors(path)
    named = renamed(unwrapped_names(tensors))
    if (folder / EXTRA_FILE).is_file():
        named |= read_safetensors(folder / EXTRA_FILE)
    own_config = folder / OWN_CONFIG_FILE
    run_config = read_object(own_config).get("config") if own_config.is_file() else None
    return ExternalCheckpoint(
        kind="huggingface",
        path=str(folder),
        tensors=named,
        config=run_config,
        method=method,
        heads=heads,
    )


def read_own(folder: Path) -> ExternalCheckpoint:
    """Read an export in capfilt's own format."""
    config = read_object(folder / OWN_CONFIG_FILE)
    methods: dict[Any, Method] = {(name, OWN_VERSION): method for method, name in OWN_FORMATS.items()}
    method = methods.get((config.get("format"), config.get("version")))
    if method is None:
        raise CapfiltError(
            f"{folder / OWN_CONFIG_FILE} is of format {shown(config.get('format'))}, version "
            f"{shown(config.get('version'))}; "
            f"this capfilt reads {' and '.join(map(repr, OWN_FORMATS.values()))}, version {OWN_VERSION}"
        )
    tensors = unwrapped_names(read_safetensors(folder / OWN_WEIGHTS_FILE))
    return ExternalCheckpoint(
        kind="capfilt",
        path=str(folder),
        tensors=tensors,
        config=config.get("config"),
        method=method,
        heads=recorded_heads(config.get("config")),
    )


def _family(config: Mapping[str, Any], folder: Path) -> Family | None:
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or "Blip2ForConditionalGeneration" not in architectures:
        return None
    model_type = _value(config, "text_config", "model_type")
    if model_type not in ("opt", "t5"):
        raise CapfiltError(
            f"{folder}: its language model is {shown(model_type)}; only opt and t5 can be read"
        )
    return model_type
