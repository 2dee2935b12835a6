"""The SQL of a user, answered in a sealed DuckDB connection: one read of the corpus's tables and nothing else.

DuckDB's own list of allowed paths would not do: ``WITH x AS (COPY ... TO 'allowed') SELECT`` counts as a SELECT and
writes. Nor would ``register_filesystem``: DuckDB 2.0 seeks and reads one Python file handle from several threads.
"""

import contextlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from schemas.catalog.sql_text import quote
from schemas.catalog.table_schemas import CATALOG
from schemas.catalog.views import VIEWS
from schemas.errors import CapfiltError
from schemas.tables import TABLES

# The values of ``?`` and ``$1`` in order, or of ``$name`` by name.
Parameters = Sequence[Any] | Mapping[str, Any]

_BATCH_ROWS = 2048

# Errors that a damaged file can cause; the last comes from the text of DuckDB's own error.
FILE_ERRORS = (duckdb.IOException, duckdb.InvalidInputException, UnicodeDecodeError)

# DuckDB's own tables and functions tell about the machine (memory, cores, platform, folders), except for these.
_DATABASE_FACTS = ("duckdb_", "pragma_", "pg_settings", "current_setting")
_ANSWERED = {
    "duckdb_columns",
    "duckdb_functions",
    "duckdb_keywords",
    "duckdb_schemas",
    "duckdb_tables",
    "duckdb_types",
    "duckdb_views",
}
# They run an SQL text, or read a table, whose name is a value: it cannot be checked beforehand.
_INDIRECT = {"query", "query_table"}

# Without the first four, the settings would show paths of the host.
_SANDBOX = (
    "SET secret_directory = ''",
    "SET extension_directory = ''",
    "SET home_directory = ''",
    "SET temp_directory = ''",
    "SET max_temp_directory_size = '0B'",
    "SET autoinstall_known_extensions = false",
    "SET autoload_known_extensions = false",
    "SET enable_external_access = false",
    "SET lock_configuration = true",
)

# SHOW TABLES and DESCRIBE: DuckDB's own answers also list what lies below the tables, and leave the comments out.
_START = r"(?:\s|--[^\n]*\n|/\*.*?\*/)*"
_END = r"\s*;?\s*"
_SHOW_TABLES = re.compile(rf"{_START}SHOW\s+(?:ALL\s+)?TABLES{_END}", re.I | re.S)
_DESCRIBE = re.compile(rf'{_START}(?:DESCRIBE|DESC|SHOW)\s+(?:TABLE\s+)?"?(\w+)"?{_END}', re.I | re.S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """The answer to a query while it is made: its rows come once."""

    columns: tuple[str, ...]
    rows: Iterator[tuple[Any, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """A connection without access to anything outside the database.

    ``prepare`` opens what a statement reads, once it is known to be a read. ``find_damage`` is called where an error
    may come from a committed file; it raises CorruptShardError if it does.
    """

    connection: duckdb.DuckDBPyConnection
    prepare: Callable[[str, Parameters], None]
    find_damage: Callable[[], object]


def seal(connection: duckdb.DuckDBPyConnection) -> None:
    """Forbid a connection every access outside the database, permanently."""
    for statement in _SANDBOX:
        connection.execute(statement)


@contextlib.contextmanager
def stream_answer(sealed: Sealed, sql: str, *, timeout_s: float) -> Iterator[Stream]:
    """Answer a user's SQL; the rows are made as they are taken. See ``_checked``."""
    with _checked(sealed, sql, (), timeout_s) as statement:
        result = sealed.connection.execute(statement)
        # Most errors come with the first rows: before the caller has printed any.
        first = result.fetchmany(_BATCH_ROWS)
        rest = itertools.chain.from_iterable(iter(lambda: result.fetchmany(_BATCH_ROWS), []))
        yield Stream(columns=column_names(result), rows=itertools.chain(first, rest))


def table_answer(sealed: Sealed, sql: str, parameters: Parameters, *, timeout_s: float) -> pa.Table:
    """Answer a user's SQL, all its rows as an Arrow table. See ``_checked``."""
    with _checked(sealed, sql, parameters, timeout_s) as statement:
        # A relation: DuckDB makes Arrow of it without a copy.
        answer = sealed.connection.sql(statement, params=parameters or None)
        return answer.to_arrow_table().rename_columns(list(column_names(answer)))


@contextlib.contextmanager
def _checked(sealed: Sealed, sql: str, parameters: Parameters, timeout_s: float) -> Iterator[str]:
    """Yield the statement that answers a user's SQL; it may take ``timeout_s`` until the block ends.

    Raises CapfiltError for anything that is not a single read, for errors in the SQL, and after ``timeout_s``.
    """
    connection = sealed.connection
    timer = threading.Timer(timeout_s, connection.interrupt)
    try:
        _require_read(connection, sql)
        statement = _with_comments(sql)
        sealed.prepare(statement, parameters)
        timer.daemon = True
        timer.start()
        yield statement
    except duckdb.InterruptException as error:
        raise CapfiltError(f"the query took over {timeout_s:g} s: narrow it, or give --timeout") from error
    except duckdb.OutOfMemoryException as error:
        raise CapfiltError(f"the query needs more memory than it may use: {error}") from error
    except duckdb.PermissionException as error:
        # Not the error's own words: they have this machine's folders.
        raise CapfiltError(
            "only the corpus's own tables can be read here: no other file, no URL, no extension"
        ) from error
    except (duckdb.Error, UnicodeDecodeError) as error:
        if isinstance(error, FILE_ERRORS):
            sealed.find_damage()
        raise CapfiltError(f"SQL: {error}") from error
    finally:
        timer.cancel()


def _require_read(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Reject all but one SELECT of the corpus, or its plain EXPLAIN: EXPLAIN ANALYZE runs its statement, a COPY too."""
    statements = connection.extract_statements(sql)
    if len(statements) == 1 and statements[0].type == duckdb.StatementType.MULTI:
        raise CapfiltError(
            "a PIVOT that looks up its own columns is several statements: name them, as in "
            "PIVOT samples ON status IN ('ok', 'failed') USING count(*)"
        )
    if len(statements) != 1:
        raise CapfiltError(f"one statement at a time: this has {len(statements)}")
    kind = statements[0].type
    if kind == duckdb.StatementType.EXPLAIN:
        explained = re.match(r"\s*EXPLAIN\s+(?!ANALYZE\b|\()(.*)", statements[0].query, re.I | re.S)
        inner = connection.extract_statements(explained[1]) if explained else []
        if len(inner) == 1 and inner[0].type == duckdb.StatementType.SELECT:
            return _reject_machine_facts(connection, inner[0].query)
        raise CapfiltError(
            "only a plain EXPLAIN of one SELECT is answered: EXPLAIN ANALYZE would run the statement"
        )
    if kind != duckdb.StatementType.SELECT:
        raise CapfiltError(
            f"the manifest is read-only: one SELECT (or EXPLAIN, DESCRIBE, SUMMARIZE) is answered, "
            f"this is {kind.name}; to take rows out, print them into a file with --csv or --json, or COPY them in a "
            f"DuckDB of your own that attaches {CATALOG} (READ_ONLY)"
        )
    _reject_machine_facts(connection, statements[0].query)


def _reject_machine_facts(connection: duckdb.DuckDBPyConnection, select: str) -> None:
    """Reject a SELECT that names what tells about the machine rather than the corpus."""
    [(tree,)] = connection.execute("SELECT json_serialize_sql(?)", [select]).fetchall()
    for node in _nodes(json.loads(tree)):
        name = str(node.get("function_name") or node.get("table_name") or "").lower()
        # SHOW of what is not a relation is the value of a setting.
        of_a_setting = node.get("show_type") == "SHOW" and name not in (*TABLES, *VIEWS)
        if name in _INDIRECT:
            raise CapfiltError(f"{name}() is not answered here: write the SELECT itself")
        if of_a_setting or (name.startswith(_DATABASE_FACTS) and name not in _ANSWERED):
            raise CapfiltError(
                f"{name} tells about this machine, not about the corpus, and is not answered here; "
                "SHOW TABLES and DESCRIBE tell about the corpus"
            )


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Yield every node of a parsed statement: what it names stands in some of them."""
    if isinstance(tree, dict):
        yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for part in tree:
            yield from _nodes(part)


def column_names(result: duckdb.DuckDBPyConnection | duckdb.DuckDBPyRelation) -> tuple[str, ...]:
    """Return the names of a result's columns, each once."""
    columns: list[str] = []
    for column in result.description or ():
        name, again = column[0], 1
        while name in columns:
            name, again = f"{column[0]}_{again}", again + 1
        columns.append(name)
    return tuple(columns)


def _with_comments(sql: str) -> str:
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
