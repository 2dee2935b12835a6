"""Committed shards, read back: every file is checked against its record before a row of it is used.

A tar cut at a member boundary reads without an error, in tarfile and in webdataset alike: only size, sha256 and
the number of samples show it.
"""

import contextlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.records import Records
from pipeline.digests import sha256_file
from pipeline.regular_files import NotRegularFileError
from pipeline.shards.shard_files import ImageMember, image_members
from schemas.errors import CorruptShardError
from schemas.names import is_one_part
from schemas.records import OutputFile, ShardRecord

_SAMPLE_COLUMNS = ("uid", "source", "shard", "key", "url", "captions", "width", "height", "sha256")


@contextlib.contextmanager
def committed_file(records: Records, file: OutputFile) -> Iterator[Path]:
    """Yield a local path with the committed bytes.

    Raises:
        CorruptShardError: the file is gone, or its size or sha256 is not the record's.
    """
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(records.storage.local_copy(file.path))
        except FileNotFoundError as error:
            raise _corrupt(file, "is missing") from error
        except NotRegularFileError as error:
            raise _corrupt(file, f"cannot be read ({error.strerror})") from error
        size = path.stat().st_size
        if size != file.bytes:
            raise _corrupt(file, f"has {size:,} bytes where its record says {file.bytes:,}")
        if sha256_file(path) != file.sha256:
            raise _corrupt(file, "has another sha256 than its record")
        yield path


def committed_table(records: Records, file: OutputFile, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a committed Parquet file, or some columns of it. Raises as ``committed_file`` does."""
    with committed_file(records, file) as path:
        table = pq.read_table(path, columns=None if columns is None else list(columns), memory_map=False)
    if table.num_rows != file.rows:
        raise _corrupt(file, f"has {table.num_rows:,} rows where its record says {file.rows:,}")
    return table


class CrawledShard:
    """The images that a crawl stored, by key, and their rows. Reading is thread-safe.

    ``samples``: the rows with status ok, sorted by key; the columns that later stages read.
    """

    def __init__(self, samples: pa.Table, members: dict[str, ImageMember], descriptor: int) -> None:
        self.samples = samples
        self._members = members
        self._descriptor = descriptor

    @property
    def keys(self) -> list[str]:
        """The samples' keys in order."""
        return self.samples["key"].to_pylist()

    def extension(self, key: str) -> str:
        """Return the extension of the sample's image: one of shard_files.IMAGE_EXTENSIONS."""
        return self._members[key].extension

    def size(self, key: str) -> int:
        """Return the bytes of the sample's image."""
        return self._members[key].size

    def image_bytes(self, key: str) -> bytes:
        """Return the stored image, encoded."""
        member = self._members[key]
        return os.pread(self._descriptor, member.size, member.offset)


@contextlib.contextmanager
def open_crawled(records: Records, record: ShardRecord) -> Iterator[CrawledShard]:
    """Open what a crawl committed for a shard, in the corpus or, if it was imported, where its tar lies.

    Raises:
        CorruptShardError: the files are not those of the record, or tar and Parquet do not agree on the
        samples.
    """
    tar = record.outputs["tar"]
    table = committed_table(records, record.outputs["parquet"], (*_SAMPLE_COLUMNS, "status"))
    samples = table.filter(pc.equal(table["status"], "ok")).select(_SAMPLE_COLUMNS).sort_by("key")
    if unusable := [key for key in samples["key"].to_pylist() if not (key and is_one_part(key))]:
        raise _corrupt(
            record.outputs["parquet"], f"has the key {unusable[0]!r}, which cannot be a file's name,"
        )
    with committed_file(records, tar) as path:
        members = _index_images(path, tar)
        keys = samples["key"].to_pylist()
        # An imported tar may hold more than its Parquet takes: duplicates, and invalid images.
        is_imported = records.storage.url(tar.path) == tar.path
        if (
            len(members) != tar.rows
            or not members.keys() >= set(keys)
            or (len(keys) != tar.rows and not is_imported)
        ):
            raise _corrupt(
                tar,
                f"holds {len(members):,} images, its Parquet {len(keys):,} samples; the record: {tar.rows:,}",
            )
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield CrawledShard(samples, members, descriptor)
        finally:
            os.close(descriptor)


def retried_elsewhere(records: Records, source: str, shard: str) -> set[str]:
    """Return the uids of a shard that later shards, queued to try them again, hold now."""
    paths = [
        batch.shards[retry].path for batch in records.intakes(source) for retry in batch.retries_of(shard)
    ]

    def read(path: str) -> list[str]:
        # The shards that a retry shard repeats are a short range, so of most files only the footer is read.
        with records.storage.open(path) as file:
            table = pq.read_table(file, columns=["uid"], filters=[("retry_of", "==", shard)])
        return table["uid"].to_pylist()

    return set().union(*records.storage.map(read, paths))


def _index_images(path: Path, file: OutputFile) -> dict[str, ImageMember]:
    """Find the one image of each sample in a tar."""
    members: dict[str, ImageMember] = {}
    try:
        for member in image_members(path):
            if member.key in members:
                raise _corrupt(file, f"holds two images under the key {member.key}")
            members[member.key] = member
    except tarfile.ReadError as error:
        raise _corrupt(file, f"is not a readable tar ({error})") from error
    return members


def _corrupt(file: OutputFile, what: str) -> CorruptShardError:
    return CorruptShardError(f"{file.path} {what}; `capfilt verify CORPUS` names every such file")
