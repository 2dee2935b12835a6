"""The sum of the histograms of many records: of 12,900 shards 150 MB of JSON, of which DuckDB would make gigabytes.

Only the counts are parsed, as numbers in one array; edges are compared as texts.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

# One histogram, as the rows of the records have it: JSON with sorted keys.
_HISTOGRAM = re.compile(r'"(\w+)": \{"counts": \[([^]]*)\], "edges": \[([^]]*)\]\}')


def sum_histograms(records: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return the sums by stage and name, a row for each bin that counts anything, in order of all its columns.

    Args:
        records: the stage of each record, and its histograms as text.
    """
    counts: dict[tuple[str, str, str], np.ndarray] = {}
    for stage, text in records:
        for name, numbers, edges in _parts(text):
            values = np.fromstring(numbers, np.int64, sep=",")
            counts[stage, name, edges] = counts.get((stage, name, edges), 0) + values
    rows = [
        {"stage": stage, "name": name, "low": low, "high": high, "count": count}
        for (stage, name, edges), sums in counts.items()
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
