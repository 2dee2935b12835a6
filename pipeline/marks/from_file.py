"""Lists of what is to be marked: the uids or URLs of a Parquet, CSV, TSV, JSON or text file."""

from collections.abc import Iterator, Sequence

from pipeline.intake.guess_columns import guess_columns
from pipeline.intake.lists.columns import Wanted, column_texts
from pipeline.intake.lists.files import expand, opened_list, read_columns
from pipeline.intake.lists.lines import Lines, text_of
from pipeline.intake.lists.preview import preview_list
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.marks import is_value
from schemas.statuses import By


def read_values(path: str) -> tuple[By, tuple[str, ...]]:
    """Return what a list names its samples by, and its values, each once.

    A column ``uid`` counts first, then ``url``, then one that holds URLs; a text file has a value in each line.
    Raises CapfiltError where the list cannot be read or has neither.
    """
    storage = Storage(".")
    [file, *others] = expand(path, "--from") or [""]
    if not file or others:
        raise CapfiltError(f"--from {path}: name one file")
    preview = preview_list(storage, file)
    if preview.format == "txt":
        return _named_by(list(_lines(storage, file)))
    guessed = guess_columns(preview)
    column = next(
        (name for name in ("uid", "url") if name in preview.names), guessed.url if guessed else None
    )
    if column is None:
        raise CapfiltError(
            f"--from {path}: no column uid or url (it has {', '.join(preview.names[:20]) or 'none'})"
        )
    rows = read_columns(storage, file, preview.format, Wanted(url=column, columns=(column,)))
    cells = [
        cell.strip() for batch in rows for cell in column_texts(batch, column, file) if cell and cell.strip()
    ]
    return _named_by(cells)


def _lines(storage: Storage, path: str) -> Iterator[str]:
    """Yield the lines of a text file that are not blank."""
    with opened_list(storage, path) as file:
        yield from filter(None, map(str.strip, Lines(text_of(file, path), path)))


def _named_by(cells: Sequence[str]) -> tuple[By, tuple[str, ...]]:
    values = tuple(dict.fromkeys(cells))
    is_uids = bool(values) and all(is_value("uid", value) for value in values)
    return "uid" if is_uids else "url", values
