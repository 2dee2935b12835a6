"""Rows of Parquet lists, decoded in pieces whose size is known before they become Python objects.

A Parquet file of a few kB can decode to any size: a page of one repeated letter, a dictionary's one long entry
in a million rows, a billion empty cells. The footer tells the first and the last; where a dictionary may
multiply, its longest entry is looked at first.
"""

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.intake.lists.lines import FREE_BYTES, MAX_EXPANSION, MAX_ROW_BYTES, not_utf8
from schemas.errors import CapfiltError

# Rows decoded at once. More are not faster.
_PIECE_ROWS = 4096
# Images decoded at once: of some MB each, 64 MB or so.
_IMAGE_ROWS = 16
# Memory that a piece may take.
_PIECE_BYTES = 64 << 20
# Of DELTA_BYTE_ARRAY each value may repeat all of the one before.
_DELTA_ROWS = 4
# Cells that cost nothing, as missing ones do, and those a byte of the file may stand for.
_FREE_VALUES = 16 << 20
_VALUES_A_BYTE = 8
_BUFFER_BYTES = 1 << 20


class ParquetList:
    """A Parquet file as a list of rows. Raises CapfiltError where it would not fit in memory."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.path = path
        self._file = file
        self._plain = pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES)
        self.schema = self._plain.schema_arrow
        self.names = self.schema.names
        self.num_rows = self._plain.metadata.num_rows

    def pieces(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield consecutive rows of the named columns, in order."""
        leaves = self._leaves(columns)
        for group in range(self._plain.num_row_groups):
            self._reject_bomb(group, leaves)
            rows, dictionaries = self._decoding(group, leaves)
            reader = self._open(dictionaries) if dictionaries else self._plain
            for batch in reader.iter_batches(
                rows, row_groups=[group], columns=list(columns), use_threads=False
            ):
                yield from _divided(batch)

    def images(self, column: str) -> Iterator[pa.RecordBatch]:
        """Yield consecutive rows of a column of images, a few at a time; equal ones share their bytes."""
        leaves = self._leaves((column,))
        for group in range(self._plain.num_row_groups):
            self._reject_bomb(group, leaves)
            repeating = [
                chunk.path_in_schema
                for chunk in self._chunks(group, leaves)
                if chunk.has_dictionary_page and chunk.physical_type == "BYTE_ARRAY"
            ]
            reader = self._open(repeating) if repeating else self._plain
            yield from reader.iter_batches(
                _IMAGE_ROWS, row_groups=[group], columns=[column], use_threads=False
            )

    def _open(self, dictionaries: Sequence[str]) -> pq.ParquetFile:
        """Open the file again so that the values of some columns stay in their dictionary."""
        return pq.ParquetFile(
            self._file,
            metadata=self._plain.metadata,
            read_dictionary=list(dictionaries),
            pre_buffer=False,
            buffer_size=_BUFFER_BYTES,
        )

    def _leaves(self, columns: Sequence[str]) -> list[int]:
        schema = self._plain.metadata.schema
        paths = [schema.column(index).path for index in range(len(schema))]
        return [
            index
            for index, path in enumerate(paths)
            if any(path == c or path.startswith(f"{c}.") for c in columns)
        ]

    def _chunks(self, group: int, leaves: Sequence[int]) -> list[pq.ColumnChunkMetaData]:
        return [self._plain.metadata.row_group(group).column(leaf) for leaf in leaves]

    def _reject_bomb(self, group: int, leaves: Sequence[int]) -> None:
        chunks = self._chunks(group, leaves)
        size = sum(chunk.total_compressed_size for chunk in chunks)
        expanded = sum(chunk.total_uncompressed_size for chunk in chunks)
        values = max((chunk.num_values for chunk in chunks), default=0)
        if expanded > max(FREE_BYTES, MAX_EXPANSION * size) or values > max(
            _FREE_VALUES, _VALUES_A_BYTE * size
        ):
            raise CapfiltError(
                f"{self.path}: row group {group + 1} has {values:,} values, {expanded:,} bytes, in {size:,} bytes, "
                "as a decompression bomb does; if you trust it, write it anew in row groups of 100,000 rows"
            )

    def _decoding(self, group: int, leaves: Sequence[int]) -> tuple[int, list[str]]:
        """Return how many rows to decode at once, and the columns to keep in their dictionary."""
        rows, dictionaries = _PIECE_ROWS, []
        for leaf, chunk in zip(leaves, self._chunks(group, leaves), strict=True):
            if chunk.num_values * chunk.total_uncompressed_size <= _PIECE_BYTES:
                continue
            path, nested = chunk.path_in_schema, chunk.path_in_schema not in self.names
            if chunk.physical_type == "FIXED_LEN_BYTE_ARRAY":
                length = self._plain.metadata.schema.column(leaf).length
                rows = min(rows, max(_PIECE_BYTES // max(length, 1), 1))
            elif "DELTA_BYTE_ARRAY" in chunk.encodings:
                rows = min(rows, _DELTA_ROWS)
                if nested:
                    raise CapfiltError(
                        f"{self.path}: {path} is a list in the encoding DELTA_BYTE_ARRAY, whose size cannot be told "
                        "beforehand; write the file anew with another encoding"
                    )
            elif (
                chunk.has_dictionary_page
                and chunk.physical_type == "BYTE_ARRAY"
                and (nested or self._longest_entry(group, path) > _PIECE_BYTES // _PIECE_ROWS)
            ):
                dictionaries.append(path)
        return rows, dictionaries

    def _longest_entry(self, group: int, column: str) -> int:
        """Return the bytes of the longest text in a column's dictionary; reads no more than the first page."""
        first = next(self._open([column]).iter_batches(1, row_groups=[group], columns=[column]))
        return pc.max(pc.binary_length(first.column(0).dictionary)).as_py() or 0


def _divided(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Yield a batch in parts that are not too large as Python objects."""
    if max(map(decoded_bytes, batch.columns)) <= _PIECE_BYTES or batch.num_rows == 1:
        yield batch
        return
    half = batch.num_rows // 2
    yield from _divided(batch.slice(0, half))
    yield from _divided(batch.slice(half))


def decoded_bytes(column: pa.Array) -> int:
    """Return the bytes of a column's values, each one counted however often its dictionary gives it out."""
    if isinstance(column, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        return decoded_bytes(column.flatten())
    if isinstance(column, pa.StructArray):
        return sum(map(decoded_bytes, column.flatten()))
    if not isinstance(column, pa.DictionaryArray):
        return column.nbytes
    try:
        lengths = pc.binary_length(column.dictionary)
    except pa.ArrowNotImplementedError:  # a dictionary of numbers
        return column.nbytes
    return column.indices.nbytes + (pc.sum(pc.cast(lengths.take(column.indices), pa.int64())).as_py() or 0)


def cells_of(piece: pa.RecordBatch, name: str, path: str, first_row: int) -> list[Any]:
    """Return a column's cells as Python objects.

    Args:
        first_row: number of the piece's first row in the file, for the error message about a cell.
    """
    column = piece.column(name)
    if decoded_bytes(column) > MAX_ROW_BYTES:
        _reject_large(column, name, path, first_row)
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_cell(value, f"{path}: row {first_row + row:,}: {name}") for row, value in enumerate(column)]


def _reject_large(column: pa.Array, name: str, path: str, first_row: int) -> None:
    for row in range(len(column)):
        if decoded_bytes(column.slice(row, 1)) > MAX_ROW_BYTES:
            raise CapfiltError(
                f"{path}: row {first_row + row:,}: {name} has more than {MAX_ROW_BYTES >> 20} MiB; leave the row out"
            )


def _cell(value: pa.Scalar, place: str) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise not_utf8(place, error) from error
