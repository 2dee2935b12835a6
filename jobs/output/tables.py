"""Rows as a table that fits a screen without breaking a value.

Text wraps at its spaces; identifiers (uid, run id, path, URL, ...) are shown whole. What finds no room is left out
column by column, and named below the table; digests are shown by their first 12 digits, as git does, and named too.
Without a width (a pipe, ``--wide``) everything is whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property
from typing import Any

from rich.cells import cell_len

from jobs.output.values import cell
from schemas.names import printable

Rows = Sequence[Mapping[str, Any]]

_GAP = "  "
# Wrapped text gets at least this much, or the width of its longest word.
_LEAST_TEXT = 20
# So many columns, or a single row, read well as records where they do not fit beside one another.
_FEW_COLUMNS = 6
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SHORT_DIGEST = 12
# A path or a URL, which may have spaces in it.
_PLACE = re.compile(r"~?/|\.{1,2}/|[A-Za-z][A-Za-z0-9+.-]*:/")


@dataclass(frozen=True)
class _Column:
    name: str
    values: list[Any]

    @cached_property
    def cells(self) -> list[str]:
        return [cell(value, self.name) for value in self.values]

    @cached_property
    def is_empty(self) -> bool:
        return all(value in (None, "", [], {}) for value in self.values)

    @cached_property
    def is_number(self) -> bool:
        is_text = any(isinstance(value, str) for value in self.values)
        return not is_text and any(isinstance(value, (int, float, Decimal)) for value in self.values)

    @cached_property
    def width(self) -> int:
        """The width that no cell exceeds."""
        return max(cell_len(text) for text in (self.name, *self.cells))

    @cached_property
    def least(self) -> int:
        """The width below which something would break."""
        words = [cell_len(word) for text in self.cells for word in _words(text)]
        return min(self.width, max([cell_len(self.name), _LEAST_TEXT, *words]))

    def shortened(self) -> _Column:
        """Return the column with the first digits of its digests, or itself if it has none."""
        values = [_shortened(value) for value in self.values]
        return self if values == self.values else replace(self, values=values)


def table_lines(
    rows: Rows,
    names: Sequence[str],
    *,
    width: int | None,
    spare: Sequence[str] = (),
    aside: Sequence[str] = (),
    more: str = "--wide",
) -> list[str]:
    """Return the lines of a table.

    Args:
        rows: what to show, at least one.
        names: the columns, in order.
        width: of the screen; None shows everything whole, however wide.
        spare: columns to leave out first where there is no room, in this order.
        aside: columns to leave out wherever there is a width.
        more: the option that shows what is left out here.
    """
    whole = [_Column(printable(name), [row[name] for row in rows]) for name in names]
    if width is None:
        return _draw(whole, [column.width for column in whole])
    columns = [column.shortened() for column in whole]
    wanted = [column for column in columns if column.name not in aside]
    shown = _fitting(wanted, width, spare)
    if not shown:
        return _records(whole, width)
    cut = [column.name for column, before in zip(columns, whole, strict=True) if column is not before]
    left_out = [column for column in columns if column not in shown]
    return [*_draw(shown, _widths(shown, width)), *_note(left_out, cut, width, more)]


def fact_lines(facts: Mapping[str, Any], width: int | None) -> list[str]:
    """Return the lines of names with their values; a value that finds no room beside its name stands below it."""
    texts = {printable(name): cell(value, name) for name, value in facts.items()}
    indent = max((cell_len(name) for name in texts), default=0) + len(_GAP)
    lines = []
    for name, text in texts.items():
        if width is None or cell_len(text) <= width - indent:
            lines.append(f"{_padded(name, indent)}{text}".rstrip())
        elif max(map(cell_len, _words(text))) <= width - indent:
            first, *rest = _wrapped(text, width - indent)
            lines += [f"{_padded(name, indent)}{first}", *(" " * indent + line for line in rest)]
        else:
            below = _wrapped(text, width - len(_GAP))
            lines += [name, *((_GAP if cell_len(line) + len(_GAP) <= width else "") + line for line in below)]
    return lines


def _fitting(columns: list[_Column], width: int, spare: Sequence[str]) -> list[_Column]:
    """Return the columns that there is room for; none where records say more."""
    shown = list(columns)
    for column in _order_of_leaving(columns, width, spare):
        if _least(shown) <= width:
            break
        shown.remove(column)
    return shown if _least(shown) <= width else []


def _order_of_leaving(columns: list[_Column], width: int, spare: Sequence[str]) -> list[_Column]:
    """Return the columns that may be left out: empty ones, then spare ones; of many others those in the middle."""
    empty = [column for column in columns if column.is_empty]
    if spare:
        by_name = {column.name: column for column in columns}
        return empty + [by_name[name] for name in spare if name in by_name and by_name[name] not in empty]
    rest = [column for column in columns if column not in empty]
    if len(rest) <= _FEW_COLUMNS or len(columns[0].values) == 1:
        return empty
    too_wide = [column for column in rest if column.least > width]
    rest = [column for column in rest if column not in too_wide]
    middle = (len(rest) - 1) / 2
    return empty + too_wide + sorted(rest, key=lambda column: abs(rest.index(column) - middle))[:-2]


def _least(columns: Sequence[_Column]) -> int:
    return sum(column.least for column in columns) + len(_GAP) * (len(columns) - 1)


def _widths(columns: Sequence[_Column], width: int) -> list[int]:
    """Return each column's width: what is left of the screen goes to those that would wrap, in equal parts."""
    widths = [column.least for column in columns]
    left = width - _least(columns)
    wanting = sorted(range(len(columns)), key=lambda index: columns[index].width - columns[index].least)
    for done, index in enumerate(wanting):
        share = min(columns[index].width - columns[index].least, left // (len(wanting) - done))
        widths[index] += share
        left -= share
    return widths


def _draw(columns: Sequence[_Column], widths: Sequence[int]) -> list[str]:
    lines = [_line([column.name for column in columns], columns, widths)]
    for cells in zip(*(column.cells for column in columns), strict=True):
        wrapped = [_wrapped(text, width) for text, width in zip(cells, widths, strict=True)]
        for place in range(max(map(len, wrapped))):
            parts = [part[place] if place < len(part) else "" for part in wrapped]
            lines.append(_line(parts, columns, widths))
    return lines


def _line(parts: Sequence[str], columns: Sequence[_Column], widths: Sequence[int]) -> str:
    padded = [
        _padded(part, width, right=column.is_number)
        for part, column, width in zip(parts, columns, widths, strict=True)
    ]
    return _GAP.join(padded).rstrip()


def _records(columns: Sequence[_Column], width: int) -> list[str]:
    """Return each row as names and values below one another."""
    lines: list[str] = []
    for place in range(len(columns[0].values)):
        lines += [""] if place else []
        lines += fact_lines({column.name: column.values[place] for column in columns}, width)
    return lines


def _note(left_out: Sequence[_Column], cut: Sequence[str], width: int, more: str) -> list[str]:
    """Return the lines that name what is not shown whole."""
    kinds = {
        "left out": [column.name for column in left_out if not column.is_empty],
        "empty": [column.name for column in left_out if column.is_empty],
        f"first {_SHORT_DIGEST} digits": [
            name for name in cut if name not in {column.name for column in left_out}
        ],
    }
    parts = [f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names]
    return _wrapped(f"({'; '.join(parts)}; {more} shows all)", width) if parts else []


def _words(text: str) -> list[str]:
    """Return what must not be broken: the words of a text, all of a path or a URL."""
    return [text] if _PLACE.match(text) else text.split(" ")


def _wrapped(text: str, width: int) -> list[str]:
    """Return a text as lines of whole words."""
    if cell_len(text) <= width:
        return [text]
    lines, line = [], ""
    for word in _words(text):
        if line and cell_len(line) + 1 + cell_len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    return [*lines, line]


def _padded(text: str, width: int, *, right: bool = False) -> str:
    room = " " * max(0, width - cell_len(text))
    return room + text if right else text + room


def _shortened(value: Any) -> Any:
    """Return a value with only the first digits of the digests in it."""
    match value:
        case str() if _DIGEST.fullmatch(value):
            return value[:_SHORT_DIGEST]
        case list():
            return [_shortened(item) for item in value]
        case dict():
            return {key: _shortened(item) for key, item in value.items()}
        case _:
            return value
