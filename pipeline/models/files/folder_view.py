"""A view of a model's folder that holds only the files and JSON keys that a library may read.

transformers and open_clip look into a folder for more than a model needs: Python files, other repositories, kernels,
adapters, templates, paths of further files. So they are given a temporary folder instead: links to the files with
weights and vocabularies, and copies of its JSON with the keys that are known here. An unknown key is left out where
that cannot matter (transformers' configs carry dozens) and rejected where the library would reject it; a file that
asks for code is always rejected, so that no model is loaded without code that it needs.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.models.files.model_files import read_object
from schemas.errors import CapfiltError
from schemas.names import printable

_ASKS_FOR_CODE = ("auto_map", "trust_remote_code", "custom_pipelines", "custom_generate")

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_PROCESSOR_KEYS = {
    "crop_size", "default_to_square", "image_mean", "image_std", "pad_size", "resample", "rescale_factor", "size",
}  # fmt: skip

# Far beyond any model; without bounds a few bytes of JSON ask for any amount of memory.
_MAX_LAYERS = 1024
_MAX_IMAGE_PX = 4096
_MAX_NUMBER = 1 << 31


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
        except BaseException as error:
            # PanicException is what a panic in Rust is in Python; the class cannot be imported.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise CapfiltError(f"{what} does not load: {_error_line(error, view, folder)}") from error


def _error_line(error: BaseException, view: Path, folder: Path) -> str:
    """Return the message of a library's error in one line; of a list of tensors, the first."""
    parts = str(error).replace(str(view), str(folder)).split("\n\t")
    return " ".join(printable(parts[min(1, len(parts) - 1)]).split())[:300] or type(error).__name__


def reject_code(values: Mapping[str, Any], path: Path) -> None:
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


def check_numbers(values: Mapping[str, Any], name: str, path: Path) -> None:
    """Refuse sizes that no model has."""
    for key, value in values.items():
        limit = (
            _MAX_LAYERS if key.endswith("layers") else _MAX_IMAGE_PX if key == "image_size" else _MAX_NUMBER
        )
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, list) or (isinstance(number, int | float) and not abs(number) <= limit):
                raise unusable(path, f"{name}.{key}", value)


def processor_config(folder: Path, image_size_px: Any, where: str) -> dict[str, Any]:
    """Return the settings of a captioner's image processor, wherever transformers wrote them.

    Args:
        image_size_px: that the model's config names.

    Raises:
        CapfiltError: they are damaged, ask for code, or make images of another size than the model takes.
    """
    path = folder / processor_file(folder)
    values = read_object(path, where)
    reject_code(values, path)
    if path.name == "processor_config.json":
        values = section(values, "image_processor", path)
    kept = {key: value for key, value in values.items() if key in _PROCESSOR_KEYS or key.startswith("do_")}
    size = kept.get("size")
    sides = [size.get("height"), size.get("width")] if isinstance(size, dict) else [size, size]
    if size is not None and sides != [image_size_px, image_size_px]:
        raise CapfiltError(
            f"{path}: size = {printable(repr(size))[:80]}, but the model takes images of "
            f"{printable(repr(image_size_px))[:40]} pixels (config.json, vision_config.image_size)"
        )
    for key in ("image_mean", "image_std"):
        if kept.get(key) is not None and not is_by_channel(kept[key], above_zero=key == "image_std"):
            raise unusable(path, key, kept[key])
    for key in ("resample", "rescale_factor"):
        if not isinstance(kept.get(key, 0), int | float):
            raise unusable(path, key, kept[key])
    return kept


def processor_file(folder: Path) -> str:
    """Return the name of the file with the image processor's settings: transformers 5 writes the second."""
    return next((name for name in PROCESSOR_FILES if (folder / name).is_file()), PROCESSOR_FILES[0])


def is_by_channel(values: Any, *, above_zero: bool) -> bool:
    """Tell whether a JSON value is three finite numbers, as a mean or a deviation by channel is."""
    return (
        isinstance(values, list)
        and len(values) == 3
        and all(isinstance(value, int | float) and math.isfinite(value) for value in values)
        and (not above_zero or min(values) > 0)
    )


def section(values: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    """Return the JSON object under a name. Raises CapfiltError where it is missing or another value."""
    value = values.get(name)
    if not isinstance(value, dict):
        raise CapfiltError(f"{path}: {name} is {'not a JSON object' if name in values else 'missing'}")
    return value


def unusable(path: Path, key: str, value: Any) -> CapfiltError:
    """Return the error of a value that no model has."""
    return CapfiltError(f"{path}: {key} = {printable(repr(value))[:80]} is not a value that a model has")
