"""The text of a config as plain values: parsed, and rejected with file and line where no config can hold them."""

import json
import re
import tomllib
from collections.abc import Iterator
from typing import Any

from pipeline.config_messages import Origin, dotted_key
from pipeline.toml_lines import KeyPath
from schemas.errors import CapfiltError
from schemas.names import depth_of, fits_utf8, printable, shown

# A config has five levels; the parsers and the walks over its values cost a call for each.
MAX_DEPTH = 64
TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"
# Python refuses to write longer integers as text, and reads them only as hexadecimal.
_MAX_BITS = 4096
TOO_LONG = "a number has thousands of digits"

_TOML_PLACE = re.compile(r"^(.*) \(at (?:line (\d+), column (\d+)|end of document)\)$", re.DOTALL)
_DEEP = re.compile(r"(?:[\[{]\s*){64}")
_DIGITS = re.compile(r"[0-9][0-9_]{4000}")


def is_json(text: str) -> bool:
    """Tell whether a config is a resolved copy, as kept with a run: no TOML begins so."""
    return text.lstrip().startswith("{")


def parse_values(text: str, origin: str) -> dict[str, Any]:
    """Return the values of a config's text. Raises CapfiltError with the place of what is wrong."""
    try:
        values = json.loads(text) if is_json(text) else tomllib.loads(text)
    except json.JSONDecodeError as error:
        raise CapfiltError(f"{origin}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    except tomllib.TOMLDecodeError as error:
        raise CapfiltError(_syntax_message(str(error), origin)) from None
    except RecursionError:
        raise CapfiltError(f"{_place(_DEEP, text, origin)}: cannot be used: {TOO_DEEP}") from None
    except ValueError:
        raise CapfiltError(f"{_place(_DIGITS, text, origin)}: cannot be used: {TOO_LONG}") from None
    if is_too_deep(values):
        key = next(name for name, value in values.items() if is_too_deep({name: value}))
        raise CapfiltError(f"{origin}: {shown(key)}: cannot be used: {TOO_DEEP}")
    return values


def is_too_deep(values: Any) -> bool:
    """Tell whether values are nested deeper than a config can be."""
    return depth_of(values) > MAX_DEPTH


def unusable_values(values: dict[str, Any], places: Origin) -> Iterator[str]:
    """Yield an error for each key or value that cannot be a file name, UTF-8 text or a number of a config."""
    waiting: list[tuple[KeyPath, Any]] = [((), values)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, (dict, list)):
            parts = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [((*path, name), part) for name, part in parts]
        texts = [text for text in (value, *path[-1:]) if isinstance(text, str)]
        reason = next(filter(None, map(_why_not_text, texts)), None)
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            reason = TOO_LONG
        if reason:
            yield f"{printable(places.place(path))}: {shown(dotted_key(path, values))}: cannot be used: {reason}"


def _why_not_text(text: str) -> str | None:
    if "\0" in text:
        return "a text has a NUL character (\\u0000); take it out"
    if not fits_utf8(text):
        return "a text has half a surrogate pair, or bytes that are not UTF-8; take it out"
    return None


def _place(pattern: re.Pattern[str], text: str, origin: str) -> str:
    """Return file, line and key of what a parser gave no place for, as far as a search finds it."""
    match = pattern.search(text)
    if match is None:
        return origin
    before = text[: match.start()]
    key = re.split(r"[=:]", before.rpartition("\n")[2])[0].strip(' \t"{')
    return f"{origin}:{before.count(chr(10)) + 1}" + (f": {shown(key)}" if key else "")


def _syntax_message(message: str, origin: str) -> str:
    if match := _TOML_PLACE.match(message):
        what, line, column = match.groups()
        place = f"{origin}:{line}:{column}" if line else f"{origin}: at its end"
        return f"{place}: not valid TOML: {what}"
    return f"{origin}: not valid TOML: {message}"
