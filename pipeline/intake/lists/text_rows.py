"""Rows of text lists: CSV, TSV, JSON, and plain lists of URLs.

A CSV is quoted as RFC 4180 says; a TSV is not quoted at all (one line is one row, as in CC3M's and CC12M's
files) unless its format is ``tsv-quoted``. A plain list of URLs may have its captions in a file beside it, as
SBU's has.
"""

import codecs
import csv
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

from pipeline.intake.lists.columns import IF_QUOTED, Unit, Wanted, require, require_header
from pipeline.intake.lists.json_rows import Row, array_rows, is_array, line_rows
from pipeline.intake.lists.lines import MAX_ROW_BYTES, Lines, text_of
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.names import shown

# (number of the line or item, its size, the wanted cells)
Cells = tuple[int, int, Sequence[Any]]

# Of objects, one among so many has to have a column that is asked for.
_ROWS_LOOKED_AT = 65_536
_NAMES_KEPT = 20
_URLS, _CAPTIONS = "_urls.txt", "_captions.txt"
_PLAIN_HINT = (
    "; a plain list has URLs, and captions only in NAME_captions.txt beside NAME_urls.txt; "
    'without captions, set caption_column = ""'
)
_PLAIN_START = 4096


def text_rows(
    storage: Storage, file: BinaryIO, path: str, form: str, wanted: Wanted
) -> tuple[Unit, Iterator[Cells]]:
    """Return the wanted cells of a text list's rows, and what its rows are numbered by.

    The first row is not given out before the list is known to have all the columns.
    """
    content = text_of(file, path)
    match form:
        case "jsonl" if is_array(content):
            return "item", _json_cells(array_rows(content, path, wanted.columns), path, wanted)
        case "jsonl":
            return "line", _json_cells(line_rows(Lines(content, path), wanted.columns), path, wanted)
        case "txt":
            return "line", _plain_rows(content, path, storage, wanted)
        case _:
            return "line", _separated_rows(Lines(content, path), form, wanted)


def captions_beside(path: str, storage: Storage) -> str | None:
    """Return the file with the captions of a plain list of URLs: of NAME_urls.txt, NAME_captions.txt."""
    start, is_list, end = path.rpartition(_URLS)
    captions = f"{start}{_CAPTIONS}{end}"
    return captions if is_list and storage.exists(captions) else None


# -- CSV and TSV ---------------------------------------------------------------------------------------------


def _separated_rows(lines: Lines, form: str, wanted: Wanted) -> Iterator[Cells]:
    """Yield the wanted cells; an empty one is missing, since text formats have no other way to say so."""
    separator = "," if form == "csv" else "\t"
    header, rows = header_and_rows(lines, form)
    if not header:
        return
    require_header(wanted, header, lines.path, form, separator)
    places = [header.index(name) for name in wanted.columns]
    lines.end_row()
    before: list[str] = []
    for row in rows:
        if len(row) == len(header) + 1:
            _rejoin_data_url(row, places[0], separator)
        if len(row) != len(header):
            raise CapfiltError(_wrong_number(lines, (before, row), header, form))
        before = row
        yield lines.first_of_row, lines.row_bytes, [row[place] or None for place in places]
        lines.end_row()


def header_and_rows(lines: Lines, form: str) -> tuple[list[str], Iterator[list[str]]]:
    """Return the first row of a CSV or TSV, empty where there is none, and the rows below it."""
    rows = _tsv_rows(lines) if form == "tsv" else _quoted_rows(lines, "," if form == "csv" else "\t")
    return next(rows, []), rows


def _quoted_rows(lines: Lines, separator: str) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader(lines, delimiter=separator, strict=True)
    try:
        for row in reader:
            if row:
                yield row
            else:
                lines.end_row()
    except csv.Error as error:
        raise CapfiltError(f"{lines.place}: {error}") from error


def _tsv_rows(lines: Lines) -> Iterator[list[str]]:
    for line in lines:
        if stripped := line.rstrip("\r\n"):
            yield stripped.split("\t")
        else:
            lines.end_row()


def _rejoin_data_url(row: list[str], url: int, separator: str) -> None:
    """Put a ``data:`` URL together that was written without quotes: the one comma in it is not a separator."""
    if separator == "," and url + 1 < len(row) and row[url].startswith("data:") and "," not in row[url]:
        row[url : url + 2] = [f"{row[url]},{row[url + 1]}"]


def _wrong_number(lines: Lines, rows: tuple[list[str], list[str]], header: Sequence[str], form: str) -> str:
    """Say how many fields the second row has; the first, before it, may have begun the quotes that it ends."""
    before, row = rows
    fields = "1 field" if len(row) == 1 else f"{len(row):,} fields"
    message = f"{lines.place}: {fields}, the header has {len(header):,}"
    if form == "tsv" and any('"' in cell for cell in (*before, *row)):
        message += "; there are quotes: " + IF_QUOTED
    return message


# -- JSON ----------------------------------------------------------------------------------------------------


def _json_cells(rows: Iterable[Row], path: str, wanted: Wanted) -> Iterator[Cells]:
    """Hold the first rows back until each column was in one of them: objects leave out what they do not have."""
    missing = set(wanted.columns)
    names: dict[str, None] = {}
    held: list[Cells] = []
    held_bytes = 0
    for number, size, row in rows:
        cells = (number, size, [row.get(name) for name in wanted.columns])
        if not missing:
            yield cells
            continue
        missing -= row.keys()
        names.update(dict.fromkeys(itertools.islice(row, _NAMES_KEPT)))
        held.append(cells)
        held_bytes += size
        if not missing or len(held) == _ROWS_LOOKED_AT or held_bytes > MAX_ROW_BYTES:
            _require_in_any(wanted, missing, names, path)
            missing = set()
            yield from held
            held = []
    if held:
        _require_in_any(wanted, missing, names, path)
        yield from held


def _require_in_any(wanted: Wanted, missing: set[str], names: Iterable[str], path: str) -> None:
    require(wanted, [name for name in dict.fromkeys((*names, *wanted.columns)) if name not in missing], path)


# -- plain lists of URLs -------------------------------------------------------------------------------------


def _plain_rows(content: io.BufferedReader, path: str, storage: Storage, wanted: Wanted) -> Iterator[Cells]:
    """Yield a URL a line, and its caption where a file beside the list has them."""
    captions_path = captions_beside(path, storage)
    names = [wanted.url, wanted.caption] if captions_path and wanted.caption else [wanted.url]
    lines = _plain_urls(content, path, wanted.may_hold_paths)
    require(wanted, names, path, _PLAIN_HINT)
    urls = _cells_by_line(lines)
    if captions_path is None or wanted.caption not in wanted.columns:
        yield from ((number, size, (url,)) for number, size, url in urls)
        return
    with storage.open(captions_path) as captions_file:
        captions = _cells_by_line(Lines(text_of(captions_file, captions_path), captions_path))
        for url, caption in itertools.zip_longest(urls, captions):
            if url is None or caption is None:
                shorter = path if url is None else captions_path
                raise CapfiltError(f"{shorter}: has fewer lines than the file that belongs to it")
            by_name = {wanted.url: url[2], wanted.caption: caption[2]}
            yield url[0], url[1] + caption[1], [by_name[name] for name in wanted.columns]


def _plain_urls(content: io.BufferedReader, path: str, may_hold_paths: bool) -> Lines:
    """Return the lines of a list of URLs; reject a text that begins differently."""
    first = (
        content.peek(_PLAIN_START)[:_PLAIN_START].lstrip().partition(b"\n")[0].removeprefix(codecs.BOM_UTF8)
    )
    if first and (b"\t" in first or (b":" not in first and not may_hold_paths)):
        raise CapfiltError(
            f"{path}: {shown(first.decode(errors='replace'))!r} is not a URL; if the file has columns, set the "
            'source\'s format to "tsv" or "csv"; for paths of files set crawl.allow_files to their folder'
        )
    return Lines(content, path)


def _cells_by_line(lines: Lines) -> Iterator[tuple[int, int, str | None]]:
    for line in lines:
        yield lines.number, lines.row_bytes, line.rstrip("\r\n") or None
        lines.end_row()
