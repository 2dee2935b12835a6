"""Values and names as SQL text."""

from collections.abc import Sequence


def quote(text: str) -> str:
    """Return text as an SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def quoted(names: Sequence[str]) -> str:
    """Return names of columns as a list in SQL."""
    return ", ".join(f'"{name}"' for name in names)
