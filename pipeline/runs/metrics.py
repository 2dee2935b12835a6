"""The metrics of a run: their names, and how outcomes and events add up to them. Prometheus's names and base units.

Sums over what the records say, so that at the end of a run both agree. ``jobs.cluster.executor`` exports them.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.runs.events import ShardEvent
from pipeline.storage.call_counts import RETRIES
from schemas.records import ShardRecord
from schemas.stages import STAGE_INFO, Stage


@dataclass(frozen=True, slots=True)
class Metric:
    """A sum that only grows: what it counts, and its labels beside ``LABELS``."""

    description: str
    labels: tuple[str, ...] = ()


# Of every metric, beside the corpus; ``node`` is the host's name.
LABELS = ("stage", "source", "node")

METRICS: dict[str, Metric] = {
    "capfilt_shards_total": Metric("shards, by outcome: committed or quarantined", ("outcome",)),
    "capfilt_images_total": Metric("images that the stage worked on, of committed shards"),
    "capfilt_rows_total": Metric(
        "rows of committed shards, by what they ended as; of crawl: URLs", ("status", "reason")
    ),
    "capfilt_written_bytes_total": Metric("bytes of the files of committed shards"),
    "capfilt_part_seconds_total": Metric("seconds of committed shards by part; parts overlap", ("part",)),
    "capfilt_worker_seconds_total": Metric(
        "seconds of workers, by what came of them: committed or lost", ("outcome",)
    ),
    "capfilt_gpu_seconds_total": Metric(
        "those seconds times the share of a GPU that the worker holds", ("outcome",)
    ),
    "capfilt_attempts_lost_total": Metric(
        "attempts that did not commit, by cause: failed or killed", ("cause",)
    ),
    "capfilt_storage_calls_total": Metric(
        "calls of the storage by workers, by operation (read, put, create, ...)", ("operation",)
    ),
    "capfilt_storage_retries_total": Metric(
        "calls that workers repeated, after a pause, because the storage was away"
    ),
}

# Beside these sums, of the corpus alone, while a run is up.
STORAGE_AWAY = "capfilt_storage_away"
STORAGE_AWAY_DESCRIPTION = "1 while workers wait for a storage that does not answer, else 0"

# A metric's name and the values of its labels.
Series = tuple[str, tuple[str, ...]]


class RunMetrics:
    """The sums of a run so far."""

    def __init__(self) -> None:
        self._sums: Counter[Series] = Counter()
        # How often the sums had been asked for when each of them changed last.
        self._changed_at: dict[Series, int] = {}
        self.asked = 0

    def add_record(self, record: ShardRecord) -> None:
        """Add a shard that was committed."""
        place = (record.stage, record.source, record.host)
        seconds = record.seconds.get("worker", 0.0)
        self._add("capfilt_shards_total", place, 1, "committed")
        self._add("capfilt_images_total", place, record.images)
        self._add("capfilt_written_bytes_total", place, sum(file.bytes for file in record.outputs.values()))
        self._add("capfilt_worker_seconds_total", place, seconds, "committed")
        self._add("capfilt_gpu_seconds_total", place, record.gpu_seconds, "committed")
        for part, part_seconds in record.seconds.items():
            if part not in ("total", "worker"):
                self._add("capfilt_part_seconds_total", place, part_seconds, part)
        for (status, reason), rows in rows_by_reason(record.stage, record.counts).items():
            self._add("capfilt_rows_total", place, rows, status, reason)

    def add_event(self, event: ShardEvent) -> None:
        """Add what no record of a shard says: lost attempts and quarantines."""
        place = (event.stage, event.source, event.node)
        if event.event == "quarantine":
            self._add("capfilt_shards_total", place, 1, "quarantined")
        if event.event == "lost":
            seconds = event.seconds or 0.0
            self._add("capfilt_attempts_lost_total", place, 1, event.cause)
            self._add("capfilt_worker_seconds_total", place, seconds, "lost")
            self._add("capfilt_gpu_seconds_total", place, seconds * event.gpus, "lost")

    def add_storage_calls(self, place: tuple[str, str, str], calls: Mapping[str, int]) -> None:
        """Add what a worker asked its storage."""
        for operation, number in calls.items():
            if operation == RETRIES:
                self._add("capfilt_storage_retries_total", place, number)
            else:
                self._add("capfilt_storage_calls_total", place, number, operation)

    def _add(self, name: str, place: tuple[str, ...], value: float, *labels: str) -> None:
        assert len(labels) == len(METRICS[name].labels)
        self._changed_at[name, (*place, *labels)] = self.asked
        self._sums[name, (*place, *labels)] += value  # type: ignore[assignment]  # mypy: a Counter of floats

    @property
    def gpu_seconds(self) -> float:
        """Return the seconds of GPUs that are spent, lost attempts included."""
        return sum(value for (name, _), value in self._sums.items() if name == "capfilt_gpu_seconds_total")

    def sums(self, after: int = 0) -> dict[Series, float]:
        """Return the sums that have changed since they were asked for so often: there may be some for each node."""
        # Those of a counter that was restarted have been asked for less often: then all of them are new.
        after = after if after <= self.asked else 0
        self.asked += 1
        return {series: self._sums[series] for series, at in self._changed_at.items() if at >= after}


def rows_by_reason(stage: Stage, counts: Mapping[str, int]) -> dict[tuple[str, str], int]:
    """Return a record's rows by status and reason; the reason is empty where there is none."""
    rows: dict[tuple[str, str], int] = {}
    for status in STAGE_INFO[stage].row_statuses:
        reasons = {
            name.partition("/")[2]: number for name, number in counts.items() if name.startswith(f"{status}/")
        }
        rows |= {(status, reason): number for reason, number in reasons.items()}
        # A count under the status alone includes those under its reasons.
        if rest := counts.get(status, 0) - sum(reasons.values()):
            rows[status, ""] = rest
    return rows
