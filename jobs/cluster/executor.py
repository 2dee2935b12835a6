"""The rows of a run driven through Ray Data, while a thread shows progress and keeps the manifest fresh."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import ray
from ray.data.exceptions import ExecutionTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.cluster.actors import build_dataset
from jobs.cluster.progress_actor import StageProgress, Tracker
from jobs.cluster.session import ray_session
from jobs.interrupts import Interrupts
from jobs.output.progress import Progress
from pipeline.manifest.manifest import Manifest
from pipeline.stages.plan import ModelDigests
from schemas.config import CapfiltConfig
from schemas.errors import CapfiltError
from schemas.records import Stage

StreamOutcome = Literal["done", "interrupted", "gave up"]

_POLL_S = 0.5
# Executions (not shards) that may break in a row, nothing committed between them.
_BROKEN_IN_A_ROW = 3
# Failed shards that a run bears: so many, and so large a share of what is finished.
_FAILED_SHARDS, _FAILED_SHARE = 20, 0.05

_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Streaming:
    """One run's way through Ray: ``drive`` does the rows."""

    config: CapfiltConfig
    stages: tuple[Stage, ...]
    models: ModelDigests
    run_id: str
    recompute: bool
    manifest: Manifest
    progress: Progress
    interrupts: Interrupts
    # Told at once, with the shards that are committed, when the run is asked to stop.
    note_interruption: Callable[[int], None]
    _states: dict[Stage, str] = field(default_factory=dict, init=False)
    _finished: int = field(default=0, init=False)
    _failed: int = field(default=0, init=False)
    _refused: bool = field(default=False, init=False)

    def drive(self, rows: list[dict[str, str]]) -> StreamOutcome:
        """Do the stages on every shard; return how it ended.

        An execution that breaks (a node went, and took actors or objects along) is started anew: what is
        committed is skipped. Raises CapfiltError that a worker raised: the run is wrong, not a shard.
        """
        self.progress.say("starting Ray, or joining it: some seconds")
        # Where Ray does not start, too: a table that is not closed leaves the terminal without its cursor.
        with contextlib.closing(self.progress), ray_session(self.config, self.stages, self.interrupts):
            # On the driver's node, so that no other node's death takes it along.
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
            tracker = Tracker.options(scheduling_strategy=here).remote()
            self.progress.say(f"Ray is up; the workers of {', '.join(self.stages)} start")
            stop = threading.Event()
            watcher = threading.Thread(target=self._watch, args=(stop, tracker), daemon=True)
            watcher.start()
            try:
                return self._pass_until_done(rows, tracker)
            except KeyboardInterrupt:
                self.note_interruption(self._committed(tracker))
                raise
            finally:
                stop.set()
                # A watcher that compacts is not waited for where the run is to stop.
                watcher.join(timeout=1 if self.interrupts.count else 30)

    def _pass_until_done(self, rows: list[dict[str, str]], tracker: ray.actor.ActorHandle) -> StreamOutcome:
        broken = 0
        while True:
            finished = self._finished
            dataset = build_dataset(
                rows, self.stages, self.config, self.models, self.run_id, self.recompute, tracker
            )
            try:
                for _ in dataset.iter_batches(batch_size=None, prefetch_batches=0):
                    if self._refused:
                        break
                    if self._failed > max(_FAILED_SHARDS, _FAILED_SHARE * self._finished):
                        return "gave up"  # a node, an install or a disk is at fault: do not fail the rest too
                if refusal := ray.get(tracker.refusal.remote()):
                    raise CapfiltError(refusal)
                return "done"
            except (ray.exceptions.RayError, ExecutionTimeoutError) as error:
                broken = 1 if self._finished > finished else broken + 1
                if broken == _BROKEN_IN_A_ROW:
                    raise
                _log.warning("the execution broke and is started anew: %s", error)

    def _look(self, tracker: ray.actor.ActorHandle, timeout_s: float) -> dict[Stage, StageProgress]:
        snapshot = ray.get(tracker.snapshot.remote(), timeout=timeout_s)
        self._finished = sum(stage.shards for stage in snapshot.values())
        self._failed = sum(len(stage.quarantined) for stage in snapshot.values())
        return snapshot

    def _committed(self, tracker: ray.actor.ActorHandle) -> int:
        """Return the shards that this run has committed, as far as can be told within a second."""
        with contextlib.suppress(ray.exceptions.RayError):
            self._look(tracker, timeout_s=1)
        return self._finished - self._failed

    def _say_states(self, snapshot: Mapping[Stage, StageProgress]) -> None:
        """Say what the first worker of a stage has come to since the last time."""
        states = {stage: snapshot[stage].state for stage in self.stages if stage in snapshot}
        news = [f"{stage} {state}" for stage, state in states.items() if state != self._states.get(stage, "")]
        if news:
            self.progress.say(", ".join(news))
        self._states = states

    def _watch(self, stop: threading.Event, tracker: ray.actor.ActorHandle) -> None:
        """Show progress and compact, whatever either of them meets, until told to stop."""
        compacted, interval_s = time.monotonic(), self.config.cluster.compact_interval_s
        last = False
        while not last:
            last = stop.wait(_POLL_S)
            # Where the tracker does not answer, it is being restarted, or Ray goes down.
            with contextlib.suppress(ray.exceptions.RayError):
                snapshot = self._look(tracker, timeout_s=10)
                self._say_states(snapshot)
                self._refused = bool(ray.get(tracker.refusal.remote(), timeout=10))
                self.progress.update(snapshot)
            if not last and time.monotonic() - compacted >= interval_s:
                start = time.monotonic()
                try:
                    self.manifest.compact()
                except Exception as error:
                    _log.warning("the manifest was not refreshed: %s", error)
                compacted = time.monotonic()
                # A large corpus takes a while to list: never spend more than a tenth of the time on it.
                interval_s = max(self.config.cluster.compact_interval_s, 10 * (compacted - start))
