"""How far a run is: the outcomes of shards, the sums over them that are displayed, and what is waited for.

For display alone: whether a shard is done is decided by its record.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Self, get_args

from pipeline.runs.admission import Admission, Permission
from pipeline.runs.events import ShardEvent
from pipeline.runs.limits import RunLimits
from pipeline.runs.metrics import RunMetrics, Series
from schemas.errors import CapfiltError, TryAgainLaterError
from schemas.records import ShardRecord
from schemas.stages import Stage

# In this order.
StageState = Literal["waiting for a shard", "loading weights", "at work"]
_STATES = ("", *get_args(StageState))
# A worker that waits says so at every pause and after every request; of one that died while it waited, nothing comes.
_FORGET_AFTER_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardOutcome:
    """What a runner did with one stage of one shard."""

    stage: Stage
    source: str
    shard: str
    # absent: the shard's source has no such stage. refused: a CapfiltError, which ends the run; later: one that says
    # that the same command may succeed later.
    state: Literal["done", "skipped", "stale", "waiting", "quarantined", "absent", "refused", "later"]
    error: str = ""
    # Of a shard that this run has committed; without what only SQL reads.
    record: ShardRecord | None = None
    # Calls of the storage since the worker's last outcome, by operation, and the worker's host.
    storage_calls: Mapping[str, int] = field(default_factory=dict)
    node: str = ""

    @classmethod
    def committed(cls, record: ShardRecord) -> Self:
        """Return the outcome of a stage that this run has committed."""
        return cls(
            stage=record.stage,
            source=record.source,
            shard=record.shard,
            state="done",
            record=replace(record, histograms={}, inputs={}, versions={}),
        )


@dataclass(slots=True)
class StageProgress:
    """Sums over the outcomes of one stage."""

    shards: int = 0
    images: int = 0
    rows_in: int = 0
    rows_out: int = 0
    quarantined: list[str] = field(default_factory=list)
    # What its first worker does: empty before it is up.
    state: StageState | Literal[""] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProgress:
    """The sums by stage, what workers wait for, and the CapfiltError that a worker met, if any did."""

    stages: dict[Stage, StageProgress] = field(default_factory=dict)
    refusal: CapfiltError | None = None
    # The storage's error that some worker waits for the end of.
    away: str = ""
    # No shard begins any more, and none is in work.
    is_stopped: bool = False
    # Which limit of the run is reached; empty where none is.
    limit: str = ""
    # Sums of pipeline.runs.metrics that have changed since the caller's last snapshot, which had this number.
    metrics: Mapping[Series, float] = field(default_factory=dict)
    number: int = 0
    # What happened that the caller has not had yet, and how many events there were before these.
    events: tuple[ShardEvent, ...] = ()
    events_before: int = 0

    @property
    def states(self) -> dict[Stage, str]:
        """Return what each stage's first worker does; empty before it is up."""
        return {stage: progress.state for stage, progress in self.stages.items()}

    @property
    def finished(self) -> int:
        """Return the shards, over all stages, that are committed or given up."""
        return sum(stage.shards for stage in self.stages.values())

    @property
    def failed(self) -> int:
        """Return the shards, over all stages, that are given up."""
        return sum(len(stage.quarantined) for stage in self.stages.values())


class ProgressCounter:
    """Adds up outcomes as the workers report them."""

    def __init__(self, limits: RunLimits | None = None) -> None:
        self._admission = Admission(limits or RunLimits())
        self._seen: set[tuple[str, str, str]] = set()
        self._stages: dict[Stage, StageProgress] = {}
        self._passed: dict[Stage, set[tuple[str, str]]] = {}
        self._refusal: CapfiltError | None = None
        self._away: dict[str, tuple[float, str]] = {}
        self._metrics = RunMetrics()
        self._events: list[ShardEvent] = []
        self._events_before = 0

    def ask_to_begin(self, stage: Stage, source: str, shard: str, worker: str = "") -> Permission:
        """Return whether a worker may begin a stage of a shard, which is in work then until its outcome is noted."""
        return self._admission.ask((stage, source, shard), worker, self._metrics.gpu_seconds)

    def stop(self) -> None:
        """Let no shard begin any more."""
        self._admission.stop()

    def log_event(self, event: ShardEvent) -> None:
        """Keep an event for the next snapshot, and count it."""
        self._metrics.add_event(event)
        self._events.append(event)

    def note(self, outcome: ShardOutcome) -> None:
        """Add an outcome; a shard that was done twice (a killed worker's retry) counts once."""
        if outcome.state in ("refused", "later"):
            kind = TryAgainLaterError if outcome.state == "later" else CapfiltError
            self._refusal = kind(outcome.error)
        self._passed.setdefault(outcome.stage, set()).add((outcome.source, outcome.shard))
        shard = (outcome.stage, outcome.source, outcome.shard)
        self._admission.end(shard, None if shard in self._seen else outcome.record)
        self._metrics.add_storage_calls((outcome.stage, outcome.source, outcome.node), outcome.storage_calls)
        if outcome.state not in ("done", "quarantined") or shard in self._seen:
            return
        self._seen.add(shard)
        stage = self._stages.setdefault(outcome.stage, StageProgress())
        stage.shards += 1
        if outcome.record is not None:
            stage.images += outcome.record.images
            stage.rows_in += outcome.record.rows_in
            stage.rows_out += outcome.record.rows_out
            self._metrics.add_record(outcome.record)
        if outcome.state == "quarantined":
            stage.quarantined.append(f"{outcome.source}/{outcome.shard}")

    def passed(self, stage: Stage) -> set[tuple[str, str]]:
        """Return the shards, by source and name, that a stage has handed on, whatever became of them."""
        return self._passed.get(stage, set())

    def report_state(self, stage: Stage, state: StageState) -> None:
        """Note what a worker of a stage does now; of several workers, the one that is furthest counts."""
        progress = self._stages.setdefault(stage, StageProgress())
        if _STATES.index(state) > _STATES.index(progress.state):
            progress.state = state

    def report_away(self, worker: str, error: str) -> None:
        """Note the error of a storage that a worker waits for; empty: it waits no longer."""
        if error:
            self._away[worker] = (time.monotonic(), error)
        else:
            self._away.pop(worker, None)

    def snapshot(self, after: int = 0, number: int = 0) -> RunProgress:
        """Return a copy of the sums so far, which another thread may read while they grow.

        Args:
            after: how many events the caller has had; they are forgotten.
            number: of the last snapshot that the caller has had.
        """
        had = after - self._events_before
        # A counter that was restarted has had fewer: then all of its own are new.
        if 0 < had <= len(self._events):
            del self._events[:had]
            self._events_before = after
        stages = {stage: replace(progress) for stage, progress in list(self._stages.items())}
        fresh_after = time.monotonic() - _FORGET_AFTER_S
        away = [error for at, error in list(self._away.values()) if at > fresh_after]
        return RunProgress(
            stages=stages,
            refusal=self._refusal,
            away=away[0] if away else "",
            is_stopped=self._admission.is_stopped,
            limit=self._admission.limit,
            metrics=self._metrics.sums(number),
            number=self._metrics.asked,
            events=tuple(self._events),
            events_before=self._events_before,
        )
