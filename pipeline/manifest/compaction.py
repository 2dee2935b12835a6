"""The manifest's Parquet parts: append-only copies of the records, so that SQL opens few files.

    manifest/<table>/<time>-<id>.parquet      rows with the record file, and its version, that each came from

A part is never changed. Rows may be in two parts (any number of processes compact at once): the views keep
one. CompactedRecords of about one size are merged into one of the next, so that a row is rewritten a logarithmic number
of times; the merged part names those it replaces, which go only after a while, so that a reader that has
already listed them still finds them.
"""

import contextlib
import json
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.records import read_bounded, read_record
from pipeline.corpus.scratch import temporary_folder
from pipeline.corpus.shard_files import rows_to_table
from pipeline.corpus.storage import FileInfo, Storage
from pipeline.manifest.record_rows import Row, rows_of, table_of
from pipeline.regular_files import NotRegularFileError
from schemas.catalog import RECORD_TABLES, record_row_schema
from schemas.errors import CorruptShardError, first_line
from schemas.records import shard_record_path

_MERGE_AT_PARTS = 8
_BIG_PART_ROWS = 1_000_000
_GRACE = timedelta(minutes=10)
_REPLACES = b"replaces"

Seen = frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What is remembered of a part: the record versions it holds, its rows, and the parts it replaces."""

    seen: Seen
    rows: int
    replaces: frozenset[str]


class CompactedRecords:
    """The parts of one corpus. Keeps what it read of each part in memory, since parts never change.

    Safe to use from several threads, one at a time: a run compacts beside those who ask.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._known: dict[str, _Part] = {}
        self._lock = threading.Lock()

    def tables(self) -> dict[str, pa.Table]:
        """Return each table's rows as of now: all parts, and the records in none. Writes nothing."""
        with self._lock:
            try:
                return self._tables()
            except FileNotFoundError:  # a rebuild deleted a part that was just listed
                return self._tables()

    def _tables(self) -> dict[str, pa.Table]:
        parts = self._list()
        fresh = self._unseen(parts)
        return {
            table: pa.concat_tables(
                [*self._read(table, parts[table]), rows_to_table(fresh[table], record_row_schema(table))]
            )
            for table in RECORD_TABLES
        }

    def compact(self) -> int:
        """Write the records that no part holds as one part a table, merge small ones; return the new rows."""
        with self._lock:
            return self._compact()

    def _compact(self) -> int:
        parts = self._list()
        fresh = self._unseen(parts)
        for table, rows in fresh.items():
            if (
                rows or not parts[table]
            ):  # always one part, though empty: a glob of nothing is an error in DuckDB
                self._write(table, rows_to_table(rows, record_row_schema(table)))
            self._merge(table, parts[table])
        self._sweep()
        return sum(len(rows) for rows in fresh.values())

    def rebuild(self) -> dict[str, int]:
        """Make the parts anew from the records alone; return the rows by table, a run counted once."""
        with self._lock:
            # Damaged ones too, and those that a merged part replaces: without it they would be back.
            old = sorted((path for paths in self._found().values() for path in paths), key=_name)
            rows = self._unseen({table: [] for table in RECORD_TABLES})
            for table, table_rows in rows.items():
                self._write(table, rows_to_table(table_rows, record_row_schema(table)))
            for path in old:
                self.storage.delete(path)
        # A run's start and its end are a row each.
        return {table: len(table_rows) for table, table_rows in rows.items()} | {
            "runs": len({row["run_id"] for row in rows["runs"]})
        }

    def _list(self) -> dict[str, list[str]]:
        """Return the parts of each table, oldest first, without those that a merged part replaces."""
        found = self._found()
        listed = {path for paths in found.values() for path in paths}
        missing = sorted(listed - self._known.keys())
        for path, part in zip(missing, self.storage.map(self._inspect, missing), strict=True):
            if part is not None:
                self._known[path] = part
        self._known = {path: part for path, part in self._known.items() if path in listed}
        replaced = {name for part in self._known.values() for name in part.replaces}
        return {
            table: [path for path in paths if path in self._known and path not in replaced]
            for table, paths in found.items()
        }

    def _found(self) -> dict[str, list[str]]:
        return {
            table: [
                info.path for info in self.storage.list(f"manifest/{table}") if info.path.endswith(".parquet")
            ]
            for table in RECORD_TABLES
        }

    def _inspect(self, path: str) -> _Part | None:
        try:
            with _readable(path), self.storage.open(path) as file, pq.ParquetFile(file) as parquet:
                table = parquet.read(["record", "version"])
                replaces = frozenset(json.loads((parquet.schema_arrow.metadata or {}).get(_REPLACES, b"[]")))
        except FileNotFoundError:
            return None
        seen = frozenset(zip(table["record"].to_pylist(), table["version"].to_pylist(), strict=True))
        return _Part(seen=seen, rows=table.num_rows, replaces=replaces)

    def _unseen(self, parts: dict[str, list[str]]) -> dict[str, list[Row]]:
        """Return the rows of the records that are in none of the parts, by table."""
        seen = {pair for paths in parts.values() for path in paths for pair in self._known[path].seen}
        listed = [info for info in self.storage.list("records") if table_of(info.path)]
        fresh = [info for info in listed if (info.path, info.version) not in seen]
        rows: dict[str, list[Row]] = {table: [] for table in RECORD_TABLES}
        for info, found in zip(fresh, self.storage.map(self._read_record, fresh), strict=True):
            rows[table_of(info.path)].extend(found)
        return rows

    def _read_record(self, info: FileInfo) -> list[Row]:
        try:
            text = read_bounded(self.storage, info)
        except FileNotFoundError:  # retired, or its quarantine lifted, since it was listed
            return []
        rows = [{**row, "record": info.path, "version": info.version} for row in rows_of(info.path, text)]
        return [row for row in rows if not self._stands(row)]

    def _stands(self, row: Row) -> bool:
        """Tell whether a retired attempt is the committed one: whoever retired it was killed on the way."""
        if row.get("state") != "retired":
            return False
        path = shard_record_path(row["stage"], row["source"], row["shard"])
        try:
            (committed,) = rows_of(path, read_record(self.storage, path))
        except FileNotFoundError:
            return False
        return committed["attempt"] == row["attempt"]

    def _read(self, table: str, paths: list[str]) -> list[pa.Table]:
        def read(path: str) -> pa.Table:
            with _readable(path), self.storage.open(path) as file:
                return pq.read_table(file).cast(record_row_schema(table))

        return self.storage.map(read, paths)

    def _write(self, table: str, rows: pa.Table, replaces: tuple[str, ...] = ()) -> None:
        path = f"manifest/{table}/{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}.parquet"
        rows = rows.replace_schema_metadata({_REPLACES: json.dumps(replaces)})
        with temporary_folder() as folder:
            pq.write_table(rows, folder / "part.parquet", compression="zstd")
            self.storage.put(folder / "part.parquet", path)

    def _merge(self, table: str, paths: list[str]) -> None:
        """Make one part of each class of size that has many: up to 3 rows, 31, 255, 2047, ..."""
        by_size: dict[int, list[str]] = {}
        for path in paths:
            if (rows := self._known[path].rows) < _BIG_PART_ROWS:
                by_size.setdefault(rows.bit_length() // 3, []).append(path)
        for alike in by_size.values():
            if len(alike) < _MERGE_AT_PARTS:
                continue
            # Suppressed where another process rebuilds: then there is nothing to merge any more.
            with contextlib.suppress(FileNotFoundError):
                merged = _distinct(pa.concat_tables(self._read(table, alike)))
                self._write(table, merged, replaces=tuple(alike))

    def _sweep(self) -> None:
        """Delete what merged parts replaced a while ago; oldest first, so that none comes back into sight."""
        for path in sorted(self._known, key=_name):
            if self._known[path].replaces and _age(path) > _GRACE:
                for replaced in self._known[path].replaces:
                    if replaced in self._known:
                        self.storage.delete(replaced)


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    """Say of a part that is not one which it is, and what mends it."""
    try:
        yield
    except (pa.ArrowException, ValueError, KeyError, TypeError, OSError) as error:
        is_kind = isinstance(error, NotRegularFileError)
        if (
            isinstance(error, OSError) and error.errno is not None and not is_kind
        ):  # the storage's, not Arrow's
            raise
        why = error.strerror if is_kind else first_line(error)
        raise CorruptShardError(
            f"{path} is not a part of the manifest ({why}); `capfilt manifest rebuild CORPUS` mends it"
        ) from error


def _distinct(rows: pa.Table) -> pa.Table:
    """Drop rows that two processes copied from the same record (one record may hold many shards)."""
    keep = []
    pairs = zip(rows["record"].to_pylist(), rows["version"].to_pylist(), strict=True)
    names = rows["shard"].to_pylist() if "shard" in rows.column_names else [""] * rows.num_rows
    seen = set()
    for (record, version), shard in zip(pairs, names, strict=True):
        keep.append((record, version, shard) not in seen)
        seen.add((record, version, shard))
    return rows.filter(pa.array(keep, pa.bool_()))


def _name(path: str) -> str:
    return path.split("/")[-1]


def _age(path: str) -> timedelta:
    try:
        written = datetime.strptime(_name(path).split("-")[0], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
    except ValueError:  # not a name of ours: as if written now
        return timedelta(0)
    return datetime.now(UTC) - written
