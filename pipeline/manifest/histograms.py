"""The sums of the histograms of many records, as arrays: DuckDB would make gigabytes of 12,900 shards' 4 million bins.

A part holds the counts of a record as one list, and beside it the names and edges that they belong to; parts of earlier
versions, like the records, hold JSON.
"""

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.catalog.table_schemas import HISTOGRAM_BINS, HISTOGRAM_COUNTS
from schemas.records import Histogram

SUM_COLUMNS = ("source", "stage", "histograms", HISTOGRAM_BINS, HISTOGRAM_COUNTS)
# One histogram, as the rows of the records have it: JSON with sorted keys.
_HISTOGRAM = re.compile(r'"(\w+)": \{"counts": \[([^]]*)\], "edges": \[([^]]*)\]\}')


def histogram_cells(histograms: Mapping[str, Histogram]) -> dict[str, Any]:
    """Return the cells of a part that hold a record's histograms: all counts in order of names, and the bins' edges."""
    ordered = sorted(histograms.items())
    bins = _bins_text(tuple((name, histogram.edges) for name, histogram in ordered))
    counts = [count for _, histogram in ordered for count in histogram.counts]
    return {HISTOGRAM_BINS: bins, HISTOGRAM_COUNTS: counts}


@functools.lru_cache(maxsize=256)
def _bins_text(edges_by_name: tuple[tuple[str, tuple[float, ...]], ...]) -> str:
    """Return names and edges as JSON; a stage's records share them."""
    return json.dumps(dict(edges_by_name))


class HistogramSums:
    """Adds up the histograms of shards."""

    def __init__(self) -> None:
        # By source, stage, name and edges, these as the JSON of a list without its brackets.
        self._counts: dict[tuple[str, str, str, str], np.ndarray] = {}

    def add(self, rows: pa.Table) -> None:
        """Add rows with ``SUM_COLUMNS``. Raises ValueError where counts do not fit their bins."""
        is_text = pc.and_(pc.is_null(rows[HISTOGRAM_COUNTS]), pc.is_valid(rows["histograms"]))
        texts = rows.filter(is_text).select(["source", "stage", "histograms"])
        for source, stage, text in zip(*(column.to_pylist() for column in texts.columns), strict=True):
            for name, counts, edges in _parts(text):
                self._add(source, stage, name, edges, np.fromstring(counts, np.int64, sep=","))
        if rows[HISTOGRAM_COUNTS].null_count:
            rows = rows.filter(pc.is_valid(rows[HISTOGRAM_COUNTS]))
        self._add_lists(rows)

    def _add_lists(self, rows: pa.Table) -> None:
        """Add rows whose counts are lists: those of one stage, source and kind of bins are the rows of a matrix."""
        for source, stage, bins, counts in _lists_by_kind(rows):
            sums = pc.list_flatten(counts).to_numpy().reshape(len(counts), -1).sum(axis=0)
            start = 0
            for name, edges in json.loads(bins).items():
                end = start + len(edges) - 1
                self._add(source, stage, name, json.dumps(edges)[1:-1], sums[start:end])
                start = end

    def _add(self, source: str, stage: str, name: str, edges: str, counts: np.ndarray) -> None:
        key = (source, stage, name, edges)
        self._counts[key] = self._counts.get(key, 0) + counts

    def rows(self) -> list[dict[str, Any]]:
        """Return the sums by source, stage and name, a row for each bin that counts anything, ordered by all."""
        rows = [
            {"source": source, "stage": stage, "name": name, "low": low, "high": high, "count": count}
            for (source, stage, name, edges), sums in self._counts.items()
            for low, high, count in _bins(edges, sums)
            if count
        ]
        return sorted(rows, key=lambda row: tuple(row.values()))


def _lists_by_kind(rows: pa.Table) -> Iterator[tuple[str, str, str, pa.ChunkedArray]]:
    """Yield source, stage, bins and lists of counts of the rows that share the first three."""
    kind = ("source", "stage", HISTOGRAM_BINS)
    values = [rows[name].unique() for name in kind]
    if all(len(distinct) == 1 for distinct in values):
        # Most batches of a part, whose rows are in the order of their records' names: a group_by takes longer.
        source, stage, bins = (distinct[0].as_py() for distinct in values)
        yield source, stage, bins, rows[HISTOGRAM_COUNTS]
        return
    for group in rows.group_by(list(kind), use_threads=False).aggregate([]).to_pylist():
        is_member = functools.reduce(pc.and_, (pc.equal(rows[name], group[name]) for name in kind))
        yield *group.values(), rows[HISTOGRAM_COUNTS].filter(is_member)


def _parts(text: str) -> list[tuple[str, str, str]]:
    """Return name, counts and edges of each histogram in a text."""
    parts = _HISTOGRAM.findall(text)
    if len(parts) < text.count('"edges"'):  # whoever wrote it has other spaces, or another order
        parts = _HISTOGRAM.findall(json.dumps(json.loads(text), sort_keys=True))
    return parts


def _bins(edges: str, sums: np.ndarray) -> Iterable[tuple[float, float, int]]:
    limits = json.loads(f"[{edges}]")
    return zip(limits, limits[1:], sums.tolist(), strict=False)
