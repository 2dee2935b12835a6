"""What commands print: tables, facts, JSON, CSV and errors."""

import csv
import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jobs.output.values import plain
from schemas.names import printable


def print_json(value: Any) -> None:
    """Print one JSON value; a NaN, which JSON has not, as null."""
    text = json.dumps(plain(value), ensure_ascii=False, allow_nan=False)
    # In JSON they stand in strings alone, and can be escaped: a terminal would act on them.
    print(text if text.isprintable() else "".join(map(_escaped, text)))


def print_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows as CSV with a header; lists and maps as JSON; on a terminal without control characters."""
    look = _printable_field if sys.stdout.isatty() else _field
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(map(look, columns))
    for row in rows:
        writer.writerow(map(look, row))


def print_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str] = (),
    title: str = "",
    *,
    spare: Sequence[str] = (),
    aside: Sequence[str] = (),
    wide: bool | None = None,
) -> None:
    """Print rows under their column names; jobs/output/tables.py says how they are fitted into the screen.

    Args:
        rows: what to show; of none, that there is none is said.
        columns: those to show, all unless given.
        title: a line above.
        spare: columns to leave out first where the screen is too narrow.
        aside: columns to leave out on any screen.
        wide: whether ``--wide`` was given; None for a command that has no such option.
    """
    # Here: it is of no use to the commands that print no table.
    from jobs.output.tables import table_lines

    if not rows:
        print(f"{title}: none" if title else "none")
        return
    lines = table_lines(
        rows,
        list(columns) or list(rows[0]),
        width=None if wide else screen_width(),
        spare=spare,
        aside=aside,
        more="--json" if wide is None else "--wide",
    )
    print("\n".join([title, *lines] if title else lines))


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print names and values, one a line; those without a value are left out."""
    from jobs.output.tables import fact_lines

    known = {name: value for name, value in facts.items() if value is not None and value != []}
    if known:
        print("\n".join(fact_lines(known, screen_width())))


def screen_width() -> int | None:
    """Return the terminal's width in columns; None where the output is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def complain(message: object) -> None:
    """Print an error on standard error; control characters of quoted names and texts are escaped."""
    print(printable_lines(f"capfilt: {message}"), file=sys.stderr)


def printable_lines(text: str) -> str:
    """Return lines without what a terminal would act on."""
    return "\n".join(map(printable, text.split("\n")))


def _escaped(letter: str) -> str:
    return letter if letter.isprintable() else json.dumps(letter)[1:-1]


def _field(value: Any) -> Any:
    return json.dumps(plain(value)) if isinstance(value, (list, dict)) else value


def _printable_field(value: Any) -> Any:
    value = _field(value)
    return printable(value) if isinstance(value, str) else value
