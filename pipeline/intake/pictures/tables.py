"""``format = "huggingface"``: each row of a data set's Parquet or Arrow files is a row, its image inside the file.

An Image column of Hugging Face's is a struct of the file's ``bytes`` and its ``path``; a binary column is one too.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.intake.lists.columns import Rows, Wanted, require
from pipeline.intake.lists.files import read_columns
from pipeline.intake.lists.lines import UNREADABLE
from pipeline.intake.lists.parquet_rows import ParquetList, cells_of
from pipeline.intake.pictures.places import InputFolders, Place
from pipeline.storage.file_info import FileInfo
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.names import shown

FORMAT = "huggingface"
# The url_column of a source that does not set one: its image column is found by its type.
_UNSET = "url"


class ImageTables:
    """The Parquet and Arrow files of one source. A "list" of it is one file."""

    def __init__(self, inputs: Sequence[str], key: str, storage: Storage) -> None:
        self._key, self._storage = key, storage
        folders = InputFolders(inputs, key)
        files = [file for pattern in inputs for file in folders.files(pattern)]
        # What `datasets` itself keeps beside its data: cache-*.arrow are results of map and filter.
        self._tables = {
            folders.url_of(file): file
            for file in files
            if file.relative.endswith((".parquet", ".arrow"))
            and not file.relative.rpartition("/")[2].startswith("cache-")
        }
        if not self._tables:
            raise CapfiltError(
                f"{key}: no *.parquet or *.arrow in {', '.join(inputs[:3])}; name the folder that `datasets` made "
                "(save_to_disk), or Parquet files with an Image column"
            )
        self.lists = tuple(self._tables)

    def files(self) -> list[FileInfo]:
        """Return the tables."""
        return [file.version(FORMAT) for file in self._tables.values()]

    def count(self, table: str) -> int:
        """Return the rows of a table."""
        with self._storage.local_copy(table) as path, _readable(table):
            return _count(path)

    def rows(self, table: str, wanted: Wanted) -> Iterator[Rows]:
        """Yield the rows of a table without reading its images.

        Raises CapfiltError where it cannot be read, lacks a column, or has no image column.
        """
        file = self._tables[table]
        columns = tuple(name for name in wanted.columns if name != wanted.url)
        start = 0
        for rows, length in self._plain_rows(table, columns, wanted):
            rows[wanted.url] = [
                Place(folder=file.folder, relative=file.relative, item=str(start + row)).url(FORMAT)
                for row in range(length)
            ]
            yield Rows(columns=rows, numbers=range(start + 1, start + 1 + length), unit="row")
            start += length

    def _plain_rows(
        self, table: str, columns: tuple[str, ...], wanted: Wanted
    ) -> Iterator[tuple[dict[str, list[Any]], int]]:
        asked = Wanted(url="", caption=wanted.caption, columns=columns)
        with self._storage.local_copy(table) as path, _readable(table):
            schema = table_schema(path, table)
            image_column(schema, wanted.url, table)
            require(asked, schema.names, table)
            if not columns:
                yield {}, _count(path)
            elif table.endswith(".parquet"):
                for rows in read_columns(Storage(str(path.parent)), str(path), "parquet", asked):
                    yield dict(rows.columns), len(rows.numbers)
            else:
                start = 1
                for batch in _arrow_batches(path):
                    yield {name: cells_of(batch, name, table, start) for name in columns}, batch.num_rows
                    start += batch.num_rows


class TableImages:
    """Reads the images of one table, by row; quick if rows are asked for in their order.

    Args:
        path: the table, on local disk.
        column: of the images; the source's ``url_column``.
        name: of the table, for messages.

    Raises CapfiltError where the table cannot be read or has no image column.
    """

    def __init__(self, path: Path, column: str, name: str) -> None:
        self._path, self._name = path, name
        with _readable(name):
            self._column = image_column(table_schema(path, name), column, name)
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._start, self._batch = 0, None

    def read(self, row: int) -> bytes | None:
        """Return the bytes of a row's image; None where the row holds none, or is not there."""
        with _readable(self._name):
            if self._batch is None or row < self._start:
                self._batches, self._start, self._batch = self._images(), 0, None
            while self._batch is None or row >= self._start + self._batch.num_rows:
                self._start += 0 if self._batch is None else self._batch.num_rows
                self._batch = next(self._batches, None)
                if self._batch is None:
                    return None
            value = self._batch.column(self._column)[row - self._start].as_py()
        return value.get("bytes") if isinstance(value, dict) else value

    def _images(self) -> Iterator[pa.RecordBatch]:
        if self._path.suffix == ".parquet":
            with self._path.open("rb") as file:
                yield from ParquetList(file, self._name).images(self._column)
        else:
            for batch in _arrow_batches(self._path):
                yield batch.select([self._column])


def table_schema(path: Path, name: str) -> pa.Schema:
    """Return the schema of a Parquet or Arrow file. Raises CapfiltError where it cannot be read."""
    with _readable(name):
        if path.suffix == ".parquet":
            return pq.read_schema(path)
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            return stream.schema


def image_column(schema: pa.Schema, column: str, name: str) -> str:
    """Return the column that holds images: the one that is named, else the only one that can.

    Raises CapfiltError where there is none, or there are several.
    """
    structs = [field.name for field in schema if is_image_struct(field.type)]
    binary = [
        field.name
        for field in schema
        if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
    ]
    if column != _UNSET:
        if column not in structs + binary:
            raise CapfiltError(
                f"{name}: {column!r} is not a column of images; it has {', '.join(structs + binary) or 'none'}"
            )
        return column
    able = structs or binary
    if len(able) != 1:
        what = f"several columns of images ({', '.join(map(shown, able))})" if able else "no column of images"
        raise CapfiltError(f"{name} has {what}; set url_column to the one that holds the pictures")
    return able[0]


def is_image_struct(dtype: pa.DataType) -> bool:
    """Tell whether a column is of type Image, as `datasets` stores it."""
    if not pa.types.is_struct(dtype):
        return False
    names = {dtype.field(index).name for index in range(dtype.num_fields)}
    return names == {"bytes", "path"}


def _count(path: Path) -> int:
    if path.suffix == ".parquet":
        return pq.read_metadata(path).num_rows
    return sum(batch.num_rows for batch in _arrow_batches(path))


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield the batches of an Arrow stream, as `datasets` writes it, without copying them into memory."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
        yield from stream


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise CapfiltError(f"{name}: cannot be read: {error}") from error
