"""The TOML file of a corpus, a training or a bootstrapping: read, overridden by ``--set``, checked, paths resolved.

Relative paths are relative to the file's folder; in a ``--set``, to the current directory. What can be a path
or a name (caption.model, rank.pretrained, language.model) is a path if it starts with ``./``, ``../``, ``~`` or
``/``, or if it exists there; "Salesforce/blip-image-captioning-large" stays a hub id.
"""

import difflib
import json
import os.path
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.config_messages import Origin, config_errors, dotted_key, source_names, takes_text_only
from pipeline.config_text import (
    MAX_DEPTH,
    TOO_DEEP,
    TOO_LONG,
    is_json,
    is_too_deep,
    parse_values,
    unusable_values,
)
from pipeline.digests import digest_json
from pipeline.toml_lines import KeyPath, key_lines, walk
from schemas.bootstrap import BootstrapConfig
from schemas.config import CapfiltConfig
from schemas.errors import CapfiltError, did_you_mean
from schemas.names import shown
from schemas.pretrain import PretrainConfig

# What a config describes, its sections, and the command that takes it.
_KINDS: dict[type[BaseModel], tuple[str, str, str]] = {
    CapfiltConfig: ("a corpus", "[corpus] and [[source]]", "capfilt run"),
    PretrainConfig: ("a training run", "[run], [data] and [optim]", "capfilt pretrain"),
    BootstrapConfig: ("a bootstrapping", "[bootstrap]", "capfilt bootstrap"),
}

_RECIPES = Path(__file__).resolve().parent.parent / "jobs" / "recipes"

C = TypeVar("C", CapfiltConfig, PretrainConfig, BootstrapConfig)
# Of the path to a key: the folder that a relative path there is relative to.
BaseOf = Callable[..., Path]

_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@")


def load_config(path: str | Path, overrides: Sequence[str] = (), kind: type[C] = CapfiltConfig) -> C:  # type: ignore[assignment]
    """Read a config file (TOML, or a run's resolved copy as JSON) and apply ``section.key=value`` overrides.

    Args:
        kind: the tree to read: a corpus's, a training run's, or a bootstrapping's.

    Raises CapfiltError that names every error, each on a line of its own with the line of the file or the
    ``--set`` it is in.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise CapfiltError(f"{path}: no such config file{_nearest_file(path)}") from None
    except UnicodeDecodeError as error:
        raise CapfiltError(
            f"{path}: not a TOML file: not UTF-8 at byte {error.start}; save it as UTF-8"
        ) from None
    except OSError as error:
        raise CapfiltError(f"{path}: cannot be read: {error.strerror}; a config is one TOML file") from None
    return parse_config(text, str(path), overrides, path.parent, kind)


def parse_config(
    text: str,
    origin: str,
    overrides: Sequence[str] = (),
    base_folder: str | Path = ".",
    kind: type[C] = CapfiltConfig,  # type: ignore[assignment]
) -> C:
    """Turn TOML text into a config; ``origin`` is its name in messages, ``base_folder`` that of its paths."""
    values = parse_values(text, origin)
    if not values and not overrides:
        what, sections, _ = _KINDS[kind]
        raise CapfiltError(f"{origin}: the file is empty; the config of {what} has {sections}")
    _reject_other_kind(values, origin, kind)
    places = Origin(name=origin, lines={} if is_json(text) else key_lines(text), kind=kind)
    errors = [message for override in overrides if (message := _apply(override, values, places))]
    if unusable := list(unusable_values(values, places)):
        raise CapfiltError("\n".join(errors + unusable))
    errors += _secrets(values, places)
    config = None
    try:
        # Strict JSON is TOML's typing: an array makes a tuple, 1 is a float, but "1" and true are not numbers.
        config = kind.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        errors += config_errors(error, values, places)
    if errors or config is None:
        raise CapfiltError("\n".join(errors))

    def base(*path: str | int) -> Path:
        return Path() if places.override_of(path) else Path(base_folder)

    if isinstance(config, PretrainConfig):
        return _resolve_training_paths(config, base)
    if isinstance(config, BootstrapConfig):
        return _resolve_bootstrap_paths(config, base)
    return _resolve_paths(config, base)


def _reject_other_kind(values: dict[str, Any], origin: str, kind: type[BaseModel]) -> None:
    """Raise CapfiltError that names the command, where every section is of the other kind of config."""

    def has_sections_of(tree: type[BaseModel]) -> bool:
        return bool(values.keys() & (set(tree.model_fields) - {"cluster"}))

    other = next((tree for tree in _KINDS if has_sections_of(tree)), kind)
    if other is not kind and not has_sections_of(kind):
        described, _, command = _KINDS[other]
        expected, sections, _ = _KINDS[kind]
        raise CapfiltError(
            f"{origin}: this is the config of {described}, for {command}; this command takes the config of {expected}, "
            f"which has {sections}"
        )


def dump_config(config: BaseModel) -> dict[str, Any]:
    """Return the resolved config as JSON values: the copy that is kept with a run."""
    return config.model_dump(mode="json")


def config_digest(config: BaseModel) -> str:
    """Return the sha256 of the resolved config."""
    return digest_json(dump_config(config))


def _nearest_file(path: Path) -> str:
    # Pages name recipes as jobs/recipes/NAME.toml, which is a place in a checkout alone.
    shipped = _RECIPES / path.name
    if shipped.is_file():
        return f"; the recipe of this name is {shipped}"
    near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.toml")], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


# -- overrides -----------------------------------------------------------------------------------------------


def _apply(override: str, values: dict[str, Any], places: Origin) -> str | None:
    """Set ``section.key=value`` among the values; return what is wrong with its form, if anything is."""
    name, equals, text = override.partition("=")
    path: KeyPath = tuple(part.strip() for part in name.split("."))
    if not equals or len(path) < 2 or not all(path):
        return f"--set {override}: not of the form section.key=value"
    if len(path) > MAX_DEPTH:
        return f"--set {shown(override)}: cannot be used: {TOO_DEEP}"
    if path[0] == "source" and places.kind is CapfiltConfig:
        path = _source_path(name.strip().removeprefix("source."), values)
        if not path:
            names = [name for name in source_names(values) if name]
            near = did_you_mean(name.split(".")[1], names)
            return (
                f"--set {override}: not of the form source.NAME.key=value, NAME of {', '.join(names)}{near}"
            )
    else:
        path = _through_lists(path, values)
    table: Any = values
    for number, part in enumerate(path[:-1]):
        table = table.setdefault(part, {}) if isinstance(table, dict) else table[part]
        if isinstance(table, list) and not isinstance(path[number + 1], int):
            name = dotted_key(path[: number + 1], values)
            return f"--set {override}: {name} is a list of {len(table)}; say which: {name}.0.key=value"
        if not isinstance(table, (dict, list)):
            return f"--set {override}: {dotted_key(path[:-1], values)} is not a section"
    try:
        value = _override_value(text.strip(), path, places.kind)
        reason = TOO_DEEP if is_too_deep(value) else None
    except (RecursionError, ValueError) as error:  # not TOMLDecodeError: then it is text
        reason = TOO_DEEP if isinstance(error, RecursionError) else TOO_LONG
    if reason:
        return f"--set {shown(override)}: cannot be used: {reason}"
    table[path[-1]] = value
    places.overridden[path] = override
    return None


def _source_path(address: str, values: dict[str, Any]) -> KeyPath:
    """Return where ``<source name>.<key>`` lies; names may hold dots, so the longest that fits wins."""
    numbers = {name: number for number, name in enumerate(source_names(values)) if name}
    for name in sorted(numbers, key=len, reverse=True):
        if address.startswith(f"{name}.") and (key := address.removeprefix(f"{name}.").strip()):
            return ("source", numbers[name], key)
    return ()


def _through_lists(path: KeyPath, values: Any) -> KeyPath:
    """Return the path with places in lists: ``data.corpus.1.path``; a list of one needs no number."""
    steps: list[str | int] = []
    for part in path:
        step: str | int = part
        if isinstance(values, list):
            if str(part).isdigit() and int(part) < len(values):
                step = int(part)
            elif len(values) == 1:
                steps.append(0)
                values = values[0]
        steps.append(step)
        values = (
            values.get(step) if isinstance(values, dict) else values[step] if isinstance(step, int) else None
        )
    return tuple(steps)


def _override_value(text: str, path: KeyPath, kind: type[BaseModel]) -> Any:
    """Return the value as TOML; as text where it is not TOML, or where the key takes only text (revision=12)."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = parsed["value"]
    is_text = len(parsed) > 1 or (takes_text_only(path, kind) and not isinstance(value, (str, list, dict)))
    return text if is_text else value


def _secrets(values: dict[str, Any], places: Origin) -> Iterator[str]:
    """Reject URLs with a password: the config is kept with every run."""
    for path, value in walk(values):
        if isinstance(value, str) and _PASSWORD.search(value):
            # The argument holds the password.
            place = "--set" if places.override_of(path) else places.place(path)
            yield f"{place}: {dotted_key(path, values)}: a password in a URL; use environment variables instead"


# -- paths ---------------------------------------------------------------------------------------------------


def _resolve_paths(config: CapfiltConfig, base: BaseOf) -> CapfiltConfig:
    """Return the config with every local path absolute."""
    values = config.model_dump()
    values["corpus"]["path"] = _anchored(values["corpus"]["path"], base("corpus", "path"))
    for number, source in enumerate(values["source"]):
        folder = base("source", number, "input")
        source["input"] = tuple(_anchored(text, folder) for text in source["input"])
    folder = base("crawl", "allow_files")
    values["crawl"]["allow_files"] = tuple(_anchored(text, folder) for text in values["crawl"]["allow_files"])
    for section in ("caption", "filter"):
        if values[section] is not None:
            values[section]["model"] = _path_or_name(values[section]["model"], base(section, "model"))
    for clip, path in ((values["rank"], ("rank",)), (values["rank"]["rerank"], ("rank", "rerank"))):
        if clip is not None:
            clip["model"] = _local_dir(clip["model"], base(*path, "model"))
            clip["pretrained"] = _path_or_name(clip["pretrained"], base(*path, "pretrained"))
    return CapfiltConfig.model_validate(values)


def _resolve_training_paths(config: PretrainConfig, base: BaseOf) -> PretrainConfig:
    values = config.model_dump()
    for name in ("output", "init_from"):
        if text := values["run"][name]:
            values["run"][name] = _anchored(text, base("run", name))
    for number, corpus in enumerate(values["data"]["corpus"]):
        corpus["path"] = _anchored(corpus["path"], base("data", "corpus", number, "path"))
    vision = values["vision"]
    vision["model"] = _local_dir(vision["model"], base("vision", "model"))
    models = [("vision", "pretrained"), ("qformer", "weights"), ("qformer", "tokenizer")]
    if config.language is not None:
        models.append(("language", "model"))
    for section, name in models:
        values[section][name] = _path_or_name(values[section][name], base(section, name))
    if config.blip is not None:
        for part, name in (("vision", "init"), ("text", "init"), ("text", "tokenizer")):
            section = values["blip"][part]
            section[name] = _path_or_name(section[name], base("blip", part, name))
    return PretrainConfig.model_validate(values)


def _resolve_bootstrap_paths(config: BootstrapConfig, base: BaseOf) -> BootstrapConfig:
    section = config.bootstrap.model_dump()
    for name, value in section.items():
        if isinstance(value, str) and value:
            section[name] = _anchored(value, base("bootstrap", name))
    return BootstrapConfig.model_validate({"bootstrap": section})


def _anchored(text: str, base: Path) -> str:
    """Make a path absolute; ``..`` goes textually, so that globs and folders yet to be made work too."""
    if "://" in text:
        return text
    return os.path.normpath(base.absolute() / Path(text).expanduser())


def _path_or_name(text: str, base: Path) -> str:
    is_path = text.startswith(("./", "../", "~", "/")) or (text != "" and (base / text).exists())
    return _anchored(text, base) if is_path else text


def _local_dir(model: str, base: Path) -> str:
    folder = model.removeprefix("local-dir:")
    return model if folder == model else f"local-dir:{_anchored(folder, base)}"
