"""SHOW TABLES and DESCRIBE of the manifest: the tables that people ask, with what each table and column means.

DuckDB's own answers list what lies below the tables too, and leave the comments out.
"""

import re

from schemas.catalog import VIEWS, quote
from schemas.tables import TABLES

_START = r"(?:\s|--[^\n]*\n|/\*.*?\*/)*"
_END = r"\s*;?\s*"
_SHOW_TABLES = re.compile(rf"{_START}SHOW\s+(?:ALL\s+)?TABLES{_END}", re.I | re.S)
_DESCRIBE = re.compile(rf'{_START}(?:DESCRIBE|DESC|SHOW)\s+(?:TABLE\s+)?"?(\w+)"?{_END}', re.I | re.S)


def commented(sql: str) -> str:
    """Return the SELECT that answers SHOW TABLES, or DESCRIBE of a table; any other SQL as it is."""
    if _SHOW_TABLES.fullmatch(sql):
        return (
            "SELECT view_name AS name, comment FROM duckdb_views() "
            f"WHERE schema_name = 'main' AND list_contains({[*TABLES, *VIEWS]}, view_name) "
            f"ORDER BY list_position({[*TABLES, *VIEWS]}, view_name)"
        )
    described = _DESCRIBE.fullmatch(sql)
    if described and (table := described[1].lower()) in (*TABLES, *VIEWS):
        return (
            "SELECT column_name, data_type AS column_type, comment FROM duckdb_columns() "
            f"WHERE schema_name = 'main' AND table_name = {quote(table)} ORDER BY column_index"
        )
    return sql
