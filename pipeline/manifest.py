"""The manifest in SQL: ``manifest.duckdb`` for everyone's own DuckDB, and a sandbox for ``capfilt sql``.

``manifest.duckdb`` holds views and macros alone, so no process ever needs a database's write lock: a run
commits records and adds Parquet parts (pipeline/parts.py) while any number of people query.

The sandbox is an in-memory database over registered Arrow data without any access to files. DuckDB's own
list of allowed paths would not do: ``WITH x AS (COPY ... TO 'allowed') SELECT`` counts as a SELECT and
writes. Nor would ``register_filesystem``: DuckDB 2.0 seeks and reads one Python file handle from several
threads.
"""

import contextlib
import itertools
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs
import pyarrow.parquet as pq

from pipeline.parts import Parts
from pipeline.storage import Storage, temporary_folder
from schemas.catalog import (
    DATA_STAGES,
    DATA_TABLES,
    EMPTY_FOLDER,
    data_views,
    file_relations,
    parquet_files,
    record_views,
    registered_relations,
)
from schemas.errors import CapfiltError, CorruptShardError

CATALOG = "manifest.duckdb"
_CATALOG_SQL = "manifest/catalog.sql"

_PARQUET = ds.ParquetFileFormat()
_FOLDERS = {stage: name for name, stage in DATA_STAGES.items()}
_SCHEMAS = {**DATA_TABLES, "retries": DATA_TABLES["raw"]}

_BATCH_ROWS = 2048

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
        self._parts = Parts(storage)
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

    def _write_catalog(self) -> None:
        """Publish ``manifest.duckdb`` in one step, unless it is there and says the same."""
        relations = file_relations(self.storage.root)
        statements = [*record_views(relations), *data_views(relations)]
        text = ";\n".join([*statements, ""]).encode()
        if self.storage.exists(CATALOG) and self._read(_CATALOG_SQL) == text:
            return
        with temporary_folder() as folder:
            for name, schema in DATA_TABLES.items():
                pq.write_table(schema.empty_table(), folder / "empty.parquet")
                self.storage.put(folder / "empty.parquet", f"{name}/{EMPTY_FOLDER}/00000.parquet")
            connection = duckdb.connect(str(folder / CATALOG))
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
        self, storage: Storage, parts: Parts, *, memory: str = "50%", in_place: bool = False
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
        relations = registered_relations()
        for table, rows in parts.tables().items():
            self._connection.register(f"{table}_data", rows)
        self._make(record_views(relations))
        for name, files in self._committed().items():
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
            chosen[_FOLDERS[stage]][source, shard] = path
            if stage == "crawl" and (source, shard) in retried:
                chosen["retries"][source, shard] = path
        return chosen

    def _add_files(self, name: str, files: dict[tuple[str, str], str], schema: pa.Schema) -> None:
        if self._in_place and files:
            paths = [self._storage.url(path) for _, path in sorted(files.items())]
            self._execute(f"CREATE VIEW {name} AS {parquet_files(paths, schema)}")
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
        except (duckdb.IOException, duckdb.InvalidInputException) as error:
            first = str(error).splitlines()[0]
            raise CorruptShardError(f"{first}; `capfilt verify CORPUS` names every damaged file") from error

    def seal(self) -> None:
        """Take away every way out of the database, for good."""
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
            result = self._connection.execute(sql)
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
            raise CapfiltError(f"only the corpus's own tables can be read here: {error}") from error
        except duckdb.Error as error:
            raise CapfiltError(f"SQL: {error}") from error
        finally:
            timer.cancel()


def _require_read(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Refuse all but one SELECT or its plain EXPLAIN: EXPLAIN ANALYZE runs its statement, a COPY too."""
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
            return
        raise CapfiltError(
            "only a plain EXPLAIN of one SELECT is answered: EXPLAIN ANALYZE would run the statement"
        )
    if kind != duckdb.StatementType.SELECT:
        raise CapfiltError(
            f"the manifest is read-only: one SELECT (or EXPLAIN, DESCRIBE, SUMMARIZE) is answered, "
            f"this is {kind.name}; to write, open {CATALOG} in a DuckDB of your own"
        )


def _columns(result: duckdb.DuckDBPyConnection) -> tuple[str, ...]:
    """Return the names of a result's columns, each once."""
    columns: list[str] = []
    for column in result.description or ():
        name, again = column[0], 1
        while name in columns:
            name, again = f"{column[0]}_{again}", again + 1
        columns.append(name)
    return tuple(columns)
