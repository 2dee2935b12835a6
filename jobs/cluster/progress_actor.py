"""What a run has done so far: workers tell a small actor, the driver asks it."""

from dataclasses import dataclass, field
from typing import Literal, Self, get_args

import ray

from schemas.records import ShardRecord, Stage

# In this order.
WorkerState = Literal["waiting for a shard", "loading weights", "at work"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one stage of one shard."""

    stage: Stage
    source: str
    shard: str
    state: Literal["done", "skipped", "stale", "waiting", "quarantined", "absent", "refused"]
    images: int = 0
    rows_in: int = 0
    rows_out: int = 0
    seconds: float = 0.0
    error: str = ""

    @classmethod
    def of(cls, state: str, stage: Stage, source: str, shard: str, record: ShardRecord | None) -> Self:
        """Describe a step that needed no work (``done`` before: skipped) or a shard just committed."""
        if record is None:
            return cls(stage=stage, source=source, shard=shard, state=state)
        return cls(
            stage=stage,
            source=source,
            shard=shard,
            state=state,
            images=record.images,
            rows_in=record.rows_in,
            rows_out=record.rows_out,
            seconds=record.seconds.get("total", 0.0),
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
    state: WorkerState | Literal[""] = ""


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Tracker:
    """Collects outcomes. A restarted one has forgotten: the records are the truth, this is for the eye."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, str, str]] = set()
        self._progress: dict[Stage, StageProgress] = {}
        self._refusal = ""

    def note(self, outcome: Outcome) -> None:
        """Take in an outcome; a shard done twice (a killed worker's retry) counts once."""
        if outcome.state == "refused":
            self._refusal = outcome.error
        shard = (outcome.stage, outcome.source, outcome.shard)
        if outcome.state not in ("done", "quarantined") or shard in self._seen:
            return
        self._seen.add(shard)
        stage = self._progress.setdefault(outcome.stage, StageProgress())
        stage.shards += 1
        stage.images += outcome.images
        stage.rows_in += outcome.rows_in
        stage.rows_out += outcome.rows_out
        if outcome.state == "quarantined":
            stage.quarantined.append(f"{outcome.source}/{outcome.shard}")

    def tell(self, stage: Stage, state: WorkerState) -> None:
        """Take in what a worker does now; the furthest of a stage counts."""
        progress = self._progress.setdefault(stage, StageProgress())
        states = ("", *get_args(WorkerState))
        if states.index(state) > states.index(progress.state):
            progress.state = state

    def refusal(self) -> str:
        """Return the CapfiltError that a worker met, if any did: the run's input is wrong, not a shard."""
        return self._refusal

    def snapshot(self) -> dict[Stage, StageProgress]:
        """Return the sums by stage."""
        return self._progress
