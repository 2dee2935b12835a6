"""Histograms with edges fixed by the code, so that those of 13,000 shards add up."""

from collections.abc import Sequence

import numpy as np

from schemas.records import Histogram

# Cosine similarities. CLIP ViT-L/14 puts web pairs between 0.05 and 0.4; a CLIP made for one small world goes
# up to 0.9.
SCORE_EDGES = tuple(round(0.005 * step, 3) for step in range(-40, 201))
LENGTH_EDGES = tuple(float(length) for length in range(65))


def histogram(values: Sequence[float] | np.ndarray, edges: tuple[float, ...]) -> Histogram:
    """Count values into bins; those outside go to the first or last bin."""
    inside = np.clip(np.asarray(values, np.float64), edges[0], edges[-1])
    counts, _ = np.histogram(inside, np.asarray(edges))
    return Histogram(edges=edges, counts=tuple(counts.tolist()))
