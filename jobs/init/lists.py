"""A list of URLs, or of paths of images, as a source: its columns, and the folders that paths lie in."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from jobs.init.source_text import HUMAN, Key, SourceText
from pipeline.intake.guess_columns import GuessedColumns, guess_columns
from pipeline.intake.lists.preview import PREVIEW_ROWS, ListPreview
from pipeline.intake.recognise import RecognisedInput
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.names import printable, shown

_COLUMNS_NAMED = 12
_FORMAT_NAMES = {"jsonl": "JSON", "txt": "plain list", "tsv-quoted": "quoted TSV", "parquet": "Parquet"}


def describe_list(recognised: RecognisedInput, storage: Storage, base: Path, keys: list[Key]) -> SourceText:
    """Describe lists by the first of them.

    Raises:
        CapfiltError: no column holds URLs or paths of images, or no path names a file.
    """
    preview, first = recognised.preview, recognised.files[0]
    assert preview is not None
    shown_first = first if "://" in first else os.path.relpath(first, base)
    columns = guess_columns(preview)
    if columns is None:
        raise CapfiltError(
            f"{shown_first}: no column holds URLs or paths of images (it has {column_names(preview.names)})"
        )
    if preview.format == "tsv-quoted":
        keys.append(("format", "tsv-quoted", "its first line has quotes"))
    keys += [
        ("url_column", columns.url, "rows without one are counted and left out"),
        ("caption_column", columns.caption, 'a text or a list of texts; "": none'),
    ]
    hints = [HUMAN] if columns.caption else []
    if columns.others:
        hints.append(("extra_columns", columns.others, "carried along in samples.extra"))
    folders = _folders_of_paths(columns, preview, first, base) if columns.holds_paths else []
    allow: Key = ("allow_files", folders, "folders whose files a list may name")
    own: Key = ("allow_hosts", columns.own_hosts, "addresses of your own network")
    return SourceText(
        keys=tuple(keys),
        hints=tuple(hints),
        crawl=(allow,) if folders else (),
        crawl_hints=(own,) if columns.own_hosts else (),
        is_fetched=not folders,
        samples=_rows(recognised, preview),
        facts=(_facts_sentence(recognised, preview, shown_first),),
        guessed=tuple(_guesses(columns, preview, folders)),
    )


def _folders_of_paths(columns: GuessedColumns, preview: ListPreview, first: str, base: Path) -> list[str]:
    """Return the folder that the first rows' paths are relative to, or lie in; as the config has it.

    Raises CapfiltError where no row names a file that is there.
    """
    cells = [row[columns.url].strip() for row in preview.rows if isinstance(row.get(columns.url), str)]
    paths = [unquote(urlsplit(cell).path) if cell.lower().startswith("file:") else cell for cell in cells]
    absolute = [path for path in paths if path.startswith("/") and Path(path).is_file()]
    if absolute:
        return [os.path.commonpath([str(Path(path).parent) for path in absolute])]
    beside = [Path(first).parent] if "://" not in first else []
    for folder in dict.fromkeys([*beside, base, Path.cwd()]):
        if any((folder / path).is_file() for path in paths):
            return [os.path.relpath(folder, base) if folder.is_relative_to(base) else str(folder)]
    raise CapfiltError(
        f"{printable(first)}: {columns.url} has paths of images, such as {shown(paths[0])}, and none of them is there, "
        "relative to the list's folder or to this one; run init in the folder that they are relative to"
    )


def _rows(recognised: RecognisedInput, preview: ListPreview) -> int | None:
    """Return how many rows all files have; None where only reading them would tell."""
    if len(recognised.files) > 1:
        return None
    if preview.num_rows is not None:
        return preview.num_rows
    return len(preview.rows) if len(preview.rows) < PREVIEW_ROWS else None


def _facts_sentence(recognised: RecognisedInput, preview: ListPreview, first: str) -> str:
    packed = f", {preview.compression}" if preview.compression else ""
    form = f"{_FORMAT_NAMES.get(preview.format, preview.format.upper())}{packed}"
    rows = _rows(recognised, preview)
    files = f"{len(recognised.files):,} files, the first is " if len(recognised.files) > 1 else ""
    count = f"; {rows:,} rows" if rows is not None else ""
    return f"{files}{printable(first)}: {form}; columns {column_names(preview.names)}{count}"


def column_names(names: Sequence[str]) -> str:
    """Return the first columns' names for a sentence."""
    named = ", ".join(map(shown, names[:_COLUMNS_NAMED])) or "none"
    more = len(names) - _COLUMNS_NAMED
    return f"{named} and {more} more" if more > 0 else named


def _guesses(columns: GuessedColumns, preview: ListPreview, folders: Sequence[str]) -> Iterator[str]:
    kind = f"paths of images in {printable(folders[0])}" if folders else "URLs"
    yield f"{columns.url} has the {kind}, such as {_example(preview, columns.url)}"
    if columns.caption:
        yield f"{columns.caption} has the captions, such as {_example(preview, columns.caption)}"
    else:
        yield "no column has captions: the sampled ones compete alone"
    if columns.own_hosts:
        hosts = ", ".join(columns.own_hosts[:3])
        yield f"{hosts}: addresses of your own network are refused until [crawl] allow_hosts names them"


def _example(preview: ListPreview, name: str) -> str:
    return next((shown(row[name]) for row in preview.rows if row.get(name)), "nothing in the first rows")
