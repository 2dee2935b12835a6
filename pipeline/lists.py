"""Lists of image-text pairs as files: found by globs, read in batches of columns, whatever their format.

Parquet, CSV, TSV and JSON lines, gzip'd or not, on any storage. A CSV is quoted as RFC 4180 says; a TSV is
not quoted at all (one line is one row, as in CC3M's and CC12M's files).
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.nearest import did_you_mean
from pipeline.storage import FileInfo, Storage
from schemas.errors import CapfiltError

Format = Literal["parquet", "csv", "tsv", "jsonl"]
# Some consecutive rows, by column; every column has the same length, a missing cell is None.
Columns = dict[str, list[Any]]

BATCH_ROWS = 65_536
_SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}


def find_files(inputs: Sequence[str], storage: Storage, key: str) -> list[FileInfo]:
    """Return the files that paths and globs name, each once: in the order given, a glob's sorted.

    Raises CapfiltError, naming the config's ``key``, where one names no file.
    """
    found: dict[str, FileInfo] = {}
    for pattern in inputs:
        paths = expand(pattern, key)
        if not paths:
            raise CapfiltError(f"{key}: no file matches {pattern}")
        for path in paths:
            found.setdefault(path, storage.info(path))
    return list(found.values())


def expand(pattern: str, key: str) -> list[str]:
    """Return the absolute paths or URLs of the files that a path or glob names, sorted."""
    try:
        fs, path = fsspec.core.url_to_fs(pattern)
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
    except (OSError, ValueError, ImportError) as error:
        raise CapfiltError(f"{key}: {pattern} cannot be listed: {error}") from error
    return [fs.unstrip_protocol(path) if "://" in pattern else path for path in paths]


def read_columns(storage: Storage, path: str, form: str, columns: Sequence[str]) -> Iterator[Columns]:
    """Yield the named columns of one list, in batches, in order.

    Args:
        form: a Format, or ``auto`` to go by the file's name.

    Raises CapfiltError that names file and row where the list cannot be read, or the columns it has instead.
    """
    form = _format_of(path) if form == "auto" else form
    with _readable(path), storage.open(path) as file:
        match form:
            case "parquet":
                yield from _read_parquet(file, path, columns)
            case "csv" | "tsv":
                yield from _read_separated(_text(file, path), path, form, columns)
            case "jsonl":
                yield from _read_json_lines(_text(file, path), path, columns)


def count_rows(storage: Storage, path: str, form: str, column: str) -> int:
    """Return the rows of one list: from a Parquet file's footer, else by reading a column."""
    form = _format_of(path) if form == "auto" else form
    if form == "parquet":
        with _readable(path), storage.open(path) as file:
            return pq.read_metadata(file).num_rows
    return sum(len(batch[column]) for batch in read_columns(storage, path, form, [column]))


def _format_of(path: str) -> Format:
    name = path.removesuffix(".gz")
    for suffix, form in _SUFFIXES.items():
        if name.lower().endswith(suffix):
            return form
    raise CapfiltError(
        f"{path}: its name does not tell the format ({', '.join(_SUFFIXES)}, .gz or not); "
        "set the source's format"
    )


def _text(file: BinaryIO, path: str) -> io.TextIOWrapper:
    """Decode text, a byte order mark skipped; only ``\\n`` ends a line here, the readers handle ``\\r``."""
    stream = gzip.GzipFile(fileobj=file) if path.endswith(".gz") else file
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n")


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """Turn what a damaged or mislabelled file raises into one error that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise CapfiltError(f"{path}: not UTF-8 text ({error.reason})") from error
    except (pa.ArrowException, zlib.error, EOFError, OSError) as error:
        raise CapfiltError(f"{path}: cannot be read: {error}") from error


def _read_parquet(file: BinaryIO, path: str, columns: Sequence[str]) -> Iterator[Columns]:
    parquet = pq.ParquetFile(file, pre_buffer=False)
    _require(columns, parquet.schema_arrow.names, path)
    for batch in parquet.iter_batches(BATCH_ROWS, columns=list(columns), use_threads=False):
        yield {name: batch.column(name).to_pylist() for name in columns}


def _read_separated(text: io.TextIOBase, path: str, form: str, columns: Sequence[str]) -> Iterator[Columns]:
    rows = _csv_rows(text, path) if form == "csv" else _tsv_rows(text)
    _, header = next(rows, (0, None))
    if header is None:
        return
    _require(columns, header, path)
    places = [header.index(name) for name in columns]
    batch: list[list[str]] = []
    for line, row in rows:
        if len(row) != len(header):
            raise CapfiltError(f"{path}: line {line} has {len(row)} fields, the header has {len(header)}")
        batch.append([row[place] for place in places])
        if len(batch) == BATCH_ROWS:
            yield _by_column(batch, columns)
            batch = []
    if batch:
        yield _by_column(batch, columns)


def _by_column(rows: list[list[str]], columns: Sequence[str]) -> Columns:
    """Transpose; an empty cell is a missing one, since text formats have no other way to say so."""
    return {
        name: [cell or None for cell in column]
        for name, column in zip(columns, zip(*rows, strict=True), strict=True)
    }


def _csv_rows(text: io.TextIOBase, path: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(text, strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise CapfiltError(f"{path}: line {reader.line_num}: {error}") from error


def _tsv_rows(text: io.TextIOBase) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text, start=1):
        if stripped := line.rstrip("\r\n"):
            yield number, stripped.split("\t")


def _read_json_lines(text: io.TextIOBase, path: str, columns: Sequence[str]) -> Iterator[Columns]:
    batch: list[dict[str, Any]] = []
    checked = False
    for number, line in enumerate(text, start=1):
        if line.isspace():
            continue
        batch.append(_json_row(line, f"{path}: line {number}"))
        if len(batch) == BATCH_ROWS:
            checked = checked or _require_in_any(columns, batch, path)
            yield {name: [row.get(name) for row in batch] for name in columns}
            batch = []
    if batch:
        _ = checked or _require_in_any(columns, batch, path)
        yield {name: [row.get(name) for row in batch] for name in columns}


def _json_row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        if line.lstrip().startswith("["):
            row = []
        else:
            raise CapfiltError(f"{place}: not JSON: {error.msg} at column {error.colno}") from error
    if isinstance(row, list):
        raise CapfiltError(f"{place}: an array where a row is an object; jq -c '.[]' FILE makes lines of it")
    if not isinstance(row, dict):
        raise CapfiltError(f"{place}: {line.strip()[:40]} is not an object")
    return _encodable(row) if "\\ud" in line.lower() else row


def _encodable(value: Any) -> Any:
    """Replace lone surrogates, which JSON can spell and UTF-8 cannot."""
    match value:
        case str():
            return value.encode("utf-8", "replace").decode()
        case list():
            return [_encodable(part) for part in value]
        case dict():
            return {name: _encodable(part) for name, part in value.items()}
    return value


def _require_in_any(columns: Sequence[str], rows: list[dict[str, Any]], path: str) -> bool:
    """Check that each column is in one row at least: objects may leave out what they do not have."""
    _require(columns, list({name: None for row in rows for name in row}), path)
    return True


def _require(columns: Sequence[str], present: Sequence[str], path: str) -> None:
    """Refuse a list without one of the columns, naming those it has."""
    for name in columns:
        if name in present:
            continue
        has = ", ".join(present) or "none"
        message = f"{path}: no column {name!r}{did_you_mean(name, present)} (it has {has})"
        if any("://" in column for column in present):
            message += "; its first line looks like data: put a header line (url<TAB>caption) above it"
        raise CapfiltError(message)
