"""The manifest in SQL: ``manifest.duckdb`` for everyone's own DuckDB, and a sandbox for ``capfilt sql``.

``manifest.duckdb`` holds views and macros alone, so no process ever needs a database's write lock: a run
commits records and adds Parquet parts (pipeline/manifest/compaction.py) while any number of people query.

The sandbox is an in-memory database over registered Arrow data without any access to files. DuckDB's own
list of allowed paths would not do: ``WITH x AS (COPY ... TO 'allowed') SELECT`` counts as a SELECT and
writes. Nor would ``register_filesystem``: DuckDB 2.0 seeks and reads one Python file handle from several
threads.
"""

import contextlib
import itertools
import json
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs
import pyarrow.parquet as pq

from pipeline.corpus.scratch import temporary_folder
from pipeline.corpus.shard_files import schema_mismatch
from pipeline.corpus.storage import Storage
from pipeline.manifest.compaction import CompactedRecords
from pipeline.manifest.describe import commented
from pipeline.regular_files import NotRegularFileError, require_regular
from schemas.catalog import (
    DATA_STAGES,
    DATA_TABLES,
    EMPTY_FOLDER,
    VIEWS,
    data_views,
    file_relations,
    parquet_files,
    record_views,
    registered_relations,
    unquote_glob,
)
from schemas.errors import CapfiltError, CorruptShardError, first_line
from schemas.records import is_own_file
from schemas.tables import TABLES

CATALOG = "manifest.duckdb"
_CATALOG_SQL = "manifest/catalog.sql"
# A format that DuckDB's shells since 1.2 open; the newest version's own is refused by all before it.
_STORAGE_VERSION = "v1.2.0"
# Where the corpus lay when its catalog was written, as its globs have it.
_PLACE = re.compile(r"read_parquet\('(.+?)/manifest/")

_PARQUET = ds.ParquetFileFormat()
_FOLDERS = {stage: name for name, stage in DATA_STAGES.items()}
_SCHEMAS = {**DATA_TABLES, "retries": DATA_TABLES["raw"]}

_BATCH_ROWS = 2048

# What a damaged file can end in; the last is that of an error's text.
_OF_THE_FILES = (duckdb.IOException, duckdb.InvalidInputException, UnicodeDecodeError)
# In this package's own SQL these too. In a user's they are slips, for which no file is looked at: there may be 50,000.
_OF_OWN_SQL = (*_OF_THE_FILES, duckdb.BinderException, duckdb.ConversionException)

# What DuckDB says of itself tells about the machine (memory, cores, platform, folders). Of its own tables these stay.
_OF_THE_DATABASE = ("duckdb_", "pragma_", "pg_settings", "current_setting")
_ANSWERED = {
    "duckdb_columns",
    "duckdb_functions",
    "duckdb_keywords",
    "duckdb_schemas",
    "duckdb_tables",
    "duckdb_types",
    "duckdb_views",
}
# Run an SQL text, or a table's name, that nobody has looked at.
_INDIRECT = {"query", "query_table"}

# The directories would tell the host's paths to who asks for the settings.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The rows of a query; ``truncated``: there were more than were asked for."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    truncated: bool = False

    def dicts(self) -> list[dict[str, Any]]:
        """Return the rows as dicts."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """The answer to a query while it is made: its rows come once."""

    columns: tuple[str, ...]
    rows: Iterator[tuple[Any, ...]]


class Manifest:
    """The manifest of one corpus."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._parts = CompactedRecords(storage)
        # The catalog is made over the parts: no rebuild of another thread may take them away meanwhile.
        self._writing = threading.Lock()

    def compact(self) -> int:
        """Copy new records into the manifest's Parquet, see that the catalog exists; return the new rows."""
        with self._writing:
            rows = self._parts.compact()
            self._write_catalog()
        return rows

    def rebuild(self) -> dict[str, int]:
        """Make the manifest anew from the records alone; return the rows by table."""
        with self._writing:
            rows = self._parts.rebuild()
            self._write_catalog()
        return rows

    def open(self, *, in_place: bool = False) -> "Query":
        """Return a connection for this package's own questions, as of now; use it as a context manager.

        Args:
            in_place: see ``Query``; for questions that search samples, not for those to the records alone.
        """
        return Query(self.storage, self._parts, in_place=in_place)

    def query(
        self, sql: str, *, timeout_s: float = 600.0, max_rows: int | None = None, memory: str = "50%"
    ) -> Answer:
        """Answer one SELECT (or plain EXPLAIN) in the sandbox, its rows in memory all at once.

        Raises CapfiltError for anything that is not a single read, for errors in the SQL, and after
        ``timeout_s``.
        """
        with self.stream(sql, timeout_s=timeout_s, memory=memory) as stream:
            rows = list(itertools.islice(stream.rows, None if max_rows is None else max_rows + 1))
        cut = max_rows is not None and len(rows) > max_rows
        return Answer(columns=stream.columns, rows=rows[:max_rows], truncated=cut)

    @contextlib.contextmanager
    def stream(self, sql: str, *, timeout_s: float = 600.0, memory: str = "50%") -> Iterator[Stream]:
        """Answer as ``query`` does, however many the rows: they are made as they are taken.

        ``timeout_s`` counts until the last of them; errors come up wherever they are taken.
        """
        with Query(self.storage, self._parts, memory=memory) as connection:
            connection.seal()
            with connection.user(sql, timeout_s=timeout_s) as stream:
                yield stream

    def rewrite_copied_catalog(self) -> str | None:
        """Write ``manifest.duckdb`` anew if it came here with a copied corpus: it would answer from the original.

        Returns:
            What to tell the user where that is so and it cannot be written, else None.
        """
        written_at = _PLACE.search(self._read(_CATALOG_SQL).decode())
        if written_at is None:
            return None
        place = unquote_glob(written_at[1])
        if self._is_here(place):
            return None
        try:
            with self._writing:
                self._write_catalog()
        except (OSError, duckdb.Error) as error:
            return (
                f"{self.storage.url(CATALOG)} answers from {place}, where this corpus was copied from, and cannot be "
                f"written ({first_line(error)}); run `capfilt manifest compact {self.storage.root}` as a user who may "
                "write there, before you open it in a DuckDB of your own"
            )
        return None

    def _is_here(self, place: str) -> bool:
        """Tell whether a place is this corpus's own, under another name (a link) perhaps."""
        if place == self.storage.root:
            return True
        try:
            return self.storage.is_local and Path(place).samefile(self.storage.root)
        except OSError:
            return False

    def _write_catalog(self) -> None:
        """Publish ``manifest.duckdb`` in one step, unless it is there and says the same."""
        relations = file_relations(self.storage.root)
        statements = [*record_views(relations), *data_views(relations)]
        text = ";\n".join([f"-- storage {_STORAGE_VERSION}", *statements, ""]).encode()
        if self.storage.exists(CATALOG) and self._read(_CATALOG_SQL) == text:
            return
        with temporary_folder() as folder:
            for name, schema in DATA_TABLES.items():
                pq.write_table(schema.empty_table(), folder / "empty.parquet")
                self.storage.put(folder / "empty.parquet", f"{name}/{EMPTY_FOLDER}/00000.parquet")
            connection = duckdb.connect(
                str(folder / CATALOG), config={"storage_compatibility_version": _STORAGE_VERSION}
            )
            if not self.storage.is_local:
                connection.register_filesystem(self.storage.fs)
            for statement in statements:
                connection.execute(statement)
            connection.close()
            self.storage.put(folder / CATALOG, CATALOG)
        # Last, so that a catalog cut short is made again.
        self.storage.write(_CATALOG_SQL, text)

    def _read(self, path: str) -> bytes:
        try:
            return self.storage.read(path)
        except FileNotFoundError:
            return b""


class Query:
    """An in-memory DuckDB with every table of the manifest, over what was committed when it was opened.

    Args:
        in_place: DuckDB may open the files itself where they are local, and so has access to files. Faster at
            finding one row, of which Arrow reads every column of every file.
    """

    def __init__(
        self, storage: Storage, parts: CompactedRecords, *, memory: str = "50%", in_place: bool = False
    ) -> None:
        self._storage = storage
        self._in_place = in_place and storage.is_local
        # Variables of the calling Python code must not be tables.
        config = {"python_enable_replacements": False, "memory_limit": memory}
        try:
            self._connection = duckdb.connect(config=config)
        except duckdb.Error as error:
            raise CapfiltError(f"--memory {memory!r}: {error}; give a size such as 4GB or 50%") from error
        self._connection.execute("SET TimeZone = 'UTC'")
        self._files: dict[str, dict[tuple[str, str], str]] = {}
        relations = registered_relations()
        for table, rows in parts.tables().items():
            self._connection.register(f"{table}_data", rows)
        self._make(record_views(relations))
        self._files = self._committed()
        for name, files in self._files.items():
            self._add_files(f"{name}_data", files, _SCHEMAS[name])
        self._make(data_views(relations))

    def _make(self, statements: list[str]) -> None:
        for statement in statements:
            self._connection.execute(statement)

    def _committed(self) -> dict[str, dict[tuple[str, str], str]]:
        """Return the committed files of each kind by source and shard."""
        committed = self.rows(
            "SELECT stage, source, shard, paths['parquet'] AS path FROM shards WHERE state = 'committed'"
        )
        paths = {(row["stage"], row["source"], row["shard"]): row["path"] for row in committed}
        ranked = {(source, shard) for stage, source, shard in paths if stage == "rank"}
        retried = {
            (row["source"], row["shard"])
            for row in self.rows(
                "SELECT source, shard FROM shards WHERE stage = 'urls' AND counts['retry'] > 0"
            )
        }
        chosen: dict[str, dict[tuple[str, str], str]] = {name: {} for name in (*DATA_TABLES, "retries")}
        for (stage, source, shard), path in paths.items():
            if stage == "urls" or (stage == "caption" and (source, shard) in ranked):
                continue
            if stage not in _FOLDERS or path is None or not is_own_file(path, stage, source, shard):
                raise CorruptShardError(
                    f"manifest/shards names {path!r} as the {stage} of {source}/{shard}, which is not a file of that "
                    "shard; nothing of it was read. `capfilt manifest rebuild CORPUS` makes it anew from the records"
                )
            chosen[_FOLDERS[stage]][source, shard] = path
            if stage == "crawl" and (source, shard) in retried:
                chosen["retries"][source, shard] = path
        return chosen

    def _add_files(self, name: str, files: dict[tuple[str, str], str], schema: pa.Schema) -> None:
        if self._in_place and files:
            self._require_regular(files.values())
            paths = [self._storage.url(path) for _, path in sorted(files.items())]
            self._execute(f"CREATE VIEW {name} AS {parquet_files(paths, schema)}")
            wanted = self._connection.from_arrow(schema.empty_table()).types
            if self._connection.view(name).types != wanted and (mismatch := self._mismatch()):
                raise _damaged(mismatch)
        else:
            self._connection.register(name, self._dataset(files, schema))

    def _dataset(self, files: dict[tuple[str, str], str], schema: pa.Schema) -> ds.FileSystemDataset:
        """Return files as Arrow data; those that a filter on source and shard rules out are never opened."""
        fs = self._storage.fs
        filesystem = (
            pyarrow.fs.LocalFileSystem()
            if self._storage.is_local
            else pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
        )
        fragments = [
            _PARQUET.make_fragment(
                fs._strip_protocol(self._storage.url(path)),
                filesystem,
                partition_expression=(ds.field("source") == source) & (ds.field("shard") == shard),
            )
            for (source, shard), path in sorted(files.items())
        ]
        return ds.FileSystemDataset(fragments, schema, _PARQUET, filesystem)

    def __enter__(self) -> "Query":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Return the rows of this package's own SQL."""
        result = self._execute(sql, parameters)
        return Answer(columns=_columns(result), rows=result.fetchall()).dicts()

    def _execute(self, sql: str, parameters: Sequence[Any] = ()) -> duckdb.DuckDBPyConnection:
        try:
            return self._connection.execute(sql, list(parameters))
        except _OF_OWN_SQL as error:
            raise _damaged(self._mismatch() or str(error).splitlines()[0]) from error

    def _mismatch(self) -> str | None:
        """Return the first committed file that does not hold its table's columns, and how."""
        for name, files in self._files.items():
            for _, path in sorted(files.items()):
                with self._storage.open(path) as file, contextlib.suppress(pa.ArrowInvalid):
                    if mismatch := schema_mismatch(pq.read_schema(file), _SCHEMAS[name]):
                        return f"{path}: {mismatch}"
        return None

    def _require_regular(self, paths: Iterable[str]) -> None:
        """Refuse what DuckDB and Arrow would wait for: a FIFO in the place of a file."""
        if not self._storage.is_local:
            return
        for path in paths:
            try:
                require_regular(self._storage.url(path))
            except NotRegularFileError as error:
                raise _damaged(f"{path} cannot be read: {error.strerror}") from error

    def seal(self) -> None:
        """Take away every way out of the database, for good."""
        self._require_regular(path for files in self._files.values() for path in files.values())
        for statement in _SANDBOX:
            self._connection.execute(statement)

    @contextlib.contextmanager
    def user(self, sql: str, *, timeout_s: float) -> Iterator[Stream]:
        """Answer a user's SQL; see ``Manifest.stream``."""
        timer = threading.Timer(timeout_s, self._connection.interrupt)
        try:
            _require_read(self._connection, sql)
            timer.daemon = True
            timer.start()
            result = self._connection.execute(commented(sql))
            # Most errors come with the first rows: before the caller has printed any.
            first = result.fetchmany(_BATCH_ROWS)
            rest = itertools.chain.from_iterable(iter(lambda: result.fetchmany(_BATCH_ROWS), []))
            yield Stream(columns=_columns(result), rows=itertools.chain(first, rest))
        except duckdb.InterruptException as error:
            raise CapfiltError(
                f"the query took over {timeout_s:g} s: narrow it, or give --timeout"
            ) from error
        except duckdb.OutOfMemoryException as error:
            raise CapfiltError(f"the query needs more memory than it may use: {error}") from error
        except duckdb.PermissionException as error:
            # Not the error's own words: they have this machine's folders.
            raise CapfiltError(
                "only the corpus's own tables can be read here: no other file, no URL, no extension"
            ) from error
        except (duckdb.Error, UnicodeDecodeError) as error:
            if isinstance(error, _OF_THE_FILES) and (mismatch := self._mismatch()):
                raise _damaged(mismatch) from error
            raise CapfiltError(f"SQL: {error}") from error
        finally:
            timer.cancel()


def _damaged(what: str) -> CorruptShardError:
    return CorruptShardError(f"{what}; `capfilt verify CORPUS` names every damaged file")


def _require_read(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Refuse all but one SELECT of the corpus, or its plain EXPLAIN: EXPLAIN ANALYZE runs its statement, a COPY too."""
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
            return _require_nothing_of_the_machine(connection, inner[0].query)
        raise CapfiltError(
            "only a plain EXPLAIN of one SELECT is answered: EXPLAIN ANALYZE would run the statement"
        )
    if kind != duckdb.StatementType.SELECT:
        raise CapfiltError(
            f"the manifest is read-only: one SELECT (or EXPLAIN, DESCRIBE, SUMMARIZE) is answered, "
            f"this is {kind.name}; to take rows out, print them into a file with --csv or --json, or COPY them in a "
            f"DuckDB of your own that attaches {CATALOG} (READ_ONLY)"
        )
    _require_nothing_of_the_machine(connection, statements[0].query)


def _require_nothing_of_the_machine(connection: duckdb.DuckDBPyConnection, select: str) -> None:
    """Refuse a SELECT that names what tells about the machine rather than the corpus."""
    (tree,) = connection.execute("SELECT json_serialize_sql(?)", [select]).fetchone()
    for node in _nodes(json.loads(tree)):
        name = str(node.get("function_name") or node.get("table_name") or "").lower()
        # SHOW of what is not a relation is the value of a setting.
        of_a_setting = node.get("show_type") == "SHOW" and name not in (*TABLES, *VIEWS)
        if name in _INDIRECT:
            raise CapfiltError(f"{name}() is not answered here: write the SELECT itself")
        if of_a_setting or (name.startswith(_OF_THE_DATABASE) and name not in _ANSWERED):
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


def _columns(result: duckdb.DuckDBPyConnection) -> tuple[str, ...]:
    """Return the names of a result's columns, each once."""
    columns: list[str] = []
    for column in result.description or ():
        name, again = column[0], 1
        while name in columns:
            name, again = f"{column[0]}_{again}", again + 1
        columns.append(name)
    return tuple(columns)
