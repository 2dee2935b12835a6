"""The stored image of one sample: one read of its bytes, at the place in the shard's tar that the Parquet names.

A shard of an earlier version names no places: its tar is read once, and the places stay in the user's cache.
"""

import contextlib
import threading
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.records import Records
from pipeline.shards.shard_files import image_members
from pipeline.storage.scratch import cache_folder
from schemas.marks import is_value
from schemas.names import is_one_part
from schemas.records import OutputFile, ShardRecord

# Shards whose places are remembered: at 10,000 images each has some 2 MB.
_SHARDS = 24
# An image as stored, larger than any that a crawl keeps; a Parquet of somebody else may say anything.
_MAX_BYTES = 64 * 2**20
_PLACES = pa.schema([("key", pa.string()), ("offset", pa.int64()), ("image_bytes", pa.int64())])

Places = dict[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class _Shard:
    tar: str
    places: Places


class StoredImages:
    """The stored images of a corpus, one at a time. Thread-safe."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._shards: OrderedDict[tuple[str, str], _Shard | None] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, source: str, shard: str, key: str) -> bytes | None:
        """Return the encoded image of a sample of a committed shard; None where it has none."""
        crawled = self._shard(source, shard)
        place = crawled.places.get(key) if crawled else None
        if crawled is None or place is None:
            return None
        return self._records.storage.read_range(crawled.tar, *place)

    def _shard(self, source: str, shard: str) -> _Shard | None:
        with self._lock:
            if (source, shard) not in self._shards:
                self._shards[source, shard] = self._open(source, shard)
            self._shards.move_to_end((source, shard))
            while len(self._shards) > _SHARDS:
                self._shards.popitem(last=False)
            return self._shards[source, shard]

    def _open(self, source: str, shard: str) -> _Shard | None:
        if not (is_one_part(source) and is_one_part(shard)):
            return None
        record = self._records.read("crawl", source, shard)
        if record is None:
            return None
        tar = record.outputs["tar"]
        places = self._listed_places(record)
        if places is None:
            places = self._indexed_places(tar)
        inside = {key: (start, size) for key, (start, size) in places.items() if _is_inside(start, size, tar)}
        return _Shard(tar.path, inside)

    def _listed_places(self, record: ShardRecord) -> Places | None:
        """Return the places that the shard's Parquet names, or None where it has no such column."""
        with (
            self._records.storage.open(record.outputs["parquet"].path) as file,
            pq.ParquetFile(file) as parquet,
        ):
            if "offset" not in parquet.schema_arrow.names:
                return None
            return _places(parquet.read(_PLACES.names))

    def _indexed_places(self, tar: OutputFile) -> Places:
        """Return the places of the images of a tar: from the cache, else from the tar itself, read once."""
        cached = cache_folder() / "tars" / f"{tar.sha256}.parquet"
        is_digest = is_value("sha256", tar.sha256)
        if is_digest:
            with contextlib.suppress(OSError, pa.ArrowException, KeyError):
                return _places(pq.read_table(cached, schema=_PLACES, memory_map=False))
        with self._records.storage.local_copy(tar.path) as path:
            rows = [
                {"key": member.key, "offset": member.offset, "image_bytes": member.size}
                for member in image_members(path)
            ]
        table = pa.Table.from_pylist(rows, schema=_PLACES)
        if is_digest:
            with contextlib.suppress(OSError):  # a cache that cannot be written costs the next reader time
                _write(table, cached)
        return _places(table)


def _places(table: pa.Table) -> Places:
    rows = zip(*(table[name].to_pylist() for name in _PLACES.names), strict=True)
    return {key: (start, size) for key, start, size in rows if start is not None and size is not None}


def _is_inside(start: int, size: int, tar: OutputFile) -> bool:
    return start >= 0 and 0 < size <= _MAX_BYTES and start + size <= tar.bytes


def _write(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        pq.write_table(table, temporary, compression="zstd")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
