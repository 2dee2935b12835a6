"""Lists of image-text pairs as files: found by globs, read in batches of columns, whatever their format.

Parquet, CSV, TSV, JSON and plain lists of URLs, packed by gzip, bzip2 or zstd or not, on any storage.
"""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO, Literal, TypeVar

import pyarrow as pa

from pipeline.intake.lists.columns import Columns, Rows, Unit, Wanted, require
from pipeline.intake.lists.lines import MAX_ROW_BYTES, UNREADABLE, content_of
from pipeline.intake.lists.parquet_rows import ParquetList, cells_of, decoded_bytes
from pipeline.intake.lists.text_columns import TextRows
from pipeline.intake.lists.text_columns import text_rows as arrow_text_rows
from pipeline.intake.lists.text_rows import Cells, captions_beside, text_rows
from pipeline.regular_files import NotRegularFileError, require_regular
from pipeline.storage.file_info import FileInfo
from pipeline.storage.filesystem import filesystem_of, is_local
from pipeline.storage.scratch import temporary_folder
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError

Part = TypeVar("Part")
Format = Literal["parquet", "csv", "tsv", "tsv-quoted", "jsonl", "txt"]

BATCH_ROWS = 65_536
_BATCH_BYTES = MAX_ROW_BYTES
LIST_SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "txt",
}
# What a name may end with besides; whether a file is packed, its content says.
PACKED_SUFFIXES = (".gz", ".gzip", ".bz2", ".zst", ".zstd")


def find_files(inputs: Sequence[str], storage: Storage, key: str) -> list[FileInfo]:
    """Return the files that paths and globs name, each once: in the order given, a glob's sorted.

    Raises CapfiltError, naming the config's ``key``, where one names no file.
    """
    files: dict[str, FileInfo] = {}
    for pattern in inputs:
        paths = expand(pattern, key)
        if not paths:
            raise CapfiltError(f"{key}: no file matches {pattern}")
        for path in paths:
            files.setdefault(path, storage.info(path))
    return list(files.values())


def expand(pattern: str, key: str) -> list[str]:
    """Return the absolute paths or URLs of the files that a path or glob names, sorted."""
    try:
        fs, path = filesystem_of(pattern)
        fs.invalidate_cache()
        if fs.isfile(path):
            paths = [path]
        elif fs.isdir(path):
            raise CapfiltError(
                f"{key}: {pattern} is a folder; name its files ({pattern.rstrip('/')}/*.parquet), "
                'or set format = "img2dataset" if it holds img2dataset shards'
            )
        else:
            paths = sorted(match for match in fs.glob(path) if fs.isfile(match))
            if not paths and is_local(fs):
                require_regular(path)
    except NotRegularFileError as error:
        raise CapfiltError(
            f"{key}: {pattern}: {error.strerror}; a list is read more than once: write it to a file and name that"
        ) from error
    except (OSError, ValueError, ImportError) as error:
        raise CapfiltError(f"{key}: {pattern} cannot be listed: {error}") from error
    return [fs.unstrip_protocol(path) if "://" in pattern else path for path in paths]


def caption_files(lists: Sequence[FileInfo], form: str, storage: Storage) -> list[FileInfo]:
    """Return the files with the captions of plain lists of URLs. A glob may match them too; they are not lists."""
    plain = [file.path for file in lists if format_of(file.path, form) == "txt"]
    return [storage.info(captions) for path in plain if (captions := captions_beside(path, storage))]


def read_columns(storage: Storage, path: str, form: str, wanted: Wanted) -> Iterator[Rows]:
    """Yield the wanted columns of one list, in batches, in order.

    Args:
        form: of the source: a Format, ``auto`` to go by the file's name, or ``img2dataset``, which writes Parquet.

    Raises CapfiltError that names file and row where the list cannot be read, or the columns it has instead.
    """
    form = format_of(path, form)
    with opened_list(storage, path) as file:
        if form == "parquet":
            for pieces, first in _parquet_pieces(file, path, wanted):
                yield _rows_of(pieces, path, wanted, first)
        else:
            unit, rows = text_rows(storage, file, path, form, wanted)
            yield from _batches(rows, wanted, unit)


def read_texts(storage: Storage, path: str, form: str, wanted: Wanted) -> Iterator[Rows | TextRows]:
    """Yield URLs and captions of one list as ``read_columns`` does, of Parquet as Arrow's texts where they are that."""
    if format_of(path, form) != "parquet":
        yield from read_columns(storage, path, form, wanted)
        return
    with opened_list(storage, path) as file:
        for pieces, first in _parquet_pieces(file, path, wanted):
            texts = arrow_text_rows(pieces, wanted, first)
            rows = _rows_of(pieces, path, wanted, first) if texts is None else texts
            # Copied: what the file's pieces take is free while the rows are used.
            pieces.clear()
            yield rows


def require_columns(storage: Storage, path: str, form: str, wanted: Wanted) -> None:
    """Look at the beginning of a list: raise CapfiltError if it cannot be read or lacks a column."""
    form = format_of(path, form)
    with opened_list(storage, path) as file:
        if form == "parquet":
            with open_parquet(file, path) as parquet:
                require(wanted, parquet.names, path)
        else:
            next(text_rows(storage, file, path, form, wanted)[1], None)


def count_rows(storage: Storage, path: str, form: str, url_column: str) -> int:
    """Return the rows of one list: from a Parquet file's footer, else by reading a column."""
    form = format_of(path, form)
    if form == "parquet":
        with opened_list(storage, path) as file, open_parquet(file, path) as parquet:
            return parquet.num_rows
    wanted = Wanted(url=url_column, columns=(url_column,))
    return sum(len(batch.numbers) for batch in read_columns(storage, path, form, wanted))


def format_of(path: str, form: str = "auto") -> str:
    """Return a list's format; ``auto`` goes by its name. Raises CapfiltError where that does not tell it."""
    if form != "auto":
        return "parquet" if form == "img2dataset" else form
    name = path.lower()
    for suffix in PACKED_SUFFIXES:
        name = name.removesuffix(suffix)
    for suffix, form in LIST_SUFFIXES.items():
        if name.endswith(suffix):
            return form
    raise CapfiltError(
        f"{path}: its name does not tell the format ({', '.join(LIST_SUFFIXES)}, {', '.join(PACKED_SUFFIXES)} or not); "
        "set the source's format"
    )


@contextmanager
def opened_list(storage: Storage, path: str) -> Iterator[BinaryIO]:
    """Open a list; what a damaged or mislabelled file raises becomes one error that names it."""
    try:
        with storage.open(path) as file:
            yield file
    except UNREADABLE as error:
        raise CapfiltError(f"{path}: cannot be read: {error}") from error


def _batches(rows: Iterable[Cells], wanted: Wanted, unit: Unit) -> Iterator[Rows]:
    """Transpose rows into batches of bounded length and size."""
    for batch in _grouped((row, 1, row[1]) for row in rows):
        numbers, _, cells = zip(*batch, strict=True)
        columns = map(list, zip(*cells, strict=True))
        yield Rows(columns=dict(zip(wanted.columns, columns, strict=True)), numbers=numbers, unit=unit)


def _grouped(parts: Iterable[tuple[Part, int, int]]) -> Iterator[list[Part]]:
    """Yield consecutive parts, each given with its number of rows and bytes, in groups that are batches."""
    group: list[Part] = []
    rows = size = 0
    for part, part_rows, part_bytes in parts:
        group.append(part)
        rows, size = rows + part_rows, size + part_bytes
        if rows >= BATCH_ROWS or size >= _BATCH_BYTES:
            yield group
            group, rows, size = [], 0, 0
    if group:
        yield group


@contextmanager
def open_parquet(file: BinaryIO, path: str) -> Iterator[ParquetList]:
    """Read a Parquet file's footer; a packed file is unpacked first, since Parquet is read from the back."""
    start = file.read(4)
    file.seek(0)
    if start == b"PAR1":
        yield ParquetList(file, path)
        return
    with temporary_folder() as folder:
        unpacked = folder / "list.parquet"
        with unpacked.open("wb") as target:
            shutil.copyfileobj(content_of(file), target)
        with unpacked.open("rb") as content:
            yield ParquetList(content, path)


def _parquet_pieces(file: BinaryIO, path: str, wanted: Wanted) -> Iterator[tuple[list[pa.RecordBatch], int]]:
    """Yield consecutive pieces of a Parquet file that are one batch, and the number of their first row."""
    with open_parquet(file, path) as parquet:
        require(wanted, parquet.names, path)
        first = 1
        # By what they take as objects: a dictionary's long entry may stand in every row.
        sized = (
            (piece, piece.num_rows, sum(map(decoded_bytes, piece.columns)))
            for piece in parquet.pieces(wanted.columns)
        )
        for pieces in _grouped(sized):
            rows = sum(piece.num_rows for piece in pieces)
            yield pieces, first
            first += rows


def _rows_of(pieces: Sequence[pa.RecordBatch], path: str, wanted: Wanted, first: int) -> Rows:
    batch: Columns = {name: [] for name in wanted.columns}
    start = first
    for piece in pieces:
        for name, cells in batch.items():
            cells.extend(cells_of(piece, name, path, start))
        start += piece.num_rows
    return Rows(columns=batch, numbers=range(first, start), unit="row")
