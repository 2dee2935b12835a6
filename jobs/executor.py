"""What the executors of a run share: their interface, and the monitor that displays progress while they work.

There are two: ``jobs.cluster.executor`` streams the shards through Ray, ``jobs.local`` runs them in this process.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from jobs.interrupts import Interrupts
from jobs.output.progress import Progress
from pipeline.faults import is_waited_for
from pipeline.manifest.manifest import Manifest
from pipeline.runs.limits import RunLimits
from pipeline.runs.plan import Kind
from pipeline.runs.progress import RunProgress
from pipeline.runs.runner import RunSettings
from pipeline.text import readable_duration
from schemas.records import ShardRecord
from schemas.stages import Stage

ExecutorOutcome = Literal["done", "interrupted", "gave up", "limit"]

_POLL_S = 0.5
# More failed shards than both this number and this share of the finished ones: a node, an install or a disk is at
# fault, and the rest of the shards would fail as well.
_MAX_FAILED, _MAX_FAILED_SHARE = 20, 0.05

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageJob:
    """What an executor is to do: some stages of some shards, each shard as its source's kind and its URLs."""

    settings: RunSettings
    stages: tuple[Stage, ...]
    shards: list[tuple[Kind, ShardRecord]]
    limits: RunLimits = field(default_factory=RunLimits)


@dataclass(slots=True, kw_only=True)
class RunMonitor:
    """Displays progress and keeps the manifest fresh while an executor works."""

    job: StageJob
    display: Progress
    manifest: Manifest
    interrupts: Interrupts
    # Called at once, with the number of committed shards, when the run is interrupted.
    note_interruption: Callable[[int], None]
    # What the thread saw last.
    progress: RunProgress = field(default_factory=RunProgress, init=False)
    _away_since: float | None = field(default=None, init=False)
    # Events that it has displayed: what it passes to ``ProgressCounter.snapshot``.
    num_events: int = field(default=0, init=False)

    @contextlib.contextmanager
    def watching(self, snapshot: Callable[[float], RunProgress | None]) -> Iterator[None]:
        """Watch while the block runs.

        Args:
            snapshot: returns the progress within so many seconds; None where it cannot be had now.
        """
        stop = threading.Event()
        thread = threading.Thread(target=self._watch, args=(stop, snapshot), daemon=True)
        thread.start()
        try:
            yield
        except KeyboardInterrupt:
            last = snapshot(1) or self.progress
            self.note_interruption(last.finished - last.failed)
            raise
        finally:
            stop.set()
            # A thread that compacts is not waited for where the run is to stop.
            thread.join(timeout=1 if self.interrupts.count else 30)

    @staticmethod
    def has_failed_too_often(progress: RunProgress) -> bool:
        """Tell whether so many shards failed that the run should end."""
        return progress.failed > max(_MAX_FAILED, _MAX_FAILED_SHARE * progress.finished)

    def _watch(self, stop: threading.Event, snapshot: Callable[[float], RunProgress | None]) -> None:
        compacted = time.monotonic()
        interval_s = least_interval_s = self.job.settings.config.cluster.compact_interval_s
        is_last = False
        while not is_last:
            is_last = stop.wait(_POLL_S)
            if (progress := snapshot(10)) is not None:
                self._show(progress)
            if not is_last and time.monotonic() - compacted >= interval_s:
                start = time.monotonic()
                self._compact()
                compacted = time.monotonic()
                # A large corpus takes a while to list: never spend more than a tenth of the time on it.
                interval_s = max(least_interval_s, 10 * (compacted - start))

    def _show(self, progress: RunProgress) -> None:
        """Display the progress, after the states that the stages have come to since the last time."""
        before, self.progress = self.progress, progress
        changed: dict[str, list[Stage]] = {}
        for stage in self.job.stages:
            state = progress.states.get(stage, "")
            if state != before.states.get(stage, ""):
                changed.setdefault(state, []).append(stage)
        if changed:
            self.display.log("; ".join(f"{', '.join(stages)}: {state}" for state, stages in changed.items()))
        for event in progress.events:
            self.display.event(event)
        self.num_events = progress.events_before + len(progress.events)
        self._show_away(progress.away)
        if progress.limit and not before.limit:
            self.display.log(f"{progress.limit}: no new shard begins, those in work are finished")
        self.display.update(progress.stages)

    def _show_away(self, error: str) -> None:
        """Say once that the storage is away, and once that it is back."""
        if error and self._away_since is None:
            self._away_since = time.monotonic()
            limit = readable_duration(self.job.settings.config.cluster.storage_patience_s)
            self.display.log(f"{error}. Waiting for it, up to {limit}; no shard is charged with it")
        elif not error and self._away_since is not None:
            away = readable_duration(time.monotonic() - self._away_since)
            self._away_since = None
            self.display.log(f"the storage answers again, after {away}")

    def _compact(self) -> None:
        try:
            self.manifest.compact()
        except Exception as error:
            # A storage that is away is what the workers wait for and tell of.
            if not is_waited_for(error):
                _log.warning("the manifest was not refreshed: %s", error)


# Runs the stages of a job on every shard, and returns how that ended. Raises CapfiltError that a worker raised: the run
# is at fault, not a shard.
Executor = Callable[[StageJob, RunMonitor], ExecutorOutcome]
