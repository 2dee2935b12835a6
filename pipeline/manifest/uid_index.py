"""Which url shards list a uid: sorted files of all uids, by which a trace opens the files of few shards.

    manifest/uids/<time>-<id>.parquet      ``uid`` (the first 64 bits), ``place`` (source/shard); the batches it covers

A file covers whole batches of the intake and is never changed. A shard of a batch that no file covers may have any uid.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.records import Records
from pipeline.manifest.compaction import write_part
from pipeline.shards.uids import pack_uids
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.records import IntakeRecord, ShardRecord

ShardPlace = tuple[str, str]

_FOLDER = "manifest/uids"
_BATCHES = b"batches"
# Sorted at once, in 16 bytes a row; and read at once for one uid.
_FILE_ROWS, _GROUP_ROWS = 4_000_000, 65_536
_DAMAGE = (pa.ArrowException, ValueError, KeyError, TypeError)


@dataclass(frozen=True, slots=True)
class _File:
    """What is known of a file of the index: the ids of the batches that it and the files before it cover whole."""

    path: str
    batches: frozenset[str]
    is_damaged: bool = False


class UidIndex:
    """The index of one corpus. Reading it is a matter of speed: whoever misses a uid here looks into every shard."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._known: dict[str, _File] = {}

    def update(self) -> None:
        """Write the uids of the batches that are not covered yet."""
        files = self._files()
        covered = set().union(*(file.batches for file in files))
        self._write([batch for batch in Records(self.storage).intakes() if batch.attempt not in covered])

    def rebuild(self) -> None:
        """Make the index anew."""
        old = [info.path for info in self.storage.list(_FOLDER)]
        self._write(Records(self.storage).intakes())
        for path in old:
            self.storage.delete(path)

    def is_empty(self) -> bool:
        """Tell whether there is no file of the index."""
        return not self.storage.list(_FOLDER)

    def shards_of(self, uids: Collection[str], batches: Sequence[IntakeRecord]) -> set[ShardPlace] | None:
        """Return the url shards that may list some of the uids; None where that is any of them.

        Args:
            uids: 32 hex digits each.
            batches: all of the corpus.
        """
        try:
            files = self._files()
            covered = set().union(*(file.batches for file in files))
            if not covered or any(file.is_damaged for file in files):
                return None
            wanted_N = np.sort(pack_uids(uids)[:, 0])
            places = {place for file in files for place in self._find(file.path, wanted_N)}
        except (*_DAMAGE, FileNotFoundError):
            return None
        uncovered = {
            (batch.source, shard)
            for batch in batches
            if batch.attempt not in covered
            for shard in batch.shards
        }
        return uncovered | {(place.rpartition("/")[0], place.rpartition("/")[2]) for place in places}

    def _files(self) -> list[_File]:
        paths = [info.path for info in self.storage.list(_FOLDER) if info.path.endswith(".parquet")]
        unknown = [path for path in paths if path not in self._known]
        for path, file in zip(unknown, self.storage.map(self._inspect, unknown), strict=True):
            self._known[path] = file
        return [self._known[path] for path in paths]

    def _inspect(self, path: str) -> _File:
        try:
            with self.storage.open(path) as file:
                metadata = pq.read_schema(file).metadata or {}
            return _File(path, frozenset(json.loads(metadata[_BATCHES])))
        except _DAMAGE:
            return _File(path, frozenset(), is_damaged=True)

    def _find(self, path: str, wanted_N: np.ndarray) -> Iterator[str]:
        """Yield the places of the rows with a wanted uid, from those groups of rows alone that may have one."""
        with self.storage.open(path) as file, pq.ParquetFile(file) as parquet:
            for number in range(parquet.num_row_groups):
                statistics = parquet.metadata.row_group(number).column(0).statistics
                first = np.searchsorted(wanted_N, np.uint64(statistics.min), "left")
                last = np.searchsorted(wanted_N, np.uint64(statistics.max), "right")
                if first == last:
                    continue
                rows = parquet.read_row_group(number)
                yield from rows.filter(np.isin(rows["uid"].to_numpy(), wanted_N))["place"].to_pylist()

    def _write(self, batches: Sequence[IntakeRecord]) -> None:
        """Write the uids of whole batches; one that cannot be read stays uncovered."""
        uids: list[np.ndarray] = []
        places: list[str] = []
        whole: list[str] = []
        for batch in batches:
            for record in batch.shard_records():
                shard_uids = self._uids(record)
                if shard_uids is None:
                    break
                if sum(map(len, uids)) >= _FILE_ROWS:
                    self._write_file(uids, places, whole)
                    uids, places, whole = [], [], []
                uids.append(shard_uids)
                places.append(f"{record.source}/{record.shard}")
            else:
                whole.append(batch.attempt)
        if uids:
            self._write_file(uids, places, whole)

    def _uids(self, record: ShardRecord) -> np.ndarray | None:
        try:
            with self.storage.open(record.outputs["parquet"].path) as file:
                return pack_uids(pq.read_table(file, columns=["uid"])["uid"].to_pylist())[:, 0]
        except (*_DAMAGE, FileNotFoundError, CapfiltError):
            return None

    def _write_file(self, uids: Sequence[np.ndarray], places: Sequence[str], batches: Sequence[str]) -> None:
        all_uids_N = np.concatenate(uids)
        codes_N = np.repeat(np.arange(len(uids), dtype=np.int32), [len(part) for part in uids])
        order_N = np.argsort(all_uids_N)
        place = pa.DictionaryArray.from_arrays(pa.array(codes_N[order_N]), pa.array(places, pa.string()))
        rows = pa.table({"uid": all_uids_N[order_N], "place": place})
        rows = rows.replace_schema_metadata({_BATCHES: json.dumps(list(batches))})
        encoding: dict[str, Any] = {
            "column_encoding": {"uid": "DELTA_BINARY_PACKED"}, "use_dictionary": ["place"]
        }  # fmt: skip
        write_part(self.storage, _FOLDER, rows, row_group_size=_GROUP_ROWS, **encoding)
