"""Columns that are asked of a list, the rows that it gives and their cells as texts.

And the errors: for columns that are missing, and for cells that are not texts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.intake.lists.lines import not_utf8
from schemas.errors import CapfiltError, did_you_mean
from schemas.names import shown

Columns = dict[str, list[Any]]
Unit = Literal["line", "row", "item"]

TEXT_KINDS = {str, type(None)}

IF_QUOTED = 'if this TSV is quoted as a CSV is, set the source\'s format = "tsv-quoted"'
_NAMES_SHOWN = 20
_RENAME = 'rename it to .{0}, or set the source\'s format = "{0}"'
_SEPARATOR_ADVICE = {
    "\t": f"tabs: {_RENAME.format('tsv')}",
    ";": "semicolons, which no format here has: convert it to commas or to Parquet",
    ",": f"commas: {_RENAME.format('csv')}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The columns to read of a list, and by which names it has its URLs and captions, read or not.

    ``may_hold_paths``: its URLs may be paths of files.
    """

    url: str
    caption: str | None = None
    columns: tuple[str, ...]
    may_hold_paths: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Some consecutive rows of a list, by column: all of the same length, a missing cell is None.

    ``numbers`` says where each row is, for error messages: its line, row or item, as ``unit`` says.
    """

    columns: Columns
    numbers: Sequence[int]
    unit: Unit

    def __len__(self) -> int:
        return len(self.numbers)

    def with_urls(self, column: str, file: str) -> "Rows":
        """Return the rows whose cell in a column is a URL, as text. Whether it is a good one, the crawl finds out."""
        urls = self.columns[column] = column_texts(self, column, file)
        kept = [row for row, url in enumerate(urls) if url and not url.isspace()]
        return self if len(kept) == len(urls) else self.take(kept)

    def place(self, row: int) -> str:
        """Return where a row is in its file."""
        return f"{self.unit} {self.numbers[row]:,}"

    def take(self, rows: Sequence[int]) -> "Rows":
        """Return some of the rows."""
        columns = {name: [cells[row] for row in rows] for name, cells in self.columns.items()}
        return Rows(columns=columns, numbers=[self.numbers[row] for row in rows], unit=self.unit)


def require(wanted: Wanted, present: Sequence[str], path: str, hint: str = "") -> None:
    """Reject a list without one of the columns, or with two of its name; name those it has."""
    for name in wanted.columns:
        count = present.count(name)
        if count > 1:
            raise CapfiltError(f"{path}: {count} columns are called {name!r}; rename or remove one")
        if not count:
            key = {
                wanted.url: "; set url_column",
                wanted.caption: '; set caption_column ("" without captions)',
            }
            raise CapfiltError(
                f"{path}: no column {name!r}{_nearest(name, present)} (it has {_listed(present)})"
                f"{hint or key.get(name, '')}"
            )


def require_header(wanted: Wanted, header: Sequence[str], path: str, form: str, separator: str) -> None:
    """Reject a header without one of the columns; the message says whether it is a line of data or a quoted line."""
    hint = ""
    if any("://" in cell for cell in header):
        hint = f"; its first line looks like data: {_header_advice(wanted, header, separator)}"
    elif "\r" in "".join(header):
        hint = "; its lines end in CR alone: convert it, for instance with tr '\\r' '\\n'"
    elif form == "tsv" and any(cell.startswith('"') for cell in header):
        hint = "; its first line has quotes: " + IF_QUOTED
    elif other := other_separator(header):
        hint = f"; its columns seem to be separated by {_SEPARATOR_ADVICE[other]}"
    require(wanted, header, path, hint)


def other_separator(header: Sequence[str]) -> str | None:
    """Return what separates the columns of a file that read as a single one, if its header shows it."""
    return next((mark for mark in _SEPARATOR_ADVICE if len(header) == 1 and mark in header[0]), None)


def _header_advice(wanted: Wanted, first: Sequence[str], separator: str) -> str:
    """Say which header fits above a first line of data."""
    url = next(index for index, cell in enumerate(first) if "://" in cell)
    if len(first) == 1:
        return f'put the line {wanted.url} above it, and set caption_column = ""'
    if len(first) == 2:
        names = [wanted.caption or "caption"] * 2
        names[url] = wanted.url
        shown_separator = "<TAB>" if separator == "\t" else separator
        return f"put a header line ({shown_separator.join(names)}) above it"
    return (
        f"put a header line above it that names its {len(first):,} columns; number {url + 1} is {wanted.url}"
    )


def _nearest(name: str, present: Sequence[str]) -> str:
    """Return what name was probably meant: the same but for case and blanks, or one that looks alike."""
    for other in present:
        if other.strip().casefold() == name.strip().casefold():
            return f"; did you mean {other if other == other.strip() else repr(other)}?"
    return did_you_mean(name, present[:1000])


def _listed(present: Sequence[str]) -> str:
    names = ", ".join(map(shown, present[:_NAMES_SHOWN])) or "none"
    more = len(present) - _NAMES_SHOWN
    return f"{names} and {more:,} more" if more > 0 else names


def column_texts(rows: Rows, column: str, file: str) -> list[str | None]:
    """Return a column's cells as texts, or None where they are missing."""
    cells = rows.columns[column]
    if set(map(type, cells)) <= TEXT_KINDS:
        return cells
    return [
        cell if type(cell) in TEXT_KINDS else _text(cell, f"{file}: {rows.place(row)}: {column}")
        for row, cell in enumerate(cells)
    ]


def _text(cell: Any, place: str, *, numbers: bool = False) -> str | None:
    """Return a cell's text, None where it is missing (NaN too: pandas writes it); reject any other value."""
    match cell:
        case None | str():
            return cell
        case bytes():
            try:
                return cell.decode()
            except UnicodeDecodeError as error:
                raise not_utf8(place, error) from error
        case float() if not math.isfinite(cell):
            return None
        case int() | float() if numbers and not isinstance(cell, bool):
            return str(cell)
        case _:
            raise CapfiltError(f"{place} is {shown(cell)} ({type(cell).__name__}) where text is expected")


def distinct_texts(cell: Any, unit: Unit, place: str) -> list[str]:
    """Return the distinct texts of a caption's cell in order: a text, a list of texts, or nothing.

    JSON has no type for a column, so that a caption of digits alone may have become a number there; a Parquet
    column of numbers is the wrong column.
    """
    cells = cell if isinstance(cell, list) else [cell]
    texts = (_text(each, place, numbers=unit != "row") for each in cells)
    return list(dict.fromkeys(text for text in texts if text and not text.isspace()))


def finite_json(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by None, however deep they are."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case list():
            return [finite_json(part) for part in value]
        case dict():
            return {name: finite_json(part) for name, part in value.items()}
    return value
