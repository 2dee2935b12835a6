"""The line of each key of a TOML text: tomllib gives no positions, and error messages name them.

A TOML text is a sequence of statements, each one or more whole lines: a header, or a key with its value. So the lines
are cut where tomllib accepts them as a text of its own.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

# A key's path from the root; the elements of arrays, those of [[tables]] included, go by number.
KeyPath = tuple[str | int, ...]

# What a statement can begin with; most lines inside a long array do not, and so are not parsed again and again.
_START = re.compile(r"""\s*(?:#|\[|$|(?:[\w-]+|"(?:[^"\\]|\\.)*"|'[^']*')\s*[.=])""")


def key_lines(text: str) -> dict[KeyPath, int]:
    """Return the line, from 1, on which each key of a valid TOML text begins.

    So too for the elements of an array that has whole elements on each of its lines; else they are on its key's line.
    """
    lines: dict[KeyPath, int] = {}
    table: KeyPath = ()
    lengths = Counter[KeyPath]()  # of each array of tables
    for first, statement, values in _statements(text.replace("\r\n", "\n").split("\n")):
        if statement[0].lstrip().startswith("["):
            # Of a header alone tomllib makes nested tables of one key each. An array of tables stands for its latest.
            table = ()
            while values:
                ((name, values),) = values.items()
                table = (*table, name)
                lines.setdefault(table, first)
                if isinstance(values, list):
                    lengths[table] += 1
                    (values,) = values
                if table in lengths:
                    table = (*table, lengths[table] - 1)
                    lines.setdefault(table, first)
            continue
        element_lines = _element_lines(statement, first)
        for path, _ in walk(values):
            element = next((part for part in path if isinstance(part, int)), len(element_lines))
            line = element_lines[element] if element < len(element_lines) else first
            lines.setdefault((*table, *path), line)
    return lines


def _statements(lines: list[str]) -> Iterator[tuple[int, list[str], Any]]:
    """Yield the number of each statement's first line, its lines, and its values."""
    first = 0
    for end in range(1, len(lines) + 1):
        if end == len(lines) or _START.match(lines[end]):
            with suppress(tomllib.TOMLDecodeError):  # raised where the statement goes on
                yield first + 1, lines[first:end], tomllib.loads("\n".join(lines[first:end]))
                first = end


def walk(values: Any, above: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield path and value of every key and element of a value, each before those below it."""
    for name, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield (*above, name), value
        if isinstance(value, (dict, list)):
            yield from walk(value, (*above, name))


def _element_lines(statement: list[str], first: int) -> list[int]:
    """Return the line of each element of an array of several lines, as far as each line has whole elements."""
    elements: list[int] = []
    for number, line in enumerate(statement if len(statement) > 1 else ()):
        opening = "" if number == 0 else "array = [\n"
        closing = "" if number == len(statement) - 1 else "\n]"
        try:
            (values,) = tomllib.loads(f"{opening}{line}{closing}").values()
        except tomllib.TOMLDecodeError:
            break
        if not isinstance(values, list):
            break
        elements += [first + number] * len(values)
    return elements
