"""Committed Parquet files as Arrow data: which are opened for a question, and in how many requests."""

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs

from pipeline.storage.filesystem import filesystem_of
from pipeline.storage.storage import Storage

_PARQUET = ds.ParquetFileFormat()
# Of a shard of 10,000 images a file has up to 7 MB.
_WHOLE_BYTES = 8 << 20


def samples_dataset(
    storage: Storage, files: Mapping[tuple[str, str], str], schema: pa.Schema
) -> ds.FileSystemDataset:
    """Return the files of shards (source, shard); those that a filter on both rules out are never opened."""
    filesystem = (
        pyarrow.fs.LocalFileSystem()
        if storage.is_local
        else pyarrow.fs.PyFileSystem(_WholeFiles(filesystem_of(storage.root)[0]))
    )
    fragments = [
        _PARQUET.make_fragment(
            storage.url(path).rpartition("://")[2],
            filesystem,
            partition_expression=(ds.field("source") == source) & (ds.field("shard") == shard),
        )
        for (source, shard), path in sorted(files.items())
    ]
    return ds.FileSystemDataset(fragments, schema, _PARQUET, filesystem)


class _WholeFiles(pyarrow.fs.FSSpecHandler):
    """Reads a file whole where it is small: one request, where its size (twice), its end and its columns take four."""

    def open_input_file(self, path: str) -> pa.NativeFile:
        data = self.fs.cat_file(path, start=0, end=_WHOLE_BYTES + 1)
        return pa.BufferReader(data) if len(data) <= _WHOLE_BYTES else super().open_input_file(path)
