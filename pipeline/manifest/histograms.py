"""The sums of the histograms of many records, as arrays: DuckDB would make gigabytes of 12,900 shards' 4 million bins.

A part holds the counts of a record as one list, and beside it the names and edges that they belong to; parts of earlier
versions, like the records, hold JSON.
"""

import functools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.catalog import HISTOGRAM_BINS, HISTOGRAM_COUNTS
from schemas.records import Histogram

# Which commit a row of the shards is of, and what is summed.
KEY_COLUMNS = ("stage", "source", "shard", "attempt")
SUM_COLUMNS = (*KEY_COLUMNS, "histograms", HISTOGRAM_BINS, HISTOGRAM_COUNTS)
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
    """Adds up the histograms of committed shards, each commit once, however many parts have its row.

    Args:
        committed: of each commit that counts, the columns of ``KEY_COLUMNS`` with ``/`` between them.
    """

    def __init__(self, committed: pa.Array) -> None:
        self._committed = committed
        self._is_counted = np.zeros(len(committed), bool)
        # By source, stage, name and edges, these as the JSON of a list without its brackets.
        self._counts: dict[tuple[str, str, str, str], np.ndarray] = {}

    def add(self, rows: pa.Table) -> None:
        """Add rows with ``SUM_COLUMNS``. Raises ValueError where counts do not fit their bins."""
        rows = rows.take(self._uncounted(rows))
        is_text = pc.and_(pc.is_null(rows[HISTOGRAM_COUNTS]), pc.is_valid(rows["histograms"]))
        texts = rows.filter(is_text).select(["source", "stage", "histograms"])
        for source, stage, text in zip(*(column.to_pylist() for column in texts.columns), strict=True):
            for name, counts, edges in _parts(text):
                self._add(source, stage, name, edges, np.fromstring(counts, np.int64, sep=","))
        self._add_lists(rows.filter(pc.is_valid(rows[HISTOGRAM_COUNTS])))

    def _uncounted(self, rows: pa.Table) -> np.ndarray:
        """Return the places of the rows that count, and note that they are counted."""
        keys = pc.binary_join_element_wise(*(rows[name] for name in KEY_COLUMNS), "/")
        places = pc.fill_null(pc.index_in(keys, value_set=self._committed), -1).to_numpy()
        commits, first_rows = np.unique(places, return_index=True)
        is_new = (commits >= 0) & ~self._is_counted[commits]
        self._is_counted[commits[is_new]] = True
        return first_rows[is_new]

    def _add_lists(self, rows: pa.Table) -> None:
        """Add rows whose counts are lists: those of one stage, source and kind of bins are the rows of a matrix."""
        group_by = ["source", "stage", HISTOGRAM_BINS]
        for group in rows.group_by(group_by).aggregate([]).to_pylist():
            is_member = functools.reduce(pc.and_, (pc.equal(rows[name], group[name]) for name in group_by))
            counts = rows[HISTOGRAM_COUNTS].filter(is_member)
            sums = pc.list_flatten(counts).to_numpy().reshape(len(counts), -1).sum(axis=0)
            start = 0
            for name, edges in json.loads(group[HISTOGRAM_BINS]).items():
                end = start + len(edges) - 1
                self._add(group["source"], group["stage"], name, json.dumps(edges)[1:-1], sums[start:end])
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


def _parts(text: str) -> list[tuple[str, str, str]]:
    """Return name, counts and edges of each histogram in a text."""
    parts = _HISTOGRAM.findall(text)
    if len(parts) < text.count('"edges"'):  # whoever wrote it has other spaces, or another order
        parts = _HISTOGRAM.findall(json.dumps(json.loads(text), sort_keys=True))
    return parts


def _bins(edges: str, sums: np.ndarray) -> Iterable[tuple[float, float, int]]:
    limits = json.loads(f"[{edges}]")
    return zip(limits, limits[1:], sums.tolist(), strict=False)
