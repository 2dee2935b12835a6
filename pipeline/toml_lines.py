"""The line of each key of a TOML text: tomllib gives no positions, and error messages name them.

A TOML text is a sequence of statements, each one or more whole lines: a header, or a key with its value. So the lines
are cut where tomllib accepts them as a text of its own.
"""

import re
import tomllib
from collections.abc import Sequence
from typing import Any

# A key's path from the root; the elements of arrays, those of [[tables]] included, go by number.
KeyPath = tuple[str | int, ...]

# What a statement can begin with; most lines inside a long array do not, and so are not parsed again and again.
_START = re.compile(r"""\s*(?:#|\[|$|(?:[\w-]+|"(?:[^"\\]|\\.)*"|'[^']*')\s*[.=])""")


def key_lines(text: str) -> dict[KeyPath, int]:
    """Return the line, from 1, on which each key of a valid TOML text begins.

    So too for the elements of an array that has whole elements on each of its lines; else they are on its key's line.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    keys = _KeyLines()
    first = 1
    for number in range(1, len(lines) + 1):
        if number < len(lines) and not _START.match(lines[number]):
            continue
        statement = lines[first - 1 : number]
        try:
            values = tomllib.loads("\n".join(statement))
        except tomllib.TOMLDecodeError:  # the statement goes on
            continue
        if statement[0].lstrip().startswith("["):
            keys.add_header(values, first)
        else:
            keys.add_values(values, keys.table, first, _element_lines(statement, first))
        first = number + 1
    return keys.lines


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


class _KeyLines:
    """The lines of the keys so far, and the table that the latest header opened."""

    def __init__(self) -> None:
        self.lines: dict[KeyPath, int] = {}
        self.table: KeyPath = ()
        self._lengths: dict[KeyPath, int] = {}  # of each array of tables

    def add_header(self, values: dict[str, Any], line: int) -> None:
        """Add [a.b] or [[a.b]], as tomllib reads the header alone; an array of tables stands for its latest element."""
        path: KeyPath = ()
        while values:
            ((name, inner),) = values.items()
            path = (*path, name)
            self.lines.setdefault(path, line)
            if isinstance(inner, list):
                self._lengths[path] = self._lengths.get(path, 0) + 1
                inner = inner[0]
            if path in self._lengths:
                path = (*path, self._lengths[path] - 1)
                self.lines.setdefault(path, line)
            values = inner
        self.table = path

    def add_values(
        self,
        values: dict[str, Any] | list[Any],
        path: KeyPath,
        line: int,
        element_lines: Sequence[int] = (),
    ) -> None:
        """Add every key and element of a statement's value; ``element_lines`` are those of its one array."""
        for name, value in values.items() if isinstance(values, dict) else enumerate(values):
            is_placed = isinstance(name, int) and name < len(element_lines)
            place = element_lines[int(name)] if is_placed else line
            self.lines.setdefault((*path, name), place)
            if isinstance(value, (dict, list)):
                # Only through dotted keys: the array is the statement's whole value.
                inner = element_lines if isinstance(values, dict) else ()
                self.add_values(value, (*path, name), place, inner)
