"""Error messages about a config, one line each: file and line, key, what is wrong, and how to fix it.

corpus.toml:12: crawl.image_sise_px: unknown key; did you mean crawl.image_size_px?
--set select.top_k=two: select.top_k: "two" is not an integer
"""

import difflib
import json
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.toml_lines import KeyPath
from schemas.config import CapfiltConfig, ConfigKeyError
from schemas.errors import did_you_mean

_MAX_LISTED_KEYS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where the values come from: lines of a file, and the ``--set`` arguments that replaced some.

    ``kind`` is the config tree that they are to fill.
    """

    name: str
    lines: dict[KeyPath, int]
    kind: type[BaseModel] = CapfiltConfig
    overridden: dict[KeyPath, str] = field(default_factory=dict)

    def override_of(self, path: KeyPath) -> str | None:
        """Return the --set argument that gave the value at ``path``, or part of it."""
        for given, argument in self.overridden.items():
            if path[: len(given)] == given or (path not in self.lines and given[: len(path)] == path):
                return argument
        return None

    def line(self, path: KeyPath) -> int | None:
        """Return the line of the key, or of the nearest table above it that the file has."""
        above = (path[:length] for length in range(len(path), 0, -1))
        return next((self.lines[part] for part in above if part in self.lines), None)

    def place(self, path: KeyPath) -> str:
        """Return where to correct the value at ``path``: the --set argument, or file and line."""
        if argument := self.override_of(path):
            return f"--set {argument}"
        line = self.line(path)
        if line is None and (argument := self.override_of(path[:-1])):
            return f"--set {argument}"  # the argument opened the section that the key is missing from
        return self.name if line is None else f"{self.name}:{line}"


def config_errors(error: ValidationError, values: dict[str, Any], origin: Origin) -> list[str]:
    """Return every error that pydantic reports, in the order of the file."""
    messages: list[tuple[int, str]] = []
    for detail in error.errors():
        context = detail.get("ctx", {})
        raised = context.get("error")
        path: KeyPath = (*detail["loc"], *(raised.key if isinstance(raised, ConfigKeyError) else ()))
        if detail["type"] == "too_short" and len(detail["input"]) >= context["min_length"]:
            continue  # pydantic counts only the valid elements, and each invalid one has an error of its own
        label = f"{dotted_key(path, values)}: " if path else ""
        messages.append(
            (origin.line(path) or 0, f"{origin.place(path)}: {label}{_message(path, detail, origin.kind)}")
        )
    return [message for _, message in sorted(messages, key=lambda message: message[0])]


def dotted_key(path: KeyPath, values: dict[str, Any]) -> str:
    """Return a path as one writes it: ``source.cc3m.input[0]``; a source without a name goes by number."""
    parts = list(path)
    if len(parts) > 1 and parts[0] == "source" and isinstance(parts[1], int):
        names = source_names(values)
        name = names[parts[1]]
        parts[1] = name if name and names.count(name) == 1 else f"#{parts[1] + 1}"
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


def source_names(values: dict[str, Any]) -> list[str]:
    """Return the names of the [[source]] tables, empty where one has none."""
    sources = values.get("source")
    tables = sources if isinstance(sources, list) else []
    names = [table.get("name") if isinstance(table, dict) else None for table in tables]
    return [name if isinstance(name, str) else "" for name in names]


def takes_text_only(path: KeyPath, kind: type[BaseModel]) -> bool:
    """Tell whether the key at ``path`` takes text and nothing else; False for an unknown key."""
    section = _section_at(path[:-1], kind)
    if section is None or path[-1] not in section.model_fields:
        return False
    annotation = section.model_fields[str(path[-1])].annotation
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return set(kinds) <= {str, types.NoneType}


def _message(path: KeyPath, detail: Any, kind: type[BaseModel]) -> str:
    """Say what is wrong with the value at ``path`` and what would be right."""
    value, context, shown = detail["input"], detail.get("ctx", {}), _shown(detail["input"])
    match detail["type"]:
        case "extra_forbidden":
            return f"unknown key{_nearest_key(path, kind)}"
        case "missing":
            return f"missing{_description(path, kind)}"
        case "value_error":
            return detail["msg"].removeprefix("Value error, ")
        case "literal_error":
            near = did_you_mean(str(value), re.findall(r"'([^']*)'", context["expected"]))
            return f"{shown} is not {context['expected']}{near}"
        case "tuple_type" if _is_table_list(path, kind):
            header = _header(path, kind)
            return f"not a list of tables; write {header}, with double brackets, and its keys below"
        case "tuple_type":
            return f"{shown} is not a list" + (f"; write [{shown}]" if isinstance(value, str) else "")
        case "model_type":
            return f"{shown} is not a section; write {_header(path, kind)} and its keys below"
        case "too_short" if _is_table_list(path, kind):
            return f"no {path[-1]}; add {_header(path, kind)} with {_required_keys(path, kind)}"
        case "too_short":
            return "needs one element at least"
        case "string_type":
            return f"{shown} is not text; put it in quotes"
        case "string_pattern_mismatch":
            return f"{shown} is not a name: small letters and digits, and . _ - between them"
        case "int_type" | "int_from_float":
            return f"{shown} is not an integer"
        case "float_type":
            return f"{shown} is not a number"
        case "bool_type":
            return f"{shown} is not true or false"
    return f"{shown} " + re.sub(r"^(Input|String|Value) ", "", detail["msg"])


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _header(path: KeyPath, kind: type[BaseModel]) -> str:
    names = tuple(part for part in path if isinstance(part, str))
    return f"[[{'.'.join(names)}]]" if _is_table_list(names, kind) else f"[{'.'.join(names)}]"


def _is_table_list(path: KeyPath, kind: type[BaseModel]) -> bool:
    section = _section_at(path[:-1], kind)
    info = section.model_fields.get(str(path[-1])) if section else None
    if info is None or typing.get_origin(info.annotation) is not tuple:
        return False
    return section_class(info.annotation) is not None


def _required_keys(path: KeyPath, kind: type[BaseModel]) -> str:
    section = _section_at(path, kind)
    assert section is not None, f"{path}: not a list of tables"
    names = [name for name, info in section.model_fields.items() if info.is_required()]
    return " and ".join(f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names)


def _nearest_key(path: KeyPath, kind: type[BaseModel]) -> str:
    """Suggest what was meant: a key of this section, else of another; or list what there is."""
    above, name = path[:-1], str(path[-1])
    section = _section_at(above, kind)
    assert section is not None, f"{path}: pydantic rejected a key of what is not a section"
    prefix = "".join(f"{part}." for part in above if isinstance(part, str))
    if near := did_you_mean(prefix + name, [prefix + key for key in section.model_fields], cutoff=0.8):
        return near
    elsewhere = {key.rpartition(".")[2]: key for key in reversed(_keys(kind))}
    if matches := difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.85):
        return f"; did you mean {elsewhere[matches[0]]}?"
    if len(section.model_fields) > _MAX_LISTED_KEYS:
        return f"; docs/config.md lists the keys of {_header(above, kind) if above else 'the file'}"
    return f"; {_header(above, kind) if above else 'the file'} has {', '.join(section.model_fields)}"


def _description(path: KeyPath, kind: type[BaseModel]) -> str:
    section = _section_at(path[:-1], kind)
    described = section.model_fields[str(path[-1])].description if section else None
    return f"; {described}" if described else ""


def _keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Return every key of a section and of those below it, dotted."""
    keys = []
    for name, info in section.model_fields.items():
        below = section_class(info.annotation)
        keys += [f"{prefix}{name}", *(_keys(below, f"{prefix}{name}.") if below else [])]
    return keys


def _section_at(path: KeyPath, kind: type[BaseModel]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = kind
    for name in path:
        if isinstance(name, str):
            field_info = section.model_fields.get(name) if section else None
            section = section_class(field_info.annotation) if field_info else None
    return section


def section_class(annotation: Any) -> type[BaseModel] | None:
    """Return the section within Section, tuple[Section, ...] or Section | None; None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    parts = map(section_class, typing.get_args(annotation))
    return next((section for section in parts if section), None)
