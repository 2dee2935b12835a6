"""The answer to a query as Arrow, pandas or polars, and how a notebook or a terminal shows it."""

import shutil
from collections.abc import Iterator
from html import escape
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from jobs.output.tables import table_lines
from jobs.output.values import cell
from schemas.errors import CapfiltError

if TYPE_CHECKING:
    import pandas
    import polars

_ROWS_SHOWN = 20


class QueryResult:
    """The rows of a query, in memory.

    Whatever takes Arrow's C stream takes it as it is: ``polars.DataFrame(result)``, ``pyarrow.table(result)``.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def arrow(self) -> pa.Table:
        """Return the rows as a pyarrow.Table, without a copy."""
        return self._table

    def pandas(self) -> "pandas.DataFrame":
        """Return the rows as a pandas.DataFrame. Raises CapfiltError where pandas is not installed."""
        _require("pandas")
        return self._table.to_pandas()

    def polars(self) -> "polars.DataFrame":
        """Return the rows as a polars.DataFrame. Raises CapfiltError where polars is not installed."""
        return _require("polars").from_arrow(self._table)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows as dicts."""
        return self._table.to_pylist(maps_as_pydicts="lossy")

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        return self._table.__arrow_c_stream__(requested_schema)

    def __len__(self) -> int:
        return self._table.num_rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows())

    def __repr__(self) -> str:
        shown = self._table.slice(0, _ROWS_SHOWN).to_pylist(maps_as_pydicts="lossy")
        width = shutil.get_terminal_size((100, 24)).columns
        names = self._table.column_names
        lines = table_lines(shown, names, width=width, more=".arrow()") if shown else ["  ".join(names)]
        return "\n".join([*lines, *self._rest()])

    def _repr_html_(self) -> str:
        names = self._table.column_names
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell(row[name], name))}</td>" for name in names) + "</tr>"
            for row in self._table.slice(0, _ROWS_SHOWN).to_pylist(maps_as_pydicts="lossy")
        )
        rest = "".join(f"<p>{line}</p>" for line in self._rest())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{rest}"

    def _rest(self) -> list[str]:
        """Return the line that says how many rows are not shown; none where all are."""
        more = len(self) - _ROWS_SHOWN
        return [f"... and {more:,} more rows"] if more > 0 else []


def _require(library: str) -> Any:
    try:
        return import_module(library)
    except ImportError as error:
        raise CapfiltError(
            f"{library} is not installed: pip install {library}, or take .arrow() or .rows()"
        ) from error
