"""The manifest of a corpus in SQL: every table, over what is committed at the moment of the question.

A question opens an in-memory DuckDB over the records and the committed Parquet files. The package's own questions
use ``Manifest.open``; a user's SQL is answered in a sandbox without access to files (``Manifest.query``, ``stream``).
"""

import contextlib
import itertools
import tempfile
import threading
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs
import pyarrow.parquet as pq

from pipeline.corpus.shard_files import schema_mismatch
from pipeline.manifest.catalog_file import rewrite_copied_catalog, write_catalog
from pipeline.manifest.compaction import CompactedRecords
from pipeline.manifest.histograms import sum_histograms
from pipeline.manifest.sandbox import FILE_ERRORS, Stream, column_names, seal, stream_answer, table_answer
from pipeline.regular_files import NotRegularFileError, require_regular
from pipeline.storage.filesystem import filesystem_of
from pipeline.storage.storage import Storage
from schemas.catalog import (
    DATA_STAGES,
    DATA_TABLES,
    data_views,
    parquet_files,
    record_views,
    registered_relations,
)
from schemas.errors import CapfiltError, CorruptShardError
from schemas.records import is_own_file
from schemas.stages import Stage

_PARQUET = ds.ParquetFileFormat()
# The kinds of committed files: the stage that writes them, and their columns.
_STAGES: dict[str, Stage] = {**DATA_STAGES, "retries": "crawl"}
_SCHEMAS = {**DATA_TABLES, "retries": DATA_TABLES["raw"]}

# In this package's own SQL these too come from damaged files. In a user's they are slips, for which no file is looked
# at: there may be 50,000.
_OWN_SQL_ERRORS = (*FILE_ERRORS, duckdb.BinderException, duckdb.ConversionException)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The rows of a query; ``truncated``: there were more than were asked for."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    truncated: bool = False

    def dicts(self) -> list[dict[str, Any]]:
        """Return the rows as dicts."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


class Manifest:
    """The manifest of one corpus."""

    def __init__(self, storage: Storage, compacted: CompactedRecords | None = None) -> None:
        self.storage = storage
        self.compacted = compacted or CompactedRecords(storage)
        # The catalog is made over the parts: no rebuild of another thread may take them away meanwhile.
        self._writing = threading.Lock()

    def compact(self) -> int:
        """Copy new records into the manifest's Parquet, see that the catalog exists; return the new rows."""
        with self._writing:
            rows = self.compacted.compact()
            write_catalog(self.storage)
        return rows

    def rebuild(self) -> dict[str, int]:
        """Make the manifest anew from the records alone; return the rows by table."""
        with self._writing:
            rows = self.compacted.rebuild()
            write_catalog(self.storage)
        return rows

    def rewrite_copied_catalog(self) -> str | None:
        """Write ``manifest.duckdb`` anew if it came here with a copied corpus; see ``catalog_file``."""
        with self._writing:
            return rewrite_copied_catalog(self.storage, self.compacted.compact)

    def open(
        self,
        *,
        in_place: bool = False,
        shards: Collection[tuple[str, str]] | None = None,
        memory: str = "50%",
        records: Mapping[str, pa.Table] | None = None,
    ) -> "Query":
        """Return a connection for this package's own questions, as of now; use it as a context manager.

        Args:
            in_place: see ``Query``; for questions that search samples, not for those to the records alone.
            shards: see ``Query``.
            memory: what DuckDB may take, such as 4GB or 50%.
            records: see ``Query``.
        """
        return Query(
            self.storage, self.compacted, in_place=in_place, shards=shards, memory=memory, records=records
        )

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
        with Query(self.storage, self.compacted, memory=memory) as query:
            connection = query.sealed()
            with stream_answer(connection, sql, timeout_s=timeout_s, find_damage=query.find_damage) as stream:
                yield stream

    def table(
        self,
        sql: str,
        parameters: Sequence[Any] | Mapping[str, Any] = (),
        *,
        timeout_s: float = 600.0,
        memory: str = "50%",
    ) -> pa.Table:
        """Answer as ``query`` does, with typed columns; ``parameters``: see ``table_answer``."""
        with Query(self.storage, self.compacted, memory=memory) as query:
            connection = query.sealed()
            return table_answer(
                connection, sql, parameters, timeout_s=timeout_s, find_damage=query.find_damage
            )


class Query:
    """An in-memory DuckDB with every table of the manifest, over what was committed when it was opened.

    Args:
        in_place: DuckDB may open the files itself where they are local, and so has access to files. Faster at
            finding one row, of which Arrow reads every column of every file.
        shards: (source, shard) of those whose samples are read; the tables of records stay whole. None reads all.
        records: the rows of the records, as ``CompactedRecords.tables`` returned them; None reads those of now.
    """

    def __init__(
        self,
        storage: Storage,
        compacted: CompactedRecords,
        *,
        memory: str = "50%",
        in_place: bool = False,
        shards: Collection[tuple[str, str]] | None = None,
        records: Mapping[str, pa.Table] | None = None,
    ) -> None:
        self._storage = storage
        self._compacted = compacted
        self._in_place = in_place and storage.is_local
        # Variables of the calling Python code must not be tables.
        config: dict[str, str | bool | int | float | list[str]] = {
            "python_enable_replacements": False,
            "memory_limit": memory,
            # Where it goes on beyond its memory; DuckDB's own choice is the working directory.
            "temp_directory": f"{tempfile.gettempdir()}/capfilt-duckdb-{uuid.uuid4().hex[:12]}",
        }
        try:
            self._connection = duckdb.connect(config=config)
        except duckdb.Error as error:
            raise CapfiltError(f"--memory {memory!r}: {error}; give a size such as 4GB or 50%") from error
        self._connection.execute("SET TimeZone = 'UTC'")
        self._files: dict[str, dict[tuple[str, str], str]] = {}
        relations = registered_relations()
        # The rows of the records, by table.
        self.records = dict(records or compacted.tables())
        for table, rows in self.records.items():
            self._connection.register(f"{table}_data", rows)
        self._run(record_views(relations))
        self._files = self._committed_files(shards)
        for kind, files in self._files.items():
            self._add_files(f"{kind}_data", files, _SCHEMAS[kind])
        self._run(data_views(relations))

    def _run(self, statements: list[str]) -> None:
        for statement in statements:
            self._connection.execute(statement)

    def _committed_files(
        self, shards: Collection[tuple[str, str]] | None
    ) -> dict[str, dict[tuple[str, str], str]]:
        """Return the committed files of each kind by source and shard; of some shards, and what was retried of all."""
        files: dict[str, dict[tuple[str, str], str]] = {kind: {} for kind in _SCHEMAS}
        wanted = None if shards is None else [f"{source}/{shard}" for source, shard in shards]
        committed = self.rows(
            "SELECT kind, source, shard, path FROM base.committed_files "
            "WHERE $1 IS NULL OR kind = 'retries' OR list_contains($1, source || '/' || shard)",
            (wanted,),
        )
        for row in committed:
            kind, source, shard, path = row.values()
            stage = _STAGES.get(kind)
            if stage is None or path is None or not is_own_file(path, stage, source, shard):
                raise CorruptShardError(
                    f"manifest/shards names {path!r} as the {stage or kind} of {source}/{shard}, which is not a file "
                    "of that shard; nothing of it was read. `capfilt manifest rebuild CORPUS` makes it anew from the "
                    "records"
                )
            files[kind][source, shard] = path
        return files

    def _add_files(self, name: str, files: dict[tuple[str, str], str], schema: pa.Schema) -> None:
        if not (self._in_place and files):
            self._connection.register(name, self._dataset(files, schema))
            return
        self._require_regular(files.values())
        paths = [self._storage.url(path) for _, path in sorted(files.items())]
        self._execute(f"CREATE VIEW {name} AS {parquet_files(paths, schema)}")
        if self._connection.view(name).types != self._connection.from_arrow(schema.empty_table()).types:
            self.find_damage()

    def _dataset(self, files: dict[tuple[str, str], str], schema: pa.Schema) -> ds.FileSystemDataset:
        """Return files as Arrow data; those that a filter on source and shard rules out are never opened."""
        filesystem = (
            pyarrow.fs.LocalFileSystem()
            if self._storage.is_local
            else pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem_of(self._storage.root)[0]))
        )
        fragments = [
            _PARQUET.make_fragment(
                self._storage.url(path).rpartition("://")[2],
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
        return Answer(columns=column_names(result), rows=result.fetchall()).dicts()

    @property
    def num_shards(self) -> int:
        """Of how many shards files may be opened; shards of retries, of which the uids are read, do not count."""
        return len({place for kind, files in self._files.items() if kind != "retries" for place in files})

    def take_histograms(self) -> list[dict[str, Any]]:
        """Return the histograms of all records, summed by stage and name: a row for each bin that counts anything.

        Most of the records' memory is theirs: it is given back, their column is NULL from now on.
        """
        rows, column = self.records["shards"], "histograms"
        committed, texts = set(self._committed_rows()), rows.select(["stage", column])
        nulls = pa.nulls(rows.num_rows, rows[column].type)
        self.records["shards"] = rows.set_column(rows.column_names.index(column), column, nulls)
        self._connection.register("shards_data", self.records["shards"])
        batches = texts.to_batches(max_chunksize=1000)
        pairs = (
            pair for batch in batches for pair in zip(*map(pa.Array.to_pylist, batch.columns), strict=True)
        )
        return sum_histograms(
            (stage, text) for number, (stage, text) in enumerate(pairs) if text and number in committed
        )

    def _committed_rows(self) -> list[int]:
        """Return where in ``records`` the committed shards are; of those that two parts have, the first."""
        key = ("stage", "source", "shard", "attempt")
        committed = {
            tuple(row.values())
            for row in self.rows(f"SELECT {', '.join(key)} FROM shards WHERE state = 'committed'")
        }
        columns = (self.records["shards"][name].to_pylist() for name in key)
        first: dict[tuple[Any, ...], int] = {}
        for number, values in enumerate(zip(*columns, strict=True)):
            if values in committed:
                first.setdefault(values, number)
        return list(first.values())

    def reread_marks(self) -> None:
        """Take the marks as they are now; all else stays as it was when the connection was opened."""
        self._connection.register("marks_data", self._compacted.tables()["marks"])

    def keep(self, view: str) -> None:
        """Compute a view once: from now on this connection's questions read its rows as they are now."""
        for statement in (
            # Takes half the memory; whoever asks for an order gets it.
            "SET preserve_insertion_order = false",
            "CREATE SCHEMA IF NOT EXISTS kept",
            f"CREATE OR REPLACE TABLE kept.{view} AS SELECT * FROM main.{view}",
            "SET search_path = 'kept,main'",
        ):
            self._execute(statement)

    def _execute(self, sql: str, parameters: Sequence[Any] = ()) -> duckdb.DuckDBPyConnection:
        try:
            return self._connection.execute(sql, list(parameters))
        except _OWN_SQL_ERRORS as error:
            self.find_damage()
            raise _damaged(str(error).splitlines()[0]) from error

    def find_damage(self) -> None:
        """Raise CorruptShardError for the first committed file that does not hold its table's columns."""
        for kind, files in self._files.items():
            for _, path in sorted(files.items()):
                with self._storage.open(path) as file, contextlib.suppress(pa.ArrowInvalid):
                    if mismatch := schema_mismatch(pq.read_schema(file), _SCHEMAS[kind]):
                        raise _damaged(f"{path}: {mismatch}")

    def _require_regular(self, paths: Iterable[str]) -> None:
        """Reject a FIFO in the place of a file: DuckDB and Arrow would wait for it."""
        if not self._storage.is_local:
            return
        for path in paths:
            try:
                require_regular(self._storage.url(path))
            except NotRegularFileError as error:
                raise _damaged(f"{path} cannot be read: {error.strerror}") from error

    def sealed(self) -> duckdb.DuckDBPyConnection:
        """Forbid the connection every access outside the database, permanently; return it, for a user's SQL."""
        self._require_regular(path for files in self._files.values() for path in files.values())
        seal(self._connection)
        return self._connection


def _damaged(what: str) -> CorruptShardError:
    return CorruptShardError(f"{what}; `capfilt verify CORPUS` names every damaged file")
