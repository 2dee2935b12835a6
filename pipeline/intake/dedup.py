"""The image-text pairs of one source, out of its lists: each URL once, with all its captions.

The lists are streamed three times (to identify the rows; where URLs repeat, to merge their captions; to give
out the new ones), so that memory holds 16 bytes a row and the captions of the rows that share a URL.
"""

import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.corpus.fingerprint import PackedUids, pack_uids, sample_uid, unpack_uids
from pipeline.corpus.storage import Storage
from pipeline.intake.cells import TEXT_KINDS, column_texts, distinct_texts, finite_json
from pipeline.intake.lists.columns import Rows, Wanted
from pipeline.intake.lists.files import read_columns, require_columns
from pipeline.intake.uids import KnownUids, UidGroups, group_rows
from schemas.config import SourceConfig
from schemas.errors import CapfiltError
from schemas.names import shown
from schemas.tables import URLS

_READERS = 16
_KEY = "key"  # img2dataset's name for a sample
_SCHEME = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*:")


@dataclass(frozen=True, slots=True, kw_only=True)
class Identified:
    """The rows that have a URL, by identity; ``rows_in`` counts those without one too."""

    words_N2: PackedUids
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
    rows: Rows

    def __len__(self) -> int:
        return len(self.rows.numbers)

    def place(self, row: int) -> str:
        """Return where a row is, for an error message."""
        return f"{self.file}: {self.rows.place(row)}"


class SourcePairs:
    """The pairs of a source's files, in order.

    Args:
        files: absolute paths or URLs of the lists; img2dataset's Parquet files where the source is of that
            format: their keys are kept.
    """

    def __init__(self, source: SourceConfig, storage: Storage, files: Sequence[str]) -> None:
        self.source = source
        self.storage = storage
        self.files = files
        self.keeps_keys = source.format == "img2dataset"

    def check(self) -> None:
        """Look at the beginning of every list: what is not a list of URLs shows before any work."""
        wanted = self._wanted(*self._payload_columns(), *self._identity_columns())
        # Not Storage.map, which chooses its threads by the corpus's storage: lists may lie on another one.
        with ThreadPoolExecutor(_READERS) as readers:
            # In order, so that it is always the first faulty list that is named.
            for _ in readers.map(
                lambda file: require_columns(self.storage, file, self.source.format, wanted), self.files
            ):
                pass
        first = next(self._batches(*self._identity_columns()), None)
        if first is None:
            raise self._no_urls(0)
        self._require_urls(first)

    def identify(self, known: KnownUids) -> Identified:
        """Read every row's identity. Raises CapfiltError where no row has a URL."""
        words, flags, rows_in = [np.empty((0, 2), np.uint64)], [np.empty(0, bool)], 0
        for batch in self._batches(*self._identity_columns()):
            if batch.start == 0:
                self._require_urls(batch)
            words_N2 = pack_uids(self._uids(batch))
            words.append(words_N2)
            flags.append(known.contains(words_N2))
            rows_in += batch.rows_in
        if not sum(map(len, words)):
            raise self._no_urls(rows_in)
        return Identified(words_N2=np.concatenate(words), known_N=np.concatenate(flags), rows_in=rows_in)

    def new_pairs(self, identified: Identified) -> Iterator[tuple[str, pa.Table]]:
        """Yield (file, new pairs) in order; columns of URLS, without shard, retry_of and a list's key."""
        groups = group_rows(identified.words_N2, identified.known_N)
        merged = self._merge(groups) if len(groups.repeated_rows) else {}
        columns = (*self._payload_columns(), *self._identity_columns())
        for batch in self._batches(*columns):
            end = batch.start + len(batch)
            wanted = np.flatnonzero(groups.is_first_N[batch.start : end])
            if len(wanted):
                uids = unpack_uids(identified.words_N2[batch.start + wanted])
                yield batch.file, self._table(batch, wanted.tolist(), uids, merged)

    # -- reading ---------------------------------------------------------------------------------------------

    def _identity_columns(self) -> tuple[str, ...]:
        return (self.source.uid_column,) if self.source.uid_column else ()

    def _payload_columns(self) -> tuple[str, ...]:
        caption = (self.source.caption_column,) if self.source.caption_column else ()
        return (*caption, *self.source.extra_columns, *((_KEY,) if self.keeps_keys else ()))

    def _wanted(self, *columns: str) -> Wanted:
        url, caption = self.source.url_column, self.source.caption_column or None
        return Wanted(url=url, caption=caption, columns=tuple(dict.fromkeys((url, *columns))))

    def _batches(self, *columns: str) -> Iterator[_Batch]:
        url_column, wanted = self.source.url_column, self._wanted(*columns)
        start = 0
        for file in self.files:
            for rows in read_columns(self.storage, file, self.source.format, wanted):
                urls = rows.columns[url_column] = column_texts(rows, url_column, file)
                # Whether it is a good URL, the crawl finds out.
                kept = [row for row, url in enumerate(urls) if url and not url.isspace()]
                batch = rows if len(kept) == len(urls) else rows.take(kept)
                yield _Batch(file=file, start=start, rows_in=len(urls), rows=batch)
                start += len(kept)

    def _no_urls(self, rows: int) -> CapfiltError:
        reason = f"no row has a URL in {self.source.url_column!r}" if rows else "the lists have no rows"
        return CapfiltError(f"source.{self.source.name}.input: {reason} ({', '.join(self.files[:3])})")

    def _require_urls(self, batch: _Batch) -> None:
        """Reject lists whose URLs do not look like URLs: a header over the wrong columns would be kept for good."""
        urls = batch.rows.columns[self.source.url_column]
        if urls and not any(map(_SCHEME.match, urls)):
            raise CapfiltError(
                f"{batch.place(0)}: {self.source.url_column} is {shown(urls[0])!r}, which is not a URL, and no other "
                "one near it is; name the columns in the order that the list has them"
            )

    def _uids(self, batch: _Batch) -> Iterator[str]:
        name, column = self.source.name, self.source.uid_column
        if not column:
            return (sample_uid(name, url) for url in batch.rows.columns[self.source.url_column])
        return (
            sample_uid(name, self._uid_text(batch, row, value))
            for row, value in enumerate(batch.rows.columns[column])
        )

    def _uid_text(self, batch: _Batch, row: int, value: Any) -> str:
        """Return a uid column's value as text: it is hashed as a URL would be."""
        if isinstance(value, str) and value:
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        url = batch.rows.columns[self.source.url_column][row]
        raise CapfiltError(
            f"{batch.place(row)}: {self.source.uid_column} is {shown(value)} where {self.source.url_column} is "
            f"{shown(url)}; an identity is text or a whole number, in every row"
        )

    # -- captions --------------------------------------------------------------------------------------------

    def _captions(self, batch: _Batch, rows: Sequence[int]) -> list[list[str]]:
        """Return the rows' distinct captions in order; a cell holds a text, a list of texts, or nothing."""
        column = self.source.caption_column
        if not column:
            return [[]] * len(rows)
        cells = [batch.rows.columns[column][row] for row in rows]
        if set(map(type, cells)) <= TEXT_KINDS:
            return [[text] if text and not text.isspace() else [] for text in cells]
        return [
            distinct_texts(cell, batch.rows.unit, f"{batch.place(row)}: {column}")
            for row, cell in zip(rows, cells, strict=True)
        ]

    def _merge(self, groups: UidGroups) -> dict[int, _Merged]:
        """Gather, under its first row's number, what the rows of a repeated uid say."""
        merged: dict[int, _Merged] = {}
        caption = (self.source.caption_column,) if self.source.caption_column else ()
        for batch in self._batches(*caption):
            first, last = np.searchsorted(groups.repeated_rows, (batch.start, batch.start + len(batch)))
            if first == last:
                continue
            rows = (groups.repeated_rows[first:last] - batch.start).tolist()
            first_rows, captions = groups.first_rows[first:last].tolist(), self._captions(batch, rows)
            for row, first_row, texts in zip(rows, first_rows, captions, strict=True):
                url = batch.rows.columns[self.source.url_column][row]
                entry = merged.setdefault(first_row, _Merged(url=url))
                if entry.url != url:
                    raise CapfiltError(
                        f"{batch.place(row)}: two URLs share one {self.source.uid_column}: "
                        f"{shown(entry.url)} and {shown(url)}"
                    )
                entry.rows += 1
                entry.captions.update(dict.fromkeys(texts))
        return merged

    def _table(self, batch: _Batch, rows: list[int], uids: list[str], merged: dict[int, _Merged]) -> pa.Table:
        entries = [merged.get(batch.start + row) for row in rows] if merged else [None] * len(rows)
        columns: dict[str, list[Any]] = {
            "uid": uids,
            "source": [self.source.name] * len(rows),
            "url": [batch.rows.columns[self.source.url_column][row] for row in rows],
            "captions": [
                texts if entry is None else list(entry.captions)
                for texts, entry in zip(self._captions(batch, rows), entries, strict=True)
            ],
            "input_rows": [1 if entry is None else entry.rows for entry in entries],
            "extra": [self._extra(batch, row) for row in rows],
        }
        if self.keeps_keys:
            columns["key"] = [batch.rows.columns[_KEY][row] for row in rows]
        return pa.table({name: pa.array(cells, URLS.field(name).type) for name, cells in columns.items()})

    def _extra(self, batch: _Batch, row: int) -> str | None:
        if not self.source.extra_columns:
            return None
        values = {name: batch.rows.columns[name][row] for name in self.source.extra_columns}
        return json.dumps(finite_json(values), ensure_ascii=False, default=str)
