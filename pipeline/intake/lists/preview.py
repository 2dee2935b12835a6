"""The beginning of a list as it is, before anyone says which of its columns are wanted."""

import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa

from pipeline.intake.lists.columns import Wanted, other_separator, require_header
from pipeline.intake.lists.files import format_of, open_parquet, opened_list
from pipeline.intake.lists.json_rows import array_rows, is_array, line_rows
from pipeline.intake.lists.lines import Lines, compression_of, text_of
from pipeline.intake.lists.parquet_rows import ParquetList, cells_of
from pipeline.intake.lists.text_rows import captions_beside, header_and_rows
from pipeline.storage.storage import Storage

PREVIEW_ROWS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class ListPreview:
    """What a list looks like.

    Attributes:
        compression: gzip, bzip2, zstd or nothing.
        names: its columns in order, columns of images among them; of a plain list of URLs, url and perhaps caption.
        image_names: the columns of a Parquet file that hold images.
        rows: the first rows, at most PREVIEW_ROWS, without the columns of images.
        num_rows: of the whole file, where it says so itself.
    """

    format: str
    compression: str
    names: tuple[str, ...]
    image_names: tuple[str, ...] = ()
    rows: tuple[dict[str, Any], ...]
    num_rows: int | None = None


def preview_list(storage: Storage, path: str) -> ListPreview:
    """Return the beginning of a list. Raises CapfiltError: it cannot be read, or has no header."""
    form = format_of(path)
    with opened_list(storage, path) as file:
        compression = compression_of(file)
        if form == "parquet":
            with open_parquet(file, path) as parquet:
                return _parquet_preview(parquet, compression)
        form, names, cells = _text_preview(storage, file, path, form)
        rows = tuple(itertools.islice(cells, PREVIEW_ROWS))
    return ListPreview(format=form, compression=compression, names=tuple(names), rows=rows)


def _parquet_preview(parquet: ParquetList, compression: str) -> ListPreview:
    images = tuple(field.name for field in parquet.schema if _holds_images(field, parquet))
    plain = [name for name in parquet.names if name not in images]
    return ListPreview(
        format="parquet",
        compression=compression,
        names=tuple(parquet.names),
        image_names=images,
        rows=tuple(
            {
                name: cell.decode(errors="replace") if isinstance(cell, bytes) else cell
                for name, cell in row.items()
            }
            for row in _parquet_rows(parquet, plain, PREVIEW_ROWS)
        ),
        num_rows=parquet.num_rows,
    )


def _parquet_rows(parquet: ParquetList, names: list[str], count: int) -> list[dict[str, Any]]:
    piece = next(parquet.pieces(names), None) if names else None
    if piece is None:
        return []
    piece = piece.slice(0, count)
    columns = [cells_of(piece, name, parquet.path, 1) for name in names]
    return [dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _holds_images(field: pa.Field, parquet: ParquetList) -> bool:
    """Tell whether a column is one of images: ``datasets`` has a struct of bytes and path, others the bytes alone."""
    if pa.types.is_struct(field.type):
        inner = {child.name: child.type for child in field.type}
        return "bytes" in inner and _is_binary(inner["bytes"])
    if not _is_binary(field.type):
        return False
    for row in _parquet_rows(parquet, [field.name], 1):
        try:
            (row[field.name] or b"").decode()
        except UnicodeDecodeError:  # a text may be binary too; the first bytes of an image are not UTF-8
            return True
    return False


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _text_preview(
    storage: Storage, file: BinaryIO, path: str, form: str
) -> tuple[str, list[str], Iterator[dict[str, Any]]]:
    """Return the format, which for a TSV its first line decides, the columns, and the rows."""
    content = text_of(file, path)
    if form == "jsonl":
        items = array_rows(content, path, ()) if is_array(content) else line_rows(Lines(content, path), ())
        rows = [row for _, _, row in itertools.islice(items, PREVIEW_ROWS)]
        return form, list(dict.fromkeys(name for row in rows for name in row)), iter(rows)
    if form == "txt":
        return form, *_plain_rows(storage, content, path)
    if form == "tsv" and content.peek(1).removeprefix(b"\xef\xbb\xbf")[:1] == b'"':
        form = "tsv-quoted"
    header, cells = header_and_rows(Lines(content, path), form)
    if other_separator(header) or any("://" in cell for cell in header):
        require_header(
            Wanted(url="url", caption="caption", columns=("url", "caption")),
            header,
            path,
            form,
            "," if form == "csv" else "\t",
        )
    # A row of another length is refused where the columns are read.
    return form, header, ({n: c or None for n, c in zip(header, row, strict=False)} for row in cells)


def _plain_rows(
    storage: Storage, content: io.BufferedReader, path: str
) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """Return the columns and rows of a plain list of URLs, and of the captions in the file beside it."""
    urls = [line.rstrip("\r\n") or None for line in itertools.islice(Lines(content, path), PREVIEW_ROWS)]
    beside = captions_beside(path, storage)
    if beside is None:
        return ["url"], ({"url": url} for url in urls)
    with storage.open(beside) as file:
        lines = list(itertools.islice(Lines(text_of(file, beside), beside), len(urls)))
    captions = (line.rstrip("\r\n") or None for line in lines)
    return ["url", "caption"], ({"url": u, "caption": c} for u, c in zip(urls, captions, strict=False))
