"""The relations of ``base`` over the files of a corpus, which DuckDB finds by name, and over registered Arrow data."""

import re
from collections.abc import Sequence

import pyarrow as pa

from schemas.catalog.sql_text import quote, quoted
from schemas.catalog.table_schemas import DATA_TABLES, RECORD_TABLES, record_row_schema
from schemas.tables import SHARDS

# A folder that no source can be called. Its empty file keeps a glob from matching nothing, an error in DuckDB.
EMPTY_FOLDER = "~empty"
EMPTY_FILE = f"{EMPTY_FOLDER}/00000.parquet"
# Read before all others, for its columns, and for its rows of NULLs, which no record commits: DuckDB opens the first
# file of a list to learn what it has, whatever that file is, and takes each of the others to have as many rows. With
# fewer rows than there are files, it would join the wrong way round.
FIRST_FILE = f"{EMPTY_FOLDER}/first.parquet"
FIRST_FILE_ROWS = 10_000
# Names that a file of a shard may have.
_SHARD_FILES = "[0-9][0-9][0-9][0-9][0-9]*.parquet"
# A variable of a DuckDB session: by kind, the files to read instead of those that are found by name.
_FILES_VARIABLE = "capfilt_files"


def file_relations(root: str, *, of_formats: bool = False) -> dict[str, str]:
    """Return ``base`` as SELECTs over the corpus's files, found by glob each time they are queried.

    Globs also match files that no record commits, hence the semi-joins with the committed names. DuckDB 2.0 gives
    these names to the scan, which opens no other file: one that is not a Parquet changes no answer.

    Args:
        of_formats: files of several formats lie there, and a column that some lack is NULL in their rows. DuckDB then
            opens every file that it finds before it answers, as versions before 2.0 do (``committed_files_macro`` names
            the files instead); else it takes the columns of the first.
    """
    folder = _literal(root)
    relations = {
        f"{table}_events": f"""
        SELECT {quoted(_event_columns(table))}
        FROM read_parquet({quote(f"{folder}/manifest/{table}/*.parquet")}, union_by_name = true)"""
        for table in RECORD_TABLES
    }
    for name, schema in DATA_TABLES.items():
        relations[name] = _committed_rows(root, folder, name, schema.names, of_formats)
    relations["retried"] = _committed_rows(root, folder, "retries", ["source", "uid", "shard"], of_formats)
    return relations


def _committed_rows(root: str, folder: str, name: str, columns: list[str], of_formats: bool) -> str:
    """Return the SELECT of the committed files of one kind.

    The empty name is there for DuckDB: names that all begin alike would reach the scan as their range alone, in which
    lie uncommitted files too, and no names at all as nothing. With it they come as a Bloom filter.
    """
    found = f"[{quote(_first_file(folder, name))}, {quote(f'{folder}/{_folder_of(name)}/*/{_SHARD_FILES}')}]"
    named = f"CAST(getvariable({quote(_FILES_VARIABLE)}) AS MAP(VARCHAR, VARCHAR[]))[{quote(name)}]"
    by_name = ", union_by_name = true" if of_formats else ""
    return f"""
        SELECT {quoted(columns)} FROM read_parquet(coalesce({named}, {found}), filename = true{by_name})
        SEMI JOIN (
            SELECT {quote(root)} || '/' || path AS filename FROM base.committed_files WHERE kind = {quote(name)}
            UNION ALL SELECT ''
        ) USING (filename)"""


def _folder_of(kind: str) -> str:
    return "raw" if kind == "retries" else kind


def _first_file(folder: str, kind: str) -> str:
    return f"{folder}/{_folder_of(kind)}/{FIRST_FILE}"


def committed_files_macro(root: str) -> str:
    """Return the statement that makes ``committed_files()``: what the variable of a session is set to.

    DuckDB takes the files to read from literals and variables alone, never from a query.
    """
    folder = _literal(root)
    first = ", ".join(
        f"({quote(kind)}, {quote(_first_file(folder, kind))})" for kind in (*DATA_TABLES, "retries")
    )
    return f"""CREATE OR REPLACE MACRO committed_files() AS (
        SELECT map(list(kind), list(files)) FROM (
            SELECT kind, list_prepend(first, coalesce(
                list({quote(folder)} || '/' || path) FILTER (path IS NOT NULL), [])) AS files
            FROM (VALUES {first}) AS kinds (kind, first) LEFT JOIN base.committed_files USING (kind)
            GROUP BY kind, first))"""


def parquet_files(paths: Sequence[str], schema: pa.Schema) -> str:
    """Return the SELECT of some Parquet files, by name, that all have the columns of the schema."""
    return f"SELECT {quoted(schema.names)} FROM read_parquet({_list(paths)})"


def parquet_files_of_formats(paths: Sequence[str], schema: pa.Schema, empty: str) -> str:
    """Return the SELECT of some Parquet files, by name; a column that a file lacks is NULL in its rows.

    DuckDB opens every file before it answers.

    Args:
        empty: a relation with the columns of the schema and no row, for columns that all the files lack.
    """
    return (
        f"SELECT {quoted(schema.names)} FROM (FROM read_parquet({_list(paths)}, union_by_name = true) "
        f"UNION ALL BY NAME FROM {empty})"
    )


def _list(paths: Sequence[str]) -> str:
    return f"[{', '.join(quote(_literal(path)) for path in paths)}]"


def _literal(path: str) -> str:
    """Return a path as a glob that matches it alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in path)


def unquote_glob(text: str) -> str:
    """Return the path of which ``file_relations`` made this part of a string literal."""
    return re.sub(r"\[([*?[])\]", r"\1", text.replace("''", "'"))


def registered_relations() -> dict[str, str]:
    """Return ``base`` as SELECTs from relations on the connection: ``raw_data``, ``shards_data``, ..."""
    events = {
        f"{table}_events": f"SELECT {quoted(_event_columns(table))} FROM {table}_data"
        for table in RECORD_TABLES
    }
    data = {name: f"SELECT * FROM {name}_data" for name in DATA_TABLES}
    # Which rows stand was found out once, for all connections.
    shards = {"shards": f"SELECT {quoted(SHARDS.names)} FROM standing_shards_data"}
    return {**events, **shards, **data, "retried": "SELECT source, uid, shard FROM retries_data"}


def empty_relations() -> dict[str, pa.Table]:
    """Return what ``registered_relations`` read, but for the standing shards, without a row."""
    records = {table: record_row_schema(table) for table in RECORD_TABLES}
    schemas = {**records, **DATA_TABLES, "retries": DATA_TABLES["raw"]}
    return {f"{name}_data": schema.empty_table() for name, schema in schemas.items()}


def _event_columns(table: str) -> list[str]:
    return [*RECORD_TABLES[table].names, "record", "version"]
