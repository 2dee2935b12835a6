"""The image-text pairs of one source, out of its lists: each URL once, with all its captions.

The lists are streamed three times (to identify the rows; where URLs repeat, to merge their captions; to give
out the new ones), so that memory holds 16 bytes a row and the captions of the rows that share a URL.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.fingerprint import sample_uid
from pipeline.identities import Grouping, KnownUids, Words, group_rows, pack_uids, unpack_uids
from pipeline.lists import Columns, read_columns
from pipeline.storage import Storage
from schemas.config import SourceConfig
from schemas.errors import CapfiltError
from schemas.tables import URLS

_KEY = "key"  # img2dataset's name for a sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Identified:
    """The rows that have a URL, by identity; ``rows_in`` counts those without one too."""

    words_N2: Words
    known_N: NDArray[np.bool_]
    rows_in: int


@dataclass(slots=True, kw_only=True)
class _Merged:
    """The rows of one uid: the URL they share, and their distinct captions in order."""

    url: str
    rows: int = 0
    captions: dict[str, None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Consecutive rows of a file, those without a URL left out; ``start`` numbers the first among all."""

    file: str
    start: int
    rows_in: int
    columns: Columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


class Pairs:
    """The pairs of a source's files, in order.

    Args:
        files: absolute paths or URLs of the lists; img2dataset's Parquet files where the source is of that
            format: their keys are kept.
    """

    def __init__(self, source: SourceConfig, storage: Storage, files: Sequence[str]) -> None:
        self.source = source
        self.storage = storage
        self.files = files
        self.adopts = source.format == "img2dataset"

    def check(self) -> None:
        """Read the beginning of the first list: wrong columns show before any work."""
        columns = {self.source.url_column, *self._identity_columns(), *self._payload_columns()}
        for _ in read_columns(self.storage, self.files[0], self._form(), sorted(columns)):
            return

    def identify(self, known: KnownUids) -> Identified:
        """Read every row's identity. Raises CapfiltError where no row has a URL."""
        words, flags, rows_in = [np.empty((0, 2), np.uint64)], [np.empty(0, bool)], 0
        for batch in self._batches(*self._identity_columns()):
            words_N2 = pack_uids(self._uids(batch))
            words.append(words_N2)
            flags.append(known.contains(words_N2))
            rows_in += batch.rows_in
        if not sum(map(len, words)):
            trouble = (
                f"no row has a URL in {self.source.url_column!r}" if rows_in else "the lists have no rows"
            )
            raise CapfiltError(f"source.{self.source.name}.input: {trouble} ({', '.join(self.files[:3])})")
        return Identified(words_N2=np.concatenate(words), known_N=np.concatenate(flags), rows_in=rows_in)

    def fresh(self, identified: Identified) -> Iterator[tuple[str, pa.Table]]:
        """Yield (file, new pairs) in order; columns of URLS, without shard, retry_of and a list's key."""
        grouping = group_rows(identified.words_N2, identified.known_N)
        merged = self._merge(grouping) if len(grouping.members) else {}
        columns = (*self._payload_columns(), *self._identity_columns())
        for batch in self._batches(*columns):
            end = batch.start + len(batch)
            wanted = np.flatnonzero(grouping.fresh[batch.start : end])
            if len(wanted):
                uids = unpack_uids(identified.words_N2[batch.start + wanted])
                yield batch.file, self._table(batch, wanted.tolist(), uids, merged)

    # -- reading ---------------------------------------------------------------------------------------------

    def _form(self) -> str:
        return "parquet" if self.adopts else self.source.format

    def _identity_columns(self) -> tuple[str, ...]:
        return (self.source.uid_column,) if self.source.uid_column else ()

    def _payload_columns(self) -> tuple[str, ...]:
        caption = (self.source.caption_column,) if self.source.caption_column else ()
        return (*caption, *self.source.extra_columns, *((_KEY,) if self.adopts else ()))

    def _batches(self, *columns: str) -> Iterator[_Batch]:
        url_column = self.source.url_column
        wanted = list(dict.fromkeys((url_column, *columns)))
        start = 0
        for file in self.files:
            for read in read_columns(self.storage, file, self._form(), wanted):
                urls = read[url_column]
                _require_text(urls, url_column, file)
                # Whether it is a good URL, the crawl finds out.
                kept = [row for row, url in enumerate(urls) if url and not url.isspace()]
                if len(kept) < len(urls):
                    read = {name: [cells[row] for row in kept] for name, cells in read.items()}
                yield _Batch(file=file, start=start, rows_in=len(urls), columns=read)
                start += len(kept)

    def _uids(self, batch: _Batch) -> Iterator[str]:
        name, column = self.source.name, self.source.uid_column
        if not column:
            return (sample_uid(name, url) for url in batch.columns[self.source.url_column])
        return (
            sample_uid(name, self._own_identity(value, url, batch.file))
            for value, url in zip(batch.columns[column], batch.columns[self.source.url_column], strict=True)
        )

    def _own_identity(self, value: Any, url: str, file: str) -> str:
        """Return a uid column's value as text: it is hashed as a URL would be."""
        if isinstance(value, str) and value:
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        raise CapfiltError(
            f"{file}: {self.source.uid_column} is {value!r} where {self.source.url_column} is {url}; "
            "an identity is text or a whole number, in every row"
        )

    # -- captions --------------------------------------------------------------------------------------------

    def _captions(self, batch: _Batch, rows: Sequence[int]) -> list[list[str]]:
        """Return the rows' distinct captions in order; a cell holds a text, a list of texts, or nothing."""
        column = self.source.caption_column
        if not column:
            return [[]] * len(rows)
        cells = [batch.columns[column][row] for row in rows]
        if list not in set(map(type, cells)):
            _require_text(cells, column, batch.file)
            return [[text] if text and not text.isspace() else [] for text in cells]
        lists = [cell if isinstance(cell, list) else [cell] for cell in cells]
        _require_text(itertools.chain.from_iterable(lists), column, batch.file)
        return [list(dict.fromkeys(text for text in texts if text and not text.isspace())) for texts in lists]

    def _merge(self, grouping: Grouping) -> dict[int, _Merged]:
        """Gather, under its first row's number, what the rows of a repeated uid say."""
        merged: dict[int, _Merged] = {}
        caption = (self.source.caption_column,) if self.source.caption_column else ()
        for batch in self._batches(*caption):
            first, last = np.searchsorted(grouping.members, (batch.start, batch.start + len(batch)))
            if first == last:
                continue
            rows = (grouping.members[first:last] - batch.start).tolist()
            heads, captions = grouping.heads[first:last].tolist(), self._captions(batch, rows)
            for row, head, texts in zip(rows, heads, captions, strict=True):
                url = batch.columns[self.source.url_column][row]
                entry = merged.setdefault(head, _Merged(url=url))
                if entry.url != url:
                    raise CapfiltError(
                        f"{batch.file}: two URLs share one {self.source.uid_column}: {entry.url} and {url}"
                    )
                entry.rows += 1
                entry.captions.update(dict.fromkeys(texts))
        return merged

    def _table(self, batch: _Batch, rows: list[int], uids: list[str], merged: dict[int, _Merged]) -> pa.Table:
        entries = [merged.get(batch.start + row) for row in rows] if merged else [None] * len(rows)
        columns: dict[str, list[Any]] = {
            "uid": uids,
            "source": [self.source.name] * len(rows),
            "url": [batch.columns[self.source.url_column][row] for row in rows],
            "captions": [
                texts if entry is None else list(entry.captions)
                for texts, entry in zip(self._captions(batch, rows), entries, strict=True)
            ],
            "input_rows": [1 if entry is None else entry.rows for entry in entries],
            "extra": [self._extra(batch, row) for row in rows],
        }
        if self.adopts:
            columns["key"] = [batch.columns[_KEY][row] for row in rows]
        return pa.table({name: pa.array(cells, URLS.field(name).type) for name, cells in columns.items()})

    def _extra(self, batch: _Batch, row: int) -> str | None:
        if not self.source.extra_columns:
            return None
        values = {name: batch.columns[name][row] for name in self.source.extra_columns}
        return json.dumps(_without_nan(values), ensure_ascii=False, default=str)


def _require_text(cells: Iterable[Any], column: str, file: str) -> None:
    """Refuse a column whose cells are neither text nor missing."""
    if strange := set(map(type, cells)) - {str, type(None)}:
        names = ", ".join(sorted(kind.__name__ for kind in strange))
        raise CapfiltError(f"{file}: {column} holds {names} where text is expected")


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinities, which JSON does not have, by null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
