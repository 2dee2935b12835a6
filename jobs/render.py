"""Rows as a table on a terminal, or as JSON: the one place that decides how a value looks."""

import csv
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from schemas.names import printable

if TYPE_CHECKING:
    from rich.console import Console

# Without a terminal rich would fold every table to 80 columns: a pipe has no width.
_PIPE_WIDTH = 1000


def console() -> "Console":
    """Return a console for standard output that leaves lines whole in a pipe."""
    from rich.console import Console

    return Console(highlight=False) if sys.stdout.isatty() else Console(width=_PIPE_WIDTH, highlight=False)


def print_json(value: Any) -> None:
    """Print one JSON value; a NaN, which JSON has not, as null."""
    text = json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)
    # In JSON they stand in strings alone, and can be escaped: a terminal would act on them.
    print(text if text.isprintable() else "".join(map(_escaped, text)))


def print_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows as CSV with a header; lists and maps as JSON."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([json.dumps(_plain(one)) if isinstance(one, (list, dict)) else one for one in row])


def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = (), title: str = "") -> None:
    """Print rows under their column names; a column that no row fills is left out unless it is asked for."""
    from rich.table import Table
    from rich.text import Text

    names = list(columns) or list(rows[0] if rows else ())
    table = Table(box=None, pad_edge=False)
    for name in names:
        numeric = any(isinstance(row[name], (int, float, Decimal)) for row in rows) and not any(
            isinstance(row[name], str) for row in rows
        )
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        # As Text: a caption with brackets in it is no markup.
        table.add_row(*(Text(cell(row[name], name)) for name in names))
    if not rows:
        print(f"{title}: none" if title else "none")
        return
    out = console()
    with out.capture() as captured:
        out.print(table)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    print("\n".join([title, *lines] if title else lines))


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print names and values, one a line; those without a value are left out."""
    facts = {name: value for name, value in facts.items() if value is not None and value != []}
    width = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        print(f"{name:<{width}}  {cell(value, name)}")


def cell(value: Any, name: str = "") -> str:
    """Return a value as people read it: bytes in units, times to the second, NULL as a dash."""
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int() if name.endswith("bytes"):
            return readable_bytes(value)
        case int() if name == "seed":
            return str(value)
        case int():
            return f"{value:,}" if abs(value) >= 10_000 else str(value)
        case float() if name.endswith("share"):
            return f"{100 * value:.1f}%"
        case float():
            return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
        case datetime():
            return f"{value:%Y-%m-%d %H:%M:%S}"
        case list():
            return " | ".join(cell(item) for item in value)
        case dict():
            return ", ".join(f"{printable(str(key))}={cell(item)}" for key, item in value.items())
        case _:
            # Alt texts and server messages may hold terminal control sequences.
            return printable(str(value))


def complain(message: object) -> None:
    """Print an error, which may quote the names and texts of others, on standard error."""
    print(printable_lines(f"capfilt: {message}"), file=sys.stderr)


def printable_lines(text: str) -> str:
    """Return lines without what a terminal would act on."""
    return "\n".join(map(printable, text.split("\n")))


def readable_bytes(number: int) -> str:
    """Return bytes in the unit that leaves at most four digits."""
    size = float(number)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def _escaped(letter: str) -> str:
    return letter if letter.isprintable() else json.dumps(letter)[1:-1]


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    match value:
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case float():
            return value if math.isfinite(value) else None
        case None | bool() | int() | str():
            return value
        case datetime() | date():
            return value.isoformat()
        case Decimal():
            return float(value)
        case bytes():
            return value.hex()
        case _:
            return str(value)
