"""Exports a run's metrics through Ray, which serves them to Prometheus on each node, as ``ray_capfilt_...``.

The driver exports them, not the workers: a worker's series would end with it, and its sums be lost.
"""

from ray.util.metrics import Counter, Gauge

from pipeline.runs.metrics import LABELS, METRICS, STORAGE_AWAY, STORAGE_AWAY_DESCRIPTION, Series
from pipeline.runs.progress import RunProgress


class RayMetrics:
    """The metrics of one run on a corpus, as counters of Ray. Ray is up."""

    def __init__(self, corpus: str) -> None:
        self._corpus = corpus
        self._counters = {
            name: Counter(name, metric.description, ("corpus", *LABELS, *metric.labels))
            for name, metric in METRICS.items()
        }
        self._storage_away = Gauge(STORAGE_AWAY, STORAGE_AWAY_DESCRIPTION, ("corpus",))
        self._exported: dict[Series, float] = {}

    def export(self, progress: RunProgress) -> None:
        """Add to the counters by how much the sums have grown. A sum that is smaller began anew."""
        self._storage_away.set(1.0 if progress.away else 0.0, {"corpus": self._corpus})
        for series, value in progress.metrics.items():
            before = self._exported.get(series, 0.0)
            grown = value - before if value >= before else value
            self._exported[series] = value
            if grown > 0:
                name, values = series
                tags = dict(zip((*LABELS, *METRICS[name].labels), values, strict=True))
                self._counters[name].inc(grown, tags | {"corpus": self._corpus})
