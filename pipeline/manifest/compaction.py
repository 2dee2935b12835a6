"""Compaction: the rows of the records in a few Parquet files, the manifest's parts, so that SQL opens few files.

    manifest/<table>/<time>-<id>.parquet      rows with the record file, and its version, that each came from

A part is never changed. Rows may be in two parts (any number of processes compact at once): the views keep
one. Parts of about one size are merged into one of the next, so that a row is rewritten a logarithmic number
of times; the merged part names those it replaces, which go only after a while, so that a reader that has
already listed them still finds them.
"""

import contextlib
import io
import json
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.record_files import read_bounded, read_record
from pipeline.manifest.histograms import SUM_COLUMNS
from pipeline.manifest.record_rows import ADDED_FIELDS, Row, rows_of, shard_records_of, table_of
from pipeline.manifest.record_tables import RecordTables, completed
from pipeline.regular_files import NotRegularFileError
from pipeline.storage.errors import ObjectStorageError
from pipeline.storage.file_info import FileInfo
from pipeline.storage.scratch import temporary_folder
from pipeline.storage.storage import Storage
from schemas.catalog.table_schemas import HISTOGRAM_BINS, HISTOGRAM_COUNTS, RECORD_TABLES, record_row_schema
from schemas.corpus_format import CorpusFormat, formats_in, require_known_format
from schemas.errors import CorruptShardError, first_line
from schemas.records import ShardRecord, shard_record_path

_BIG_PART_ROWS = 1_000_000
_REPLACES = b"replaces"

# Most of a part's bytes.
_HISTOGRAMS = ("histograms", HISTOGRAM_BINS, HISTOGRAM_COUNTS)
_NOT_IN_RECORDS = (*_HISTOGRAMS, "state", "bytes", "error")
# Rows of a part that are in memory at once, with their histograms.
_BATCH_ROWS = 1024

_SHARDS_SCHEMA = record_row_schema("shards")

Seen = frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What is remembered of a part: the record versions it holds, its rows, columns, and the parts it replaces."""

    seen: Seen
    rows: int
    columns: frozenset[str]
    replaces: frozenset[str]


class CompactedRecords:
    """The rows of a corpus's records: compacted into parts, and as tables of now. Remembers the parts it has read.

    Safe to use from several threads, one at a time: a run compacts beside those who ask.

    Args:
        merge_at: so many parts of about one size are merged into one.
        grace: how long after a merge the parts that it replaces are kept.
    """

    def __init__(
        self, storage: Storage, *, merge_at: int = 8, grace: timedelta = timedelta(minutes=10)
    ) -> None:
        self.storage = storage
        self.merge_at = merge_at
        self.grace = grace
        # Whether the last compaction met url shards that no part had.
        self.has_new_lists = False
        # Those that wrote to the corpus, as the last listing said.
        self.formats: set[CorpusFormat] = set()
        self._known: dict[str, _Part] = {}
        self._lock = threading.Lock()

    def tables(self) -> RecordTables:
        """Return each table's rows as of now: all parts, and the records in none. Writes nothing."""
        with self._lock:
            try:
                return self._tables()
            except FileNotFoundError:  # a rebuild deleted a part that was just listed
                return self._tables()

    def _tables(self) -> RecordTables:
        parts = self._live_parts()
        new_rows = {table: _to_table(table, rows) for table, rows in self._new_rows(parts).items()}
        others = {
            table: pa.concat_tables([*self._read(table, parts[table], record_row_schema(table).names), rows])
            for table, rows in new_rows.items()
            if table != "shards"
        }
        return RecordTables(others, parts["shards"], new_rows["shards"], partial(self._read, "shards"))

    def histogram_batches(self, tables: RecordTables) -> Iterator[pa.Table]:
        """Yield the columns that ``HistogramSums`` adds up, of all rows in the order of ``RecordTables.events``.

        Some thousand rows at a time. Raises FileNotFoundError where parts were merged and swept, or made anew, since.
        """
        for path in tables.parts:
            # As text where there are no lists.
            part = self._known.get(path)
            unread = "histograms" if part and HISTOGRAM_COUNTS in part.columns else ""
            for rows in self._batches(path, [name for name in SUM_COLUMNS if name != unread]):
                with _naming_damage(path):
                    completed = _completed(rows, SUM_COLUMNS)
                yield completed
        yield tables.new_shards.select(SUM_COLUMNS)

    def shard_records(self, files: Sequence[FileInfo]) -> dict[str, ShardRecord]:
        """Return those of the listed records of shards that a part holds in this very version, by path.

        Without histograms. Nothing is asked of the storage for each record. The records of parts that lack a column,
        as those of an earlier version do, are left out. Raises CorruptShardError, naming the part, where a row
        cannot come from its record.
        """
        wanted = pa.array([f"{info.path}\n{info.version}" for info in files], pa.string())
        read = {*record_row_schema("shards").names} - {*_NOT_IN_RECORDS}
        needed = read - {*ADDED_FIELDS}
        with self._lock:
            paths = [path for path in self._live_parts()["shards"] if needed <= self._known[path].columns]
            records: dict[str, ShardRecord] = {}
            # Suppressed where a rebuild deleted a part that was just listed: its records are read one by one.
            with contextlib.suppress(FileNotFoundError):
                for path in paths:
                    for rows in self._batches(path, sorted(read)):
                        with _naming_damage(path):
                            records |= _records_in(_completed(rows, sorted(read)), wanted)
        return records

    def compact(self) -> int:
        """Write the records that no part holds as one part a table, merge small ones; return the new rows."""
        with self._lock:
            return self._compact()

    def _compact(self) -> int:
        parts = self._live_parts()
        new_rows = self._new_rows(parts)
        self.has_new_lists = any(row["stage"] == "urls" for row in new_rows["shards"])
        for table, rows in new_rows.items():
            # Always one part with all columns, though empty: in DuckDB a glob that matches nothing is an error, and so
            # is a column that none of the files has.
            if rows or not any(self._has_all_columns(table, path) for path in parts[table]):
                self._write(table, _to_table(table, rows))
            self._merge(table, parts[table])
        self._sweep()
        return sum(len(rows) for rows in new_rows.values())

    def _has_all_columns(self, table: str, path: str) -> bool:
        return {*record_row_schema(table).names} <= self._known[path].columns

    def upgrade(self) -> int:
        """Make the rows of parts that lack columns anew from their records; return the rows that were written."""
        with self._lock:
            parts = self._live_parts()
            whole = {
                table: [path for path in paths if self._has_all_columns(table, path)]
                for table, paths in parts.items()
            }
            rows = self._new_rows(whole)
            for table, table_rows in rows.items():
                lacking = [path for path in parts[table] if path not in whole[table]]
                if table_rows or lacking:
                    self._write(table, _to_table(table, table_rows))
                # At once: a DuckDB of somebody's own would take either row.
                for path in lacking:
                    self.storage.delete(path)
            return sum(len(table_rows) for table_rows in rows.values())

    def rebuild(self) -> dict[str, int]:
        """Make the parts anew from the records alone; return the rows by table, a run counted once."""
        with self._lock:
            # Damaged ones too, and those that a merged part replaces: without it they would be back.
            old = sorted((path for paths in self._listed().values() for path in paths), key=_name)
            rows = self._new_rows({table: [] for table in RECORD_TABLES})
            for table, table_rows in rows.items():
                self._write(table, _to_table(table, table_rows))
            for path in old:
                self.storage.delete(path)
        # A run's start and its end are a row each.
        return {table: len(table_rows) for table, table_rows in rows.items()} | {
            "runs": len({row["run_id"] for row in rows["runs"]})
        }

    def _live_parts(self) -> dict[str, list[str]]:
        """Return the parts of each table, oldest first, without those that a merged part replaces."""
        paths_by_table = self._listed()
        listed = {path for paths in paths_by_table.values() for path in paths}
        unknown = sorted(listed - self._known.keys())
        for path, part in zip(unknown, self.storage.map(self._inspect, unknown), strict=True):
            if part is not None:
                self._known[path] = part
        self._known = {path: part for path, part in self._known.items() if path in listed}
        replaced = {name for part in self._known.values() for name in part.replaces}
        return {
            table: [path for path in paths if path in self._known and path not in replaced]
            for table, paths in paths_by_table.items()
        }

    def _listed(self) -> dict[str, list[str]]:
        return {
            table: [
                info.path for info in self.storage.list(f"manifest/{table}") if info.path.endswith(".parquet")
            ]
            for table in RECORD_TABLES
        }

    def _inspect(self, path: str) -> _Part | None:
        try:
            with self._opened(path) as parquet:
                table = parquet.read(["record", "version"])
                columns = frozenset(parquet.schema_arrow.names)
                replaces = frozenset(json.loads((parquet.schema_arrow.metadata or {}).get(_REPLACES, b"[]")))
        except FileNotFoundError:
            return None
        seen = frozenset(zip(table["record"].to_pylist(), table["version"].to_pylist(), strict=True))
        return _Part(seen=seen, rows=table.num_rows, columns=columns, replaces=replaces)

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[pq.ParquetFile]:
        """Yield a part, opened: of object storage in one request. Raises as ``_naming_damage`` says."""
        with _naming_damage(path), contextlib.ExitStack() as stack:
            storage = self.storage
            file = storage.open(path) if storage.is_local else io.BytesIO(storage.read(path))
            yield stack.enter_context(pq.ParquetFile(stack.enter_context(file)))

    def _new_rows(self, parts: dict[str, list[str]]) -> dict[str, list[Row]]:
        """Return the rows of the records that are in none of the parts, by table."""
        seen = set[tuple[str, str]]().union(
            *(self._known[path].seen for paths in parts.values() for path in paths)
        )
        # A training saves its snapshot beside its checkpoints: in the corpus, unless its config says otherwise.
        listed = [info for folder in ("records", "checkpoints") for info in self.storage.list(folder)]
        paths_listed = [info.path for info in listed]
        require_known_format(self.storage.root, paths_listed)
        self.formats = formats_in(paths_listed)
        unseen = [info for info in listed if (info.path, info.version) not in seen]
        by_table = [(table, info) for info in unseen if (table := table_of(info.path))]
        rows: dict[str, list[Row]] = {table: [] for table in RECORD_TABLES}
        read = self.storage.map(self._read_record, [info for _, info in by_table])
        for (table, _), record_rows in zip(by_table, read, strict=True):
            rows[table].extend(record_rows)
        return rows

    def _read_record(self, info: FileInfo) -> list[Row]:
        try:
            text = read_bounded(self.storage, info)
        except FileNotFoundError:  # retired, or its quarantine lifted, since it was listed
            return []
        rows = [{**row, "record": info.path, "version": info.version} for row in rows_of(info.path, text)]
        return [row for row in rows if not self._is_wrongly_retired(row)]

    def _is_wrongly_retired(self, row: Row) -> bool:
        """Tell whether a retired record is the committed one too: who retired it was killed before it deleted that."""
        if row.get("state") != "retired":
            return False
        path = shard_record_path(row["stage"], row["source"], row["shard"])
        try:
            (committed,) = rows_of(path, read_record(self.storage, path))
        except FileNotFoundError:
            return False
        return committed["attempt"] == row["attempt"]

    def _read(self, table: str, paths: Sequence[str], columns: Sequence[str]) -> list[pa.Table]:
        """Return these columns of the rows of parts."""

        def read(path: str) -> pa.Table:
            with self._opened(path) as parquet:
                names = [name for name in columns if name in parquet.schema_arrow.names]
                return _completed(parquet.read(columns=names), columns, record_row_schema(table))

        return self.storage.map(read, paths)

    def _batches(self, path: str, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield those of some columns that a part of shards has, some thousand rows at a time."""
        with self._opened(path) as parquet:
            names = [name for name in columns if name in parquet.schema_arrow.names]
            for batch in parquet.iter_batches(_BATCH_ROWS, columns=names, use_threads=False):
                yield pa.Table.from_batches([batch])

    def _write(self, table: str, rows: pa.Table, replaces: tuple[str, ...] = ()) -> None:
        rows = rows.replace_schema_metadata({_REPLACES: json.dumps(replaces)})
        # In groups of as many rows as are read at once.
        write_part(self.storage, f"manifest/{table}", rows, row_group_size=_BATCH_ROWS)

    def _merge(self, table: str, paths: list[str]) -> None:
        """Make one part of each class of size that has many: up to 3 rows, 31, 255, 2047, ..."""
        by_size: dict[int, list[str]] = {}
        for path in paths:
            if (rows := self._known[path].rows) < _BIG_PART_ROWS:
                by_size.setdefault(rows.bit_length() // 3, []).append(path)
        for alike in by_size.values():
            if len(alike) < self.merge_at:
                continue
            # Suppressed where another process rebuilds: then there is nothing to merge any more.
            with contextlib.suppress(FileNotFoundError):
                merged = _distinct(pa.concat_tables(self._read(table, alike, record_row_schema(table).names)))
                self._write(table, merged, replaces=tuple(alike))

    def _sweep(self) -> None:
        """Delete what merged parts replaced a while ago; oldest first, so that none comes back into sight."""
        for path in sorted(self._known, key=_name):
            if self._known[path].replaces and _age(path) > self.grace:
                for replaced in self._known[path].replaces:
                    if replaced in self._known:
                        self.storage.delete(replaced)


def write_part(storage: Storage, folder: str, rows: pa.Table, **options: Any) -> None:
    """Put a table as one more Parquet file into a folder: by their names, its files are in the order of their times."""
    path = f"{folder}/{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}.parquet"
    with temporary_folder() as scratch:
        pq.write_table(rows, scratch / "part.parquet", compression="zstd", **options)
        storage.put(scratch / "part.parquet", path)


@contextlib.contextmanager
def _naming_damage(path: str) -> Iterator[None]:
    """Turn what Arrow raises for a file that is not a part into an error that names the file and the remedy."""
    try:
        yield
    except ObjectStorageError:
        raise
    except (
        pa.ArrowException,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OSError,
    ) as error:
        is_irregular = isinstance(error, NotRegularFileError)
        if isinstance(error, OSError) and error.errno is not None and not is_irregular:
            raise  # the disk's error, not Arrow's
        reason = error.strerror if isinstance(error, NotRegularFileError) else first_line(error)
        raise CorruptShardError(
            f"{path} is not a part of the manifest ({reason}); `capfilt manifest rebuild CORPUS` makes it anew"
        ) from error


def _records_in(table: pa.Table, wanted: pa.Array) -> dict[str, ShardRecord]:
    """Return the wanted records of shards in a part's rows, by path. Raises ValueError for a row of another shard."""
    versions = pc.binary_join_element_wise(table["record"], table["version"], "\n")
    table = table.filter(pc.and_(pc.is_valid(table["files"]), pc.is_in(versions, value_set=wanted)))
    records: dict[str, ShardRecord] = {}
    for batch in table.combine_chunks().to_batches():
        for path, record in zip(batch["record"].to_pylist(), shard_records_of(batch), strict=True):
            if record.path != path:
                raise ValueError(f"its row of {path} is of another shard, {record.path}")
            records[path] = record
    return records


def _completed(rows: pa.Table, columns: Sequence[str], schema: pa.Schema = _SHARDS_SCHEMA) -> pa.Table:
    """Return rows of a part under today's types of some columns: those that it lacks are NULL."""
    held = {name: rows[name] for name in rows.column_names}
    return completed(held, len(rows), pa.schema([schema.field(name) for name in columns]))


def _to_table(table: str, rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=record_row_schema(table))


def _distinct(rows: pa.Table) -> pa.Table:
    """Drop rows that two processes copied from the same record (one record may hold many shards, or values)."""
    identity = ("record", "version", "corpus", "source", "shard", "sha256", "mark", "value")
    names = [name for name in identity if name in rows.column_names]
    keys = list(zip(*(map(str, rows[name].to_pylist()) for name in names), strict=True))
    first = {key: number for number, key in reversed(list(enumerate(keys)))}
    return rows.take(sorted(first.values()))


def _name(path: str) -> str:
    return path.split("/")[-1]


def _age(path: str) -> timedelta:
    try:
        written = datetime.strptime(_name(path).split("-")[0], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
    except ValueError:  # a file that capfilt did not name: as if written now
        return timedelta(0)
    return datetime.now(UTC) - written
