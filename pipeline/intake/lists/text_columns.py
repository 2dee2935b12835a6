"""URLs and captions of Parquet lists as Arrow has them: most lists hold plain texts, which need not become objects."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.intake.lists.columns import Unit, Wanted
from pipeline.intake.lists.lines import MAX_ROW_BYTES
from pipeline.intake.lists.parquet_rows import decoded_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRows:
    """Consecutive rows of a list whose URLs and captions are all text or missing.

    ``numbers`` says where each row is, for error messages, as in ``Rows``.
    """

    urls: pa.StringArray
    captions: pa.StringArray | None
    numbers: Sequence[int]
    unit: Unit = "row"

    def __len__(self) -> int:
        return len(self.numbers)

    def place(self, row: int) -> str:
        """Return where a row is in its file."""
        return f"{self.unit} {self.numbers[row]:,}"

    def with_urls(self) -> "TextRows":
        """Return the rows that have a URL. Whether it is a good one, the crawl finds out."""
        kept = not_blank(self.urls)
        if kept.all():
            return self
        mask = pa.array(kept)
        numbers = [number for number, has_url in zip(self.numbers, kept, strict=True) if has_url]
        captions = None if self.captions is None else self.captions.filter(mask)
        return TextRows(urls=self.urls.filter(mask), captions=captions, numbers=numbers)

    def caption_lists(self) -> pa.ListArray:
        """Return each row's captions: one, or none where it is missing or blank."""
        texts = self.captions
        if texts is None:
            texts = pa.nulls(len(self.urls), pa.string())
        kept = not_blank(texts)
        offsets = np.concatenate([[0], np.cumsum(kept)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), texts.filter(pa.array(kept)))


def text_rows(pieces: Sequence[pa.RecordBatch], wanted: Wanted, first: int) -> TextRows | None:
    """Return consecutive pieces of a file as rows of texts; None where a cell wants a closer look.

    That is one of another type, one that is not UTF-8, or a piece with more bytes than one row may have.
    """
    urls = _texts(pieces, wanted.url)
    captions = _texts(pieces, wanted.caption) if wanted.caption else None
    if urls is None or (wanted.caption and captions is None):
        return None
    return TextRows(urls=urls, captions=captions, numbers=range(first, first + len(urls)))


def _texts(pieces: Sequence[pa.RecordBatch], name: str) -> pa.StringArray | None:
    columns = [piece.column(name) for piece in pieces]
    if any(not _is_text(column.type) or decoded_bytes(column) > MAX_ROW_BYTES for column in columns):
        return None
    texts = pa.concat_arrays([column.cast(pa.string()) for column in columns])
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        return None
    return texts


def _is_text(dtype: pa.DataType) -> bool:
    inner = dtype.value_type if pa.types.is_dictionary(dtype) else dtype
    return pa.types.is_string(inner) or pa.types.is_large_string(inner)


def not_blank(texts: pa.StringArray) -> np.ndarray:
    """Tell of each text whether there is one: neither missing nor blank, as ``str.isspace`` has it."""
    is_blank = pc.or_(pc.equal(texts, ""), pc.utf8_is_space(texts))
    return np.asarray(pc.invert(pc.fill_null(is_blank, True)).to_numpy(zero_copy_only=False))
