"""The manifest of a corpus in SQL: every table, over what is committed at the moment of the question.

A question opens an in-memory DuckDB over the records and the committed Parquet files. The package's own questions
use ``Manifest.open``; a user's SQL is answered in a sandbox without access to files (``Manifest.query``, ``stream``).
"""

import contextlib
import itertools
import re
import tempfile
import threading
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.manifest.catalog_file import rewrite_copied_catalog, write_catalog
from pipeline.manifest.compaction import CompactedRecords
from pipeline.manifest.histograms import HistogramSums
from pipeline.manifest.record_tables import RecordTables
from pipeline.manifest.sample_files import samples_dataset
from pipeline.manifest.sandbox import (
    FILE_ERRORS,
    Parameters,
    Sealed,
    Stream,
    column_names,
    seal,
    stream_answer,
    table_answer,
)
from pipeline.manifest.uid_index import UidIndex
from pipeline.regular_files import NotRegularFileError, require_regular
from pipeline.shards.shard_files import schema_mismatch
from pipeline.storage.storage import Storage
from schemas.catalog.corpus_files import parquet_files, parquet_files_of_formats, registered_relations
from schemas.catalog.statements import comments, data_views, names_in, record_views
from schemas.catalog.table_schemas import DATA_STAGES, DATA_TABLES, record_row_schema
from schemas.catalog.tables import committed_files_of
from schemas.errors import CapfiltError, CorruptShardError, first_line
from schemas.records import is_own_file
from schemas.stages import Stage

# The kinds of committed files: the stage that writes them, and their columns.
_STAGES: dict[str, Stage] = {**DATA_STAGES, "retries": "crawl"}
_SCHEMAS = {**DATA_TABLES, "retries": DATA_TABLES["raw"]}

# What shows the comments of tables and columns: DuckDB's own functions, and the standard's tables.
_TELLS_COMMENTS = ("duckdb_", "information_schema")

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
        # Opens a connection for this package's own questions, as of now; its options are those of ``Query``.
        self.open = partial(Query, storage, self.compacted)
        self.uids = UidIndex(storage)
        # The catalog is made over the parts: no rebuild of another thread may take them away meanwhile.
        self._writing = threading.Lock()

    def compact(self) -> int:
        """Copy new records into the manifest's Parquet, see that the catalog exists; return the new rows."""
        with self._writing:
            rows = self.compacted.compact()
            self._write_catalog()
            if self.compacted.has_new_lists or self.uids.is_empty():
                self.uids.update()
        return rows

    def upgrade(self) -> int:
        """Bring the Parquet parts of earlier versions, and the catalog, to this one; return the rows made anew."""
        with self._writing:
            rows = self.compacted.upgrade()
            self._write_catalog()
        return rows

    def rebuild(self) -> dict[str, int]:
        """Make the manifest anew from the records alone; return the rows by table."""
        with self._writing:
            rows = self.compacted.rebuild()
            self._write_catalog()
            self.uids.rebuild()
        return rows

    def _write_catalog(self) -> None:
        write_catalog(self.storage, of_formats=len(self.compacted.formats) > 1)

    def _compact_for_catalog(self) -> None:
        self.compacted.compact()
        self._write_catalog()

    def rewrite_copied_catalog(self) -> str | None:
        """Write ``manifest.duckdb`` anew if it came here with a copied corpus; see ``catalog_file``."""
        with self._writing:
            return rewrite_copied_catalog(self.storage, self._compact_for_catalog)

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
        with (
            self.open(memory=memory) as query,
            stream_answer(query.sealed(), sql, timeout_s=timeout_s) as stream,
        ):
            yield stream

    def table(
        self,
        sql: str,
        parameters: Parameters = (),
        *,
        timeout_s: float = 600.0,
        memory: str = "50%",
    ) -> pa.Table:
        """Answer as ``query`` does, with typed columns."""
        with self.open(memory=memory) as query:
            return table_answer(query.sealed(), sql, parameters, timeout_s=timeout_s)


class Query(contextlib.AbstractContextManager["Query", None]):
    """An in-memory DuckDB with every table of the manifest, over what was committed when it was opened.

    Files of samples, and most columns of the shards, are read once a statement asks for them. Use it as a context
    manager.

    Args:
        memory: what DuckDB may take, such as 4GB or 50%.
        in_place: DuckDB may open the files itself where they are local, and so has access to files. Faster at
            finding one row, of which Arrow reads every column of every file: for questions that search samples.
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
        records: RecordTables | None = None,
    ) -> None:
        self._storage = storage
        self._compacted = compacted
        self._in_place = in_place and storage.is_local
        self._shards = None if shards is None else frozenset(shards)
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
        relations = registered_relations()
        self.records = records or compacted.tables()
        for table, rows in self.records.others.items():
            self._connection.register(f"{table}_data", rows)
        self._register_shards()
        self._run(record_views(relations))
        for kind, schema in _SCHEMAS.items():
            self._connection.register(f"{kind}_data", schema.empty_table())
        self._run(data_views(relations))
        # What no statement has asked for yet.
        self._unopened = set(_SCHEMAS)
        # Whether some file that is opened in place was found without columns that later ones have.
        self._lacks_columns = False
        self._is_commented = self._has_canonical_url = False

    def _run(self, statements: list[str]) -> None:
        self._connection.execute(";".join(statements))

    def _register_shards(self) -> None:
        """Give the connection the rows of the shards, with the columns that are filled."""
        self._columns = self.records.filled
        self._connection.register("shards_data", self.records.events())
        self._connection.register("standing_shards_data", self.records.shards())

    def prepare(self, sql: str, parameters: Parameters = ()) -> None:
        """Open the files, and read the columns of the records, that a statement needs and none before it did."""
        names = names_in(sql)
        if not self._is_commented and any(name.startswith(_TELLS_COMMENTS) for name in names):
            self._run(comments())
            self._is_commented = True
        if "canonical_url" in names and not self._has_canonical_url:
            _add_canonical_url(self._connection)
            self._has_canonical_url = True
        if "shards_events" in names:
            self._fill(self._columns_of(sql, parameters))
        # The SQL calls the rows of retries by another name than their files.
        for kind in sorted(self._unopened & ({*names, "retries"} if "retried" in names else names)):
            self._add_files(f"{kind}_data", self._files[kind], _SCHEMAS[kind])
            self._unopened.remove(kind)

    def _columns_of(self, sql: str, parameters: Parameters = ()) -> set[str]:
        """Return the columns of the shards that a statement reads: DuckDB's plan of it names those of each scan."""
        try:
            plan = self._connection.execute(f"EXPLAIN (FORMAT JSON) {sql}", parameters).fetchall()
        except duckdb.Error:  # it cannot be answered, or needs no rows
            return set()
        return {*re.findall(r"\w+", " ".join(text for _, text in plan))} & {
            *record_row_schema("shards").names
        }

    def _fill(self, columns: Set[str]) -> None:
        """See that the rows of the shards have some columns."""
        if columns <= self._columns:
            return
        filled = self.records.filled
        try:
            self.records.fill(columns)
        except FileNotFoundError:  # parts that the rows came from are gone: taken as they are now
            self.records = self._compacted.tables()
            self.records.fill(filled | columns)
        self._register_shards()

    @cached_property
    def _files(self) -> dict[str, dict[tuple[str, str], str]]:
        """The committed files of each kind by source and shard: of some shards, and what was retried of all."""
        files: dict[str, dict[tuple[str, str], str]] = {kind: {} for kind in _SCHEMAS}
        for kind, source, shard, path in self._committed_files():
            stage = _STAGES.get(kind)
            if stage is None or path is None or not is_own_file(path, stage, source, shard):
                raise CorruptShardError(
                    f"manifest/shards names {path!r} as the {stage or kind} of {source}/{shard}, which is not a file "
                    "of that shard; nothing of it was read. `capfilt manifest rebuild CORPUS` makes it anew from the "
                    "records"
                )
            files[kind][source, shard] = path
        return files

    def _committed_files(self) -> list[tuple[Any, ...]]:
        """Return kind, source, shard and path of the committed files: of some shards, and of all that were retried."""
        every = "SELECT * FROM base.committed_files"
        self._fill(self._columns_of(every))
        if self._shards is None:
            return self._connection.execute(every).fetchall()
        retried = "SELECT source, shard FROM main.shards WHERE stage = 'urls' AND counts['retry'] > 0"
        places = {*self._shards, *self._connection.execute(retried).fetchall()}
        self._connection.register("some_shards_data", self.records.shards_of(places))
        rows = self._connection.execute(committed_files_of("some_shards_data")).fetchall()
        return [row for row in rows if row[0] == "retries" or (row[1], row[2]) in self._shards]

    def _add_files(self, name: str, files: dict[tuple[str, str], str], schema: pa.Schema) -> None:
        if not files:
            return
        self._require_regular(files.values())
        if not self._in_place:
            self._connection.register(name, samples_dataset(self._storage, files, schema))
            return
        paths = [self._storage.url(path) for _, path in sorted(files.items())]
        self._connection.unregister(name)
        if self._lacks_columns:
            self._connection.register(f"{name}_empty", schema.empty_table())
            relation = parquet_files_of_formats(paths, schema, f"{name}_empty")
        else:
            relation = parquet_files(paths, schema)
        self._connection.execute(f"CREATE OR REPLACE VIEW {name} AS {relation}")
        if self._connection.view(name).types != self._connection.from_arrow(schema.empty_table()).types:
            self.find_damage()

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

    def histogram_sums(self) -> list[dict[str, Any]]:
        """Return the histograms of the committed shards as ``HistogramSums.rows`` does.

        The connection is not asked, so that another thread may ask it meanwhile.
        """
        try:
            return _histogram_sums(self._compacted, self.records)
        except FileNotFoundError:  # its parts were merged and swept, or made anew
            return _histogram_sums(self._compacted, self._compacted.tables())

    def reread_marks(self) -> None:
        """Take the marks as they are now; all else stays as it was when the connection was opened."""
        self._connection.register("marks_data", self._compacted.tables().others["marks"])

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
            self.prepare(sql, list(parameters))
            return self._connection.execute(sql, list(parameters))
        except _OWN_SQL_ERRORS as error:
            if self.find_damage() and self._in_place and not self._lacks_columns:
                self._lacks_columns = True
                self._unopened = set(_SCHEMAS)
                return self._execute(sql, parameters)
            raise _damaged(str(error).splitlines()[0]) from error

    def find_damage(self) -> bool:
        """Tell whether some committed file lacks columns of its table: one of an earlier format may.

        Raises CorruptShardError for the first that holds others instead, or lacks some in a corpus of one format.
        """
        lacks_columns = False
        may_lack = len(self._compacted.formats) > 1
        for kind, files in self._files.items():
            for _, path in sorted(files.items()):
                with self._storage.open(path) as file, contextlib.suppress(pa.ArrowInvalid):
                    actual = pq.read_schema(file)
                    lacks_columns |= not {*_SCHEMAS[kind].names} <= {*actual.names}
                    needed = () if may_lack else _SCHEMAS[kind].names
                    if mismatch := schema_mismatch(actual, _SCHEMAS[kind], needed):
                        raise _damaged(f"{path}: {mismatch}")
        return lacks_columns

    def _require_regular(self, paths: Iterable[str]) -> None:
        """Reject a FIFO in the place of a file: DuckDB and Arrow would wait for it."""
        if not self._storage.is_local:
            return
        for path in paths:
            try:
                require_regular(self._storage.url(path))
            except NotRegularFileError as error:
                raise _damaged(f"{path} cannot be read: {error.strerror}") from error

    def sealed(self) -> Sealed:
        """Forbid the connection every access outside the database, permanently; return it, for a user's SQL."""
        seal(self._connection)
        return Sealed(connection=self._connection, prepare=self.prepare, find_damage=self.find_damage)


def _add_canonical_url(connection: duckdb.DuckDBPyConnection) -> None:
    """Let a connection's statements call ``canonical_url``, in Python: DuckDB reads no URLs as browsers do."""
    # Here, since most statements need no parser of URLs.
    from duckdb.func import ARROW, SPECIAL

    from pipeline.web.urls import canonical_url

    def canonical_urls(urls: pa.Array) -> pa.Array:
        return pa.array(
            [None if url is None else canonical_url(url) for url in urls.to_pylist()], pa.string()
        )

    connection.create_function(
        "canonical_url", canonical_urls, ["VARCHAR"], "VARCHAR", type=ARROW, null_handling=SPECIAL
    )


def _histogram_sums(compacted: CompactedRecords, records: RecordTables) -> list[dict[str, Any]]:
    sums, start = HistogramSums(), 0
    for rows in compacted.histogram_batches(records):
        is_committed = records.is_committed[start : start + len(rows)]
        start += len(rows)
        try:
            sums.add(rows if is_committed.all() else rows.filter(pa.array(is_committed)))
        except ValueError as error:
            raise CorruptShardError(
                f"manifest/shards has histograms whose counts do not fit their bins ({first_line(error)}); "
                "`capfilt manifest rebuild CORPUS` makes it anew"
            ) from error
    return sums.rows()


def _damaged(what: str) -> CorruptShardError:
    return CorruptShardError(f"{what}; `capfilt verify CORPUS` names every damaged file")
