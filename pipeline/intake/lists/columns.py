"""Columns that are asked of a list, the rows that it gives, and the errors for columns that are missing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from schemas.errors import CapfiltError, did_you_mean
from schemas.names import shown

Columns = dict[str, list[Any]]
Unit = Literal["line", "row", "item"]

IF_QUOTED = 'if this TSV is quoted as a CSV is, set the source\'s format = "tsv-quoted"'
_NAMES_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The columns to read of a list, and by which names it has its URLs and captions, read or not."""

    url: str
    caption: str | None = None
    columns: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Some consecutive rows of a list, by column: all of the same length, a missing cell is None.

    ``numbers`` says where each row is, for error messages: its line, row or item, as ``unit`` says.
    """

    columns: Columns
    numbers: Sequence[int]
    unit: Unit

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
    """Reject a header without one of the columns; a line of data or a quoted line is told from it."""
    hint = ""
    if any("://" in cell for cell in header):
        hint = f"; its first line looks like data: {_header_advice(wanted, header, separator)}"
    elif "\r" in "".join(header):
        hint = "; its lines end in CR alone: convert it, for instance with tr '\\r' '\\n'"
    elif form == "tsv" and any(cell.startswith('"') for cell in header):
        hint = "; its first line has quotes: " + IF_QUOTED
    require(wanted, header, path, hint)


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
