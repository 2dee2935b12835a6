"""Cells of a list as texts: what is missing, what is a text, and the errors for anything else."""

import math
from typing import Any

from pipeline.intake.lists.columns import Rows, Unit
from pipeline.intake.lists.lines import not_utf8
from schemas.errors import CapfiltError
from schemas.names import shown

TEXT_KINDS = {str, type(None)}


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
