"""The image-text pairs of one source, out of its lists: each URL once, with all its captions.

The lists are read once, into a DuckDB in a scratch folder, which finds the rows of one URL and those that are known.
What does not fit in its memory lies in that folder.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.intake.lists.columns import (
    TEXT_KINDS,
    Rows,
    Wanted,
    distinct_texts,
    finite_json,
)
from pipeline.intake.lists.files import read_columns, read_texts, require_columns
from pipeline.intake.lists.text_columns import TextRows
from pipeline.intake.pictures.formats import PictureSource
from pipeline.intake.pictures.places import SCHEME
from pipeline.shards.uids import sample_uid, uid_prefix
from pipeline.storage.storage import Storage
from schemas.config import SourceConfig
from schemas.errors import CapfiltError, first_line
from schemas.names import shown
from schemas.tables import URLS

_READERS = 16
_KEY = "key"  # img2dataset's name for a sample


# A row of a list that has a URL. ``number`` counts them over all lists; ``place`` says where it stands, for messages.
_ROW = pa.schema(
    [
        ("number", pa.int64()),
        ("file", pa.int32()),
        ("place", pa.string()),
        ("uid", pa.string()),
        *(URLS.field(name) for name in ("url", "captions", "extra", "key")),
    ]
)
_FETCHED_ROWS = 16_384
# DuckDB's memory: what it begins with, more for each row, and at most. What does not fit lies in the scratch folder.
_LEAST_MB, _ROWS_PER_MB, _MOST_MB = 24, 24_000, 1024
_STEP_MB = 8
# To join and sort, which spill.
_STREAM_MB = 80
# Each thread wants its share of it.
_MB_PER_THREAD, _MOST_THREADS = 256, 4

# A list of texts alone: DuckDB hashes what ``sample_uid`` hashes.
_INSERT_TEXTS = """
    INSERT INTO stored BY NAME
        SELECT number, file, left(sha256($prefix || url), 32) AS uid, url, captions FROM batch"""
_GROUPS = """
    CREATE TABLE firsts AS
        SELECT uid, min(number) AS number, count(*)::INTEGER AS input_rows
        FROM listed ANTI JOIN known USING (uid) GROUP BY uid"""
# Each text where it stands first among the rows of its URL, in that order.
_MERGED = """
    CREATE TABLE merged AS
        SELECT number, list(text ORDER BY nth) AS captions FROM (
            SELECT number, text, min((row, nth)) AS nth FROM (
                SELECT first.number, listed.number AS row, unnest(captions) AS text,
                    generate_subscripts(captions, 1) AS nth
                FROM firsts AS first JOIN listed USING (uid) WHERE input_rows > 1)
            GROUP BY number, text)
        GROUP BY number"""
_CONFLICTS = """
    SELECT other.place, one.url, other.url FROM firsts
    JOIN listed AS one USING (number) JOIN listed AS other ON one.uid = other.uid AND one.url <> other.url
    ORDER BY other.number LIMIT 1"""
_PAIRS = """
    SELECT file, uid, $source AS source, url, coalesce(merged.captions, listed.captions, []) AS captions, input_rows,
        extra, key
    FROM firsts JOIN listed USING (number, uid) LEFT JOIN merged USING (number) ORDER BY """
# A uid is a digest: in its order, neighbours have nothing in common.
_ORDER_BY = {"list": "number", "shuffled": "uid"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Consecutive rows of a file, those without a URL left out; ``start`` numbers the first among all."""

    file: str
    start: int
    rows_in: int
    rows: Rows | TextRows

    def place(self, row: int) -> str:
        """Return where a row is, for an error message."""
        return f"{self.file}: {self.rows.place(row)}"


class SourcePairs:
    """The pairs of a source's files, in order.

    Args:
        files: absolute paths or URLs of the lists; img2dataset's Parquet files where the source is of that
            format: their keys are kept; of a source of pictures its ``lists``.
        pictures: of a source of pictures, what reads its ``files``.
        may_hold_paths: lists may name files instead of URLs.
        order: of the pairs that ``read`` yields. Pictures and imported shards keep their own.
    """

    def __init__(
        self,
        source: SourceConfig,
        storage: Storage,
        files: Sequence[str],
        *,
        pictures: PictureSource | None,
        may_hold_paths: bool,
        order: Literal["list", "shuffled"] = "list",
    ) -> None:
        self.source = source
        self.storage = storage
        self.files = files
        self.keeps_keys = source.format == "img2dataset"
        self._may_hold_paths = may_hold_paths
        self._order = "list" if self.keeps_keys or pictures else order
        self._pictures = pictures
        url, caption = source.url_column, source.caption_column or None
        key = _KEY if self.keeps_keys else None
        columns = (url, caption, *source.extra_columns, key, source.uid_column)
        self._wanted = Wanted(
            url=url,
            caption=caption,
            columns=tuple(dict.fromkeys(filter(None, columns))),
            may_hold_paths=may_hold_paths,
        )

    def check(self) -> None:
        """Look at the beginning of every list: what is not a list of URLs shows before any work."""
        source = self.source
        if self._pictures is not None:
            next(self._pictures.rows(self.files[0], self._wanted), None)
            return
        # Not Storage.map, which chooses its threads by the corpus's storage: lists may lie on another one.
        with ThreadPoolExecutor(_READERS) as readers:
            # In order, so that it is always the first faulty list that is named.
            for _ in readers.map(
                lambda file: require_columns(self.storage, file, source.format, self._wanted), self.files
            ):
                pass
        first = next(self._batches(), None)
        if first is None:
            raise self._no_urls(0)
        self._require_urls(first)

    @contextmanager
    def read(
        self, folder: Path, known: Sequence[str]
    ) -> Iterator[tuple[dict[str, int], Iterator[tuple[str, pa.Table]]]]:
        """Read the lists. Raises CapfiltError where no row has a URL, or two URLs have one identity.

        Args:
            folder: local, for what does not fit in memory.
            known: the Parquet files of the source's earlier url shards.

        Yields:
            What became of the rows: all numbers but ``rows_in`` sum up to it. And (file, new pairs), in order: columns
            of URLS, without shard, retry_of and a list's key. Shuffled pairs all come under the first file.
        """
        with duckdb.connect(
            config={"preserve_insertion_order": False, "temp_directory": str(folder)}
        ) as connection:
            tables = _Tables(connection)
            try:
                yield self._read(tables, known), self._new_pairs(tables)
            except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
                raise CapfiltError(
                    f"source.{self.source.name}.input: the lists do not fit in {folder.parent} ({first_line(error)}); "
                    "make room there, or set TMPDIR"
                ) from error

    def _read(self, tables: "_Tables", known: Sequence[str]) -> dict[str, int]:
        """Read the lists into tables; return what became of the rows."""
        unused = self._unused_columns()
        tables.execute("CREATE TABLE stored AS FROM batch", _ROW.empty_table().drop_columns(unused))
        nulls = "".join(f", NULL::VARCHAR AS {name}" for name in unused)
        tables.execute(f"CREATE VIEW listed AS SELECT *{nulls} FROM stored; CREATE TABLE known (uid VARCHAR)")
        for path in known:
            with self.storage.open(path) as file:
                tables.execute("INSERT INTO known FROM batch", pq.read_table(file, columns=["uid"]))
        rows_in = rows_with_url = 0
        for batch in self._batches():
            if batch.start == 0:
                self._require_urls(batch)
            if isinstance(batch.rows, TextRows):
                table = self._text_table(batch, batch.rows)
                tables.execute(_INSERT_TEXTS, table, prefix=uid_prefix(self.source.name))
            else:
                table = self._table(batch, batch.rows).drop_columns(unused)
                tables.execute("INSERT INTO stored BY NAME FROM batch", table)
            rows_in, rows_with_url = rows_in + batch.rows_in, rows_with_url + len(batch.rows)
        if not rows_with_url:
            raise self._no_urls(rows_in)
        tables.execute(_GROUPS)
        if self.source.uid_column and (conflict := tables.execute(_CONFLICTS).fetchone()):
            place, first, second = conflict
            raise CapfiltError(
                f"{place}: two URLs share one {self.source.uid_column}: {shown(first)} and {shown(second)}"
            )
        tables.execute(_MERGED)
        totals = "SELECT count(*), coalesce(sum(input_rows), 0)::BIGINT FROM firsts"
        [(new, rows_of_new)] = tables.execute(totals).fetchall()
        return {
            "rows_in": rows_in,
            "rows_new": new,
            "rows_duplicate": rows_of_new - new,
            "rows_known": rows_with_url - rows_of_new,
            "rows_without_url": rows_in - rows_with_url,
        }

    def _unused_columns(self) -> list[str]:
        """Return the columns of _ROW that no row of this source fills: an empty one takes blocks of memory too."""
        source = self.source
        used = {"place": source.uid_column, "extra": source.extra_columns, "key": self.keeps_keys}
        return [name for name, is_used in used.items() if not is_used]

    def _new_pairs(self, tables: "_Tables") -> Iterator[tuple[str, pa.Table]]:
        dropped = ["file"] if self.keeps_keys else ["file", "key"]
        for batch in tables.batches(_PAIRS + _ORDER_BY[self._order], source=self.source.name):
            table = pa.Table.from_batches([batch])
            if self._order == "shuffled":
                yield self.files[0], table.drop_columns(dropped)
                continue
            for number in table["file"].unique().to_pylist():
                rows = table.filter(pc.equal(table["file"], number)).drop_columns(dropped)
                yield self.files[number], rows

    # -- reading ---------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[_Batch]:
        start = 0
        for file in self.files:
            for rows in self._rows(file):
                kept: Rows | TextRows
                if isinstance(rows, TextRows):
                    kept = rows.with_urls()
                else:
                    kept = rows.with_urls(self.source.url_column, file)
                yield _Batch(file=file, start=start, rows_in=len(rows), rows=kept)
                start += len(kept)

    def _rows(self, file: str) -> Iterator[Rows] | Iterator[Rows | TextRows]:
        if self._pictures is not None:
            return self._pictures.rows(file, self._wanted)
        if (
            set(self._wanted.columns) <= {self._wanted.url, self._wanted.caption}
            and not self.source.uid_column
        ):
            return read_texts(self.storage, file, self.source.format, self._wanted)
        return read_columns(self.storage, file, self.source.format, self._wanted)

    def _no_urls(self, rows: int) -> CapfiltError:
        reason = f"no row has a URL in {self.source.url_column!r}" if rows else "the lists have no rows"
        return CapfiltError(f"source.{self.source.name}.input: {reason} ({', '.join(self.files[:3])})")

    def _require_urls(self, batch: _Batch) -> None:
        """Reject lists whose URLs do not look like URLs: a header over the wrong columns would be stored for ever."""
        rows = batch.rows
        urls = rows.urls.to_pylist() if isinstance(rows, TextRows) else rows.columns[self.source.url_column]
        if urls and not self._may_hold_paths and not any(map(SCHEME.match, urls)):
            raise CapfiltError(
                f"{batch.place(0)}: {self.source.url_column} is {shown(urls[0])!r}, which is not a URL, and no other "
                "one near it is; name the columns in the order that the list has them, or for paths of files set "
                "crawl.allow_files to their folder"
            )

    def _uids(self, batch: _Batch, rows: Rows) -> list[str]:
        identities = urls = rows.columns[self.source.url_column]
        if column := self.source.uid_column:
            cells = zip(rows.columns[column], urls, strict=True)
            identities = [
                self._uid_text(value, url, batch.place(row)) for row, (value, url) in enumerate(cells)
            ]
        return [sample_uid(self.source.name, identity) for identity in identities]

    def _uid_text(self, value: Any, url: str, place: str) -> str:
        """Return a uid column's value as text: it is hashed as a URL would be."""
        if isinstance(value, str) and value:
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        raise CapfiltError(
            f"{place}: {self.source.uid_column} is {shown(value)} where {self.source.url_column} is "
            f"{shown(url)}; an identity is text or a whole number, in every row"
        )

    # -- captions --------------------------------------------------------------------------------------------

    def _captions(self, batch: _Batch, rows: Rows) -> list[list[str]]:
        """Return the rows' distinct captions in order; a cell holds a text, a list of texts, or nothing."""
        column = self.source.caption_column
        if not column:
            return [[]] * len(rows)
        cells = rows.columns[column]
        if set(map(type, cells)) <= TEXT_KINDS:
            return [[text] if text and not text.isspace() else [] for text in cells]
        return [
            distinct_texts(cell, rows.unit, f"{batch.place(row)}: {column}") for row, cell in enumerate(cells)
        ]

    def _text_table(self, batch: _Batch, rows: TextRows) -> pa.Table:
        return pa.table(
            {
                "number": pa.array(range(batch.start, batch.start + len(rows)), pa.int64()),
                "file": pa.repeat(pa.scalar(self.files.index(batch.file), pa.int32()), len(rows)),
                "url": rows.urls,
                "captions": rows.caption_lists(),
            }
        )

    def _table(self, batch: _Batch, rows: Rows) -> pa.Table:
        numbers = range(len(rows))
        cells: dict[str, Any] = {
            "number": range(batch.start, batch.start + len(rows)),
            "file": [self.files.index(batch.file)] * len(rows),
            # Needed only where two URLs may share an identity.
            "place": [batch.place(row) if self.source.uid_column else None for row in numbers],
            "uid": self._uids(batch, rows),
            "url": rows.columns[self.source.url_column],
            "captions": self._captions(batch, rows),
            "extra": [self._extra(rows, row) for row in numbers],
            "key": rows.columns[_KEY] if self.keeps_keys else [None] * len(rows),
        }
        return pa.table([pa.array(cells[field.name], field.type) for field in _ROW], schema=_ROW)

    def _extra(self, rows: Rows, row: int) -> str | None:
        if not self.source.extra_columns:
            return None
        values = {name: rows.columns[name][row] for name in self.source.extra_columns}
        return json.dumps(finite_json(values), ensure_ascii=False, default=str)


class _Tables:
    """The tables of one reading, in a DuckDB whose memory grows with the rows and with what a statement needs."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection
        self._rows = 0
        self._take(_LEAST_MB)

    def execute(self, sql: str, batch: pa.Table | None = None, **values: str) -> duckdb.DuckDBPyConnection:
        """Execute a statement, of which ``batch`` is a table; again with more memory where it has too little."""
        if batch is not None:
            self._connection.register("batch", batch)
            # A known row is an identity alone.
            self._rows += batch.num_rows if batch.num_columns > 1 else batch.num_rows // 4
            # In steps: after each change of its limit DuckDB gives its free memory back to the system.
            if (needed := _LEAST_MB + self._rows // _ROWS_PER_MB) > self._megabytes:
                self._take(needed + _STEP_MB)
        while True:
            try:
                return self._connection.execute(sql, values)
            except duckdb.OutOfMemoryException:
                if self._megabytes == _MOST_MB:
                    raise
            self._take(2 * self._megabytes)

    def batches(self, sql: str, **values: str) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a query that says their order; where it has too little memory, go on with more."""
        self._take(max(self._megabytes, _STREAM_MB))
        rows = 0
        while True:
            try:
                query = self._connection.sql(f"{sql} OFFSET {rows}", params=values)
                for batch in query.to_arrow_reader(_FETCHED_ROWS):
                    rows += batch.num_rows
                    yield batch
            except duckdb.OutOfMemoryException:
                if self._megabytes == _MOST_MB:
                    raise
                self._take(2 * self._megabytes)
            else:
                return

    def _take(self, megabytes: int) -> None:
        self._megabytes = min(megabytes, _MOST_MB)
        threads = min(max(self._megabytes // _MB_PER_THREAD, 1), _MOST_THREADS)
        self._connection.execute(f"SET memory_limit = '{self._megabytes}MB'; SET threads = {threads}")
