"""``manifest.duckdb``: the catalog that anyone opens in a DuckDB of their own.

It holds views and macros alone, so no process ever needs a database's write lock: a run commits records and adds
Parquet parts while any number of people query.
"""

import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from obstore.store import MemoryStore

from pipeline.storage.filesystem import ObjectFileSystem
from pipeline.storage.objects.files import ObjectFiles
from pipeline.storage.scratch import temporary_folder
from pipeline.storage.storage import Storage
from schemas.catalog.corpus_files import (
    EMPTY_FILE,
    FIRST_FILE,
    FIRST_FILE_ROWS,
    committed_files_macro,
    empty_relations,
    file_relations,
    registered_relations,
    unquote_glob,
)
from schemas.catalog.statements import base_views, comments, data_views, record_views
from schemas.catalog.table_schemas import CATALOG, DATA_TABLES, RECORD_TABLES, record_row_schema
from schemas.errors import first_line

_CATALOG_SQL = "manifest/catalog.sql"
# A format that DuckDB's shells since 1.2 open; the newest version's own is refused by all before it.
_STORAGE_VERSION = "v1.2.0"
# Where the corpus was when its catalog was written, as its globs have it.
_PLACE = re.compile(r"read_parquet\('(.+?)/manifest/")


def write_catalog(storage: Storage, *, of_formats: bool) -> None:
    """Publish ``manifest.duckdb`` in one step, unless it is there and says the same; see ``file_relations``."""
    relations = file_relations(storage.root, of_formats=of_formats)
    statements = _statements(storage.root, relations)
    text = ";\n".join([f"-- storage {_STORAGE_VERSION}", *statements, ""]).encode()
    if storage.exists(CATALOG) and _read(storage) == text:
        return
    with temporary_folder() as folder:
        for path, rows in _uncommitted_files().items():
            pq.write_table(rows, folder / "rows.parquet")
            storage.put(folder / "rows.parquet", path)
        with duckdb.connect(
            str(folder / CATALOG), config={"storage_compatibility_version": _STORAGE_VERSION}
        ) as connection:
            if not storage.is_local:
                connection.register_filesystem(_empty_corpus(storage.root))
            _make(connection, storage.root, relations)
        storage.put(folder / CATALOG, CATALOG)
    # Last, so that a catalog cut short is made again.
    storage.write(_CATALOG_SQL, text)


def _statements(root: str, relations: Mapping[str, str]) -> list[str]:
    return [*record_views(relations), *data_views(relations), committed_files_macro(root), *comments()]


def _make(connection: duckdb.DuckDBPyConnection, root: str, relations: Mapping[str, str]) -> None:
    """Make the catalog in an empty database.

    DuckDB looks for the files behind a view once for each view over it, so ``base`` comes over empty relations first
    and over the files last. Each statement outside a transaction would be one of its own.
    """
    for name, rows in empty_relations().items():
        connection.register(name, rows)
    # Of the shards a catalog finds out itself which rows stand.
    empty = {name: sql for name, sql in registered_relations().items() if name in relations}
    connection.begin()
    for statement in (*_statements(root, empty), *base_views(relations)):
        connection.execute(statement)
    connection.commit()


def _uncommitted_files() -> dict[str, pa.Table]:
    """Return the rows of the files that no shard commits, and that the views need, by path."""
    files: dict[str, pa.Table] = {}
    for name, schema in DATA_TABLES.items():
        files[f"{name}/{EMPTY_FILE}"] = schema.empty_table()
        nulls = [pa.nulls(FIRST_FILE_ROWS, field.type) for field in schema]
        files[f"{name}/{FIRST_FILE}"] = pa.table(nulls, names=schema.names)
    return files


def _empty_corpus(root: str) -> ObjectFileSystem:
    """Return a corpus without rows under a root's URL: DuckDB looks at the columns of each view's files many times."""
    scheme, _, name = root.partition("://")
    container, _, prefix = name.partition("/")
    files = ObjectFiles(scheme, container, MemoryStore())
    tables = {
        f"manifest/{table}/empty.parquet": record_row_schema(table).empty_table() for table in RECORD_TABLES
    }
    for path, rows in (tables | _uncommitted_files()).items():
        file = io.BytesIO()
        pq.write_table(rows, file)
        files.write(f"{prefix}/{path}".lstrip("/"), file.getvalue())
    return ObjectFileSystem(scheme, files)


def rewrite_copied_catalog(storage: Storage, compact: Callable[[], object]) -> str | None:
    """Write ``manifest.duckdb`` anew if it came here with a copied corpus: it would answer from the original.

    Args:
        compact: makes the parts of tables that the copied corpus is older than, and writes the catalog.

    Returns:
        What to tell the user where that is so and it cannot be written, else None.
    """
    written_at = _PLACE.search(_read(storage).decode())
    place = unquote_glob(written_at[1]) if written_at else storage.root
    if _is_root_of(storage, place):
        return None
    try:
        compact()
    except (OSError, duckdb.Error) as error:
        return (
            f"{storage.url(CATALOG)} answers from {place}, where this corpus was copied from, and cannot be "
            f"written ({first_line(error)}); run `capfilt manifest compact {storage.root}` as a user who may "
            "write there, before you open it in a DuckDB of your own"
        )
    return None


def _is_root_of(storage: Storage, place: str) -> bool:
    """Tell whether a place is the corpus's own, under another name (a link) perhaps."""
    if place == storage.root:
        return True
    try:
        return storage.is_local and Path(place).samefile(storage.root)
    except OSError:
        return False


def _read(storage: Storage) -> bytes:
    try:
        return storage.read(_CATALOG_SQL)
    except FileNotFoundError:
        return b""
