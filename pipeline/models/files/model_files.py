"""Reads the files of untrusted models as data: bounded in size, checked in shape, never run.

A file may be damaged, half copied or hostile. Whatever is wrong with it raises one CapfiltError that names the file;
its contents appear in a message as printable text only.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.regular_files import open_regular
from schemas.errors import CapfiltError
from schemas.names import confined_name, printable

# Returns the first file that a model's folder lacks, or None.
FirstMissingFile = Callable[[Path], str | None]

# Configs have kilobytes; the largest tokenizers, of 256,000 words, 35 MB.
MAX_CONFIG_BYTES = 8 << 20
MAX_TOKENIZER_BYTES = 128 << 20
# The format's own limit.
_MAX_HEADER_BYTES = 100_000_000
# torch's own limit is 64; larger numbers are only slow to multiply.
_MAX_DIMENSIONS = 64
_MAX_NUMBER = (1 << 63) - 1
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8} | {
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "U16": 16, "I16": 16,
    "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
# What is found in the place of a model's file, by its first bytes.
_WRONG_FILES = (
    (
        b"version https://git-lfs",
        "the pointer of a git clone without its large files: run `git lfs pull` there",
    ),
    (b"PK\x03\x04", "a file of torch.save (or another zip): only safetensors are read, convert it"),
    (b"\x80", "a pickle: only safetensors are read, convert it"),
    (b"\x1f\x8b", "compressed with gzip: decompress it"),
    (b"GGUF", "a GGUF file: only safetensors are read"),
)
_WRAPPERS = ("module.", "_orig_mod.")
WEIGHTS_FILE, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# What capfilt's own exports say of themselves.
OWN_CONFIG_FILE = "capfilt.json"


class TensorEntry(NamedTuple):
    """Dtype and shape of one tensor, from the header of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]


def read_object(path: Path, where: str = "", max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Return a file's JSON object.

    Args:
        where: the config key that names the file, for messages.

    Raises:
        CapfiltError: the file is missing, larger than ``max_bytes``, not JSON, nested too deep, or another value.
    """
    what = f"{path} ({where})" if where else str(path)
    text = _read_bounded(path, what, max_bytes)
    try:
        value = json.loads(text)
    except RecursionError:
        raise CapfiltError(f"{what} is not a model's JSON: it is nested too deep") from None
    except ValueError as error:
        raise CapfiltError(
            f"{what} is not JSON: {wrong_file(text) or printable(str(error))[:200]}"
        ) from error
    if not isinstance(value, dict):
        raise CapfiltError(f"{what} is not a JSON object")
    return value


def exported_from(folder: Path) -> str | None:
    """Return the path of the checkpoint that capfilt exported to a folder; None where it names none."""
    try:
        checkpoint = read_object(folder / OWN_CONFIG_FILE).get("checkpoint")
    except CapfiltError:
        return None
    return checkpoint if isinstance(checkpoint, str) else None


def _read_bounded(path: Path, what: str, max_bytes: int) -> bytes:
    try:
        with open_regular(path) as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise CapfiltError(f"{what} cannot be read: {error.strerror or error}") from error
    if len(data) > max_bytes:
        raise CapfiltError(f"{what} is larger than the {max_bytes >> 20} MB that such a file may have")
    return data


def safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """Return dtype and shape of each tensor of a safetensors file, in the order of the file.

    Reads the header alone, and only after its length is known to be possible.

    Raises:
        CapfiltError: the file cannot be read, is not a safetensors file, is cut, or its tensors do not follow
            each other in it, as the format demands: else a few bytes could stand for any number of values.
    """
    try:
        size = path.stat().st_size
        with open_regular(path) as file:
            start = file.read(512)
            length = int.from_bytes(start[:8], "little")
            plausible = size >= 8 and length <= min(size - 8, _MAX_HEADER_BYTES)
            file.seek(8)
            text = file.read(length) if plausible else b""
    except OSError as error:
        raise CapfiltError(f"{path} cannot be read: {error.strerror or error}") from error
    if not plausible:
        raise not_safetensors(
            path, wrong_file(start) or ("it is empty" if not size else "its header is missing")
        )
    try:
        header = json.loads(text)
        entries = {name: _entry(value) for name, value in header.items() if name != "__metadata__"}
        spans = sorted(tuple(header[name]["data_offsets"]) for name in entries)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        raise not_safetensors(path, "its header does not describe tensors") from None
    _check_spans(spans, size - length - 8, path)
    return entries


def _check_spans(spans: Sequence[tuple[int, int]], num_bytes: int, path: Path) -> None:
    """Raise CapfiltError unless tensors follow each other without a gap in the bytes behind the header."""
    ends = [0, *(end for _, end in spans)]
    if [start for start, _ in spans] != ends[: len(spans)]:
        raise not_safetensors(path, "its tensors overlap or leave gaps")
    if ends[-1] > num_bytes:
        raise not_safetensors(path, f"it is cut: {ends[-1] - num_bytes:,} bytes are missing at its end")


def _entry(value: Mapping[str, Any]) -> TensorEntry:
    """Check what a header says of one tensor; raises ValueError, KeyError or TypeError."""
    shape, (start, end) = value["shape"], value["data_offsets"]
    numbers = (*shape, start, end)
    possible = all(type(number) is int and 0 <= number <= _MAX_NUMBER for number in numbers)
    if (
        not possible
        or len(shape) > _MAX_DIMENSIONS
        or end - start != math.prod(shape) * _BITS[value["dtype"]] // 8
    ):
        raise ValueError
    return TensorEntry(value["dtype"], tuple(shape))


def not_safetensors(path: Path, reason: str) -> CapfiltError:
    """Return the error of a file that should be a safetensors file."""
    return CapfiltError(f"{path} is not a safetensors file: {reason}")


def wrong_file(start: bytes) -> str | None:
    """Return what a file is that has the place of another, by its first bytes; None where nothing is known."""
    for magic, what in _WRONG_FILES:
        if start.startswith(magic):
            return f"it is {what}"
    if start.lstrip()[:1] == b"<":
        return "it is an HTML or XML page, as a download that failed leaves it: fetch it again"
    return None


def count_parameters(headers: Iterable[Mapping[str, TensorEntry]]) -> int:
    """Return the number of floating-point values in files with these headers."""
    return sum(
        math.prod(entry.shape) for header in headers for entry in header.values() if "F" in entry.dtype
    )


def reject_wrapped_names(names: Iterable[str], path: Path, wrappers: tuple[str, ...] = _WRAPPERS) -> None:
    """Raise CapfiltError where every tensor's name begins with what a wrapper of the training put before it."""
    names = list(names)
    for wrapper in wrappers:
        if names and all(name.startswith(wrapper) for name in names):
            raise CapfiltError(
                f"{path}: the names of all tensors begin with {wrapper!r}, which DistributedDataParallel or "
                "torch.compile put there; save the model that is inside (model.module or model._orig_mod)"
            )


def unwrapped_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return tensors without what DistributedDataParallel and torch.compile put before all their names."""
    unwrapped = dict(tensors)
    while wrapper := next(
        (prefix for prefix in _WRAPPERS if unwrapped and all(n.startswith(prefix) for n in unwrapped)), ""
    ):
        unwrapped = {name.removeprefix(wrapper): tensor for name, tensor in unwrapped.items()}
    return unwrapped


def weight_files(folder: Path, where: str = "") -> list[str]:
    """Return the names of a transformers model's weights: one file, or the index and the shards that it lists.

    Some of the files may be missing.

    Raises:
        CapfiltError: the index is not a JSON object of that kind, or names a file that is not a safetensors file
            inside the folder.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return [WEIGHTS_FILE]
    index = folder / WEIGHTS_INDEX
    # A tensor's name and file are some 100 bytes.
    weight_map = read_object(index, where, MAX_TOKENIZER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CapfiltError(f"{index} is not an index of safetensors: it has no weight_map")
    names = {confined_name(name, str(index)) for name in weight_map.values()}
    if pickles := sorted(name for name in names if not name.endswith(".safetensors")):
        raise CapfiltError(f"{index} names {pickles[0]}; only safetensors are read")
    return [index.name, *sorted(names)]


def first_missing_weights_file(folder: Path) -> str | None:
    """Return the first file that a transformers model's folder lacks to be loaded: its config, or a file of weights."""
    if not (folder / "config.json").is_file():
        return "config.json"
    if not any((folder / name).is_file() for name in (WEIGHTS_FILE, WEIGHTS_INDEX)):
        return WEIGHTS_FILE
    return next((name for name in weight_files(folder) if not (folder / name).is_file()), None)
