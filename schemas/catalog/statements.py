"""The statements that make the catalog in a DuckDB, in their order, and what a statement reads of it."""

import functools
import re
from collections.abc import Mapping

from schemas.catalog.sql_text import quote
from schemas.catalog.table_schemas import DATA_TABLES, RECORD_TABLES
from schemas.catalog.tables import COMMITTED_FILES, TABLE_SQL
from schemas.catalog.views import FUNCTIONS, TABLE_MACROS, VIEWS
from schemas.tables import TABLE_DOCS, TABLES, column_doc


def base_views(relations: Mapping[str, str]) -> list[str]:
    """Return the statements that make the views of ``base``, which all others read."""
    return [_view(f"base.{name}", sql) for name, sql in relations.items()]


def record_views(relations: Mapping[str, str]) -> list[str]:
    """Return the statements that make the tables whose rows come from records.

    ``base.<table>_events`` are the rows of all records, as existing catalogs call them; the tables keep the last state.
    """
    return [
        "CREATE SCHEMA IF NOT EXISTS base",
        *base_views({f"{table}_events": relations[f"{table}_events"] for table in RECORD_TABLES}),
        *(_view(name, relations.get(name, TABLE_SQL[name])) for name in RECORD_TABLES),
        _view("base.committed_files", COMMITTED_FILES),
    ]


def data_views(relations: Mapping[str, str]) -> list[str]:
    """Return the statements that make all else, once ``record_views`` are made."""
    bases = base_views({name: relations[name] for name in (*DATA_TABLES, "retried")})
    tables = [_view(name, sql) for name, sql in TABLE_SQL.items() if name not in RECORD_TABLES]
    views = [_view(name, sql) for name, (_, sql) in VIEWS.items()]
    functions = [f"CREATE OR REPLACE MACRO {call} AS {body}" for call, (_, body) in FUNCTIONS.items()]
    macros = [f"CREATE OR REPLACE MACRO {call} AS TABLE {body}" for call, (_, body) in TABLE_MACROS.items()]
    return [*bases, *tables, *functions, *views, *macros]


def _view(name: str, sql: str) -> str:
    return f"CREATE OR REPLACE VIEW {name} AS {sql}"


def comments() -> list[str]:
    """Return the statements that say what each view and column is, for those who ask DuckDB."""
    tables = [
        f'COMMENT ON COLUMN {table}."{field.name}" IS {quote(column_doc(field))}'
        for table, schema in TABLES.items()
        for field in schema
    ]
    docs = TABLE_DOCS | {name: doc for name, (doc, _) in VIEWS.items()}
    return tables + [f"COMMENT ON VIEW {name} IS {quote(doc)}" for name, doc in docs.items()]


# What each name in a statement stands for.
_DEFINITIONS: dict[str, str] = {
    **TABLE_SQL,
    **{name: sql for name, (_, sql) in VIEWS.items()},
    **{call.partition("(")[0]: body for call, (_, body) in (FUNCTIONS | TABLE_MACROS).items()},
    "committed_files": COMMITTED_FILES,
}


def names_in(sql: str) -> set[str]:
    """Return every word of a statement, and every relation that the views and macros among them read."""
    names, new = set[str](), set(re.findall(r"\w+", sql.lower()))
    while new:
        names |= new
        new = set().union(*(_relations_of(name) for name in new & _DEFINITIONS.keys())) - names
    return names


@functools.cache
def _relations_of(name: str) -> set[str]:
    """Return the relations that a definition reads: of our own SQL they stand behind FROM and JOIN alone."""
    return set(re.findall(r"\b(?:FROM|JOIN)\s+(?:\w+\.)?(\w+)", _DEFINITIONS[name]))
