"""How one value looks: to people in a table, to programs in JSON."""

import math
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from schemas.names import printable


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
        case int() | Decimal():
            return f"{value:,}"
        case float() if name.endswith("share"):
            return f"{100 * value:.1f}%"
        case float():
            return f"{value:.4g}" if abs(value) < 999.5 else f"{value:,.0f}"
        case datetime():
            return f"{value:%Y-%m-%d %H:%M:%S}"
        case list():
            return " | ".join(cell(item) for item in value)
        case dict():
            return ", ".join(f"{printable(str(key))}={cell(item)}" for key, item in value.items())
        case _:
            # Alt texts and server messages may hold terminal control sequences.
            return printable(str(value))


def readable_bytes(number: int) -> str:
    """Return bytes in the unit that leaves at most four digits."""
    size = float(number)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.95 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1000
    raise AssertionError


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    match value:
        case dict():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
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
