"""Runs one stage on one shard: skips what is committed, retries what fails, quarantines what keeps failing.

Knows nothing of Ray: an actor of a cluster and the local executor call the same ``ShardRunner``.
"""

import contextlib
import socket
import time
import traceback
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Condition, Lock
from typing import Any

from pipeline.corpus.lost_attempts import RunAttempts
from pipeline.corpus.records import Records
from pipeline.corpus.worker_time import WORKER_TIME
from pipeline.faults import fault_of
from pipeline.marks.rules import ShardMarks
from pipeline.runs.events import EventName, ShardEvent
from pipeline.runs.plan import Kind, ModelDigests, next_step, stages_of, upstream_of
from pipeline.runs.progress import ShardOutcome, StageState
from pipeline.storage.call_counts import CALLS
from pipeline.storage.patience import PAUSES_S, Patience
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig
from schemas.errors import CapfiltError, CorruptShardError, DeviceLostError, NotFiniteError, first_line
from schemas.json_record import utc_now
from schemas.records import NO_SHARE, LostAttemptRecord, QuarantineRecord, ShardRecord, ShardTask, WorkerShare
from schemas.stages import Stage

Worker = Callable[[ShardTask], ShardRecord]
LoadWorker = Callable[[Stage, CapfiltConfig, Records], Worker]

# Between the tries of a shard that failed; the last one stays.
_RETRY_PAUSES_S = (2.0, 15.0, 60.0)
# Ray notices within some 20 seconds that a node is gone, and at once that a worker is: of a node that is going, the
# workers often die first.
_NODE_NOTICED_S = 30.0
_MAX_ERROR_CHARACTERS = 4000
_DIED = "the worker died on every attempt"


def load_worker(stage: Stage, config: CapfiltConfig, records: Records) -> Worker:
    """Return the worker of a stage, its weights loaded. Imports only what the stage needs."""
    match stage:
        case "crawl":
            from pipeline.stages.crawl import CrawlWorker

            return CrawlWorker(config, records)
        case "caption":
            from pipeline.stages.caption import CaptionWorker

            return CaptionWorker(config, records)
        case "rank":
            from pipeline.stages.rank import RankWorker

            return RankWorker(config, records)
        case "filter":
            from pipeline.stages.filter import FilterWorker

            return FilterWorker(config, records)
        case "select":
            from pipeline.stages.selection import SelectWorker

            return SelectWorker(config, records)
    raise AssertionError(stage)


class RWLock:
    """A readers-writer lock: many threads may hold it shared, or one exclusively. A waiting writer goes first."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._readers = 0
        self._waiting_writers = 0

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the lock beside other readers, once no writer holds it or waits for it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting_writers)
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock alone, once all other holders have released it."""
        # The condition's own lock is held for the whole block, so that neither a reader nor another writer begins.
        with self._changed:
            self._waiting_writers += 1
            self._changed.wait_for(lambda: not self._readers)
            self._waiting_writers -= 1
            try:
                yield
            finally:
                self._changed.notify_all()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What all runners of a run share.

    ``models`` are the digests of the weights that the fingerprints name: a worker that loads others is refused.
    ``recompute``: replace stale shards. ``marks``: those that concern samples of a shard, by source and shard.
    ``retried``: the shards of which later ones may try URLs again. ``load`` makes the stages' workers;
    it is called again after a failed attempt, for fresh weights and device memory.
    """

    config: CapfiltConfig
    models: ModelDigests
    run_id: str
    recompute: bool = False
    marks: ShardMarks = field(default_factory=dict)
    retried: frozenset[tuple[str, str]] = frozenset()
    load: LoadWorker = load_worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Where a runner is: a name that no other node ever has, and which of some nodes are gone."""

    name: str = ""
    gone: Callable[[Collection[str]], Collection[str]] = lambda names: ()
    noticed_s: float = _NODE_NOTICED_S


class ShardRunner:
    """Runs one stage on the shards that it is given, from one thread or several.

    A shard is tried up to ``cluster.max_attempts`` times in a run, attempts of workers that were killed included,
    so that a shard that kills its worker ends in quarantine too. What the storage or a node is at fault for
    (``pipeline.faults``) is waited for and counts as no attempt, nor does one whose whole node is gone. The first
    attempt runs beside other shards, a retry runs alone: after a crash, shards that ran beside the failing one lose
    at most one attempt.

    Args:
        note: receives the outcome of each shard.
        report_state: receives what the worker is doing.
        log_event: receives what happens to the shards, when it happens.
        share: what the worker holds of its node.
        report_away: receives this runner's id with the error of a storage that it waits for, and without it when that
            is over.
        is_stopping: asked while the storage is waited for.
        node: where this is.
        pauses_s: between the tries of a storage that is away.
        retry_pauses_s: between the tries of a shard that failed.
    """

    def __init__(
        self,
        stage: Stage,
        settings: RunSettings,
        *,
        note: Callable[[ShardOutcome], object],
        report_state: Callable[[Stage, StageState], object],
        log_event: Callable[[ShardEvent], object] = lambda event: None,
        share: WorkerShare = NO_SHARE,
        report_away: Callable[[str, str], object] = lambda runner, error: None,
        is_stopping: Callable[[], bool] = lambda: False,
        node: Node = Node(),
        pauses_s: Sequence[float] = PAUSES_S,
        retry_pauses_s: Sequence[float] = _RETRY_PAUSES_S,
    ) -> None:
        self.stage = stage
        self.settings = settings
        tell = partial(report_away, uuid.uuid4().hex)
        self._patience = Patience(settings.config.cluster.storage_patience_s, tell, is_stopping, pauses_s)
        self.records = Records(Storage(settings.config.corpus.path, self._patience))
        self._note = note
        self._report_state = report_state
        self._log_event = log_event
        self._share = share
        self._load = settings.load
        self._node = node
        self._retry_pauses_s = retry_pauses_s
        self._worker: Any = None
        self._loading = Lock()
        self._lock = RWLock()
        report_state(stage, "waiting for a shard")

    def run_shard(self, kind: Kind, urls: ShardRecord) -> None:
        """Do the stage of the shard if it is to be done, and note the outcome.

        Args:
            urls: the record of the shard's URLs.

        Raises CapfiltError where the run is at fault, not the shard, TryAgainLaterError where the storage was away for
        too long, and DeviceLostError where another process has to go on.
        """
        outcome = self._patience.call(partial(self._run_if_needed, kind, urls))
        self._note(replace(outcome, storage_calls=CALLS.take(), node=socket.gethostname()))

    def _run_if_needed(self, kind: Kind, urls: ShardRecord) -> ShardOutcome:
        run = self.settings
        if self.stage not in stages_of(run.config, kind):
            return self._outcome(urls, "absent")
        source, shard = urls.source, urls.shard
        upstream: dict[Stage, ShardRecord] = {"urls": urls}
        for name in upstream_of(run.config, self.stage, kind):
            if name != "urls" and (record := self.records.read(name, source, shard)) is not None:
                upstream[name] = record
        committed = self.records.read(self.stage, source, shard)
        step = next_step(
            run.config,
            run.models,
            self.stage,
            kind,
            upstream,
            committed,
            run.run_id,
            run.marks.get((source, shard), ()),
        )
        if step.task is None or (step.state == "stale" and not run.recompute):
            return self._outcome(urls, "skipped" if step.state == "done" else step.state)
        return self._run_task(
            replace(step.task, has_retries=(source, shard) in run.retried, share=self._share)
        )

    def _outcome(self, shard: ShardRecord | ShardTask, state: Any, error: str = "") -> ShardOutcome:
        return ShardOutcome(
            stage=self.stage, source=shard.source, shard=shard.shard, state=state, error=error
        )

    def _run_task(self, task: ShardTask) -> ShardOutcome:
        """Try until the shard is committed, its attempts are used up, or this process cannot go on."""
        error = ""
        is_retry = False
        failed: set[int] = set()
        while True:
            device_error = ""
            with self._lock.exclusive() if is_retry else self._lock.shared():
                begun, is_used_up = self._begin_attempt(task, failed, is_retry=is_retry)
                if is_used_up:
                    # None of this process: the last one of another.
                    error = error or self._attempts(task).last_error(begun) or _DIED
                    break
                try:
                    if begun:
                        record = self._attempt(task, is_retry)
                        self._end_attempts(task, begun)
                        self._log(task, "commit", begun, seconds=record.seconds.get("worker"))
                        return ShardOutcome.committed(record)
                except Exception as failure:
                    fault = fault_of(failure)
                    if fault == "run":
                        raise
                    device_error = first_line(failure) if fault == "device" else ""
                    if isinstance(failure, CorruptShardError | NotFiniteError):
                        error = str(failure)
                        self._keep_failed(task, begun, error)
                        break  # another try reads the same bytes, and computes the same
                    error = "".join(traceback.format_exception(failure, limit=-4)).strip()
                    self._keep_failed(task, begun, error)
                    failed.add(begun)
            if begun:
                # The next attempt loads fresh weights into fresh device memory, once no thread uses the old ones.
                with self._lock.exclusive():
                    self._worker = None
                if device_error:
                    raise DeviceLostError(
                        f"{task.stage} {task.source}/{task.shard}: {device_error}. This process cannot use its device "
                        "any more; the same command goes on with a new one"
                    )
                if begun < task.max_attempts:
                    time.sleep(self._retry_pauses_s[min(len(failed), len(self._retry_pauses_s)) - 1])
            is_retry = True
        return self._give_up(task, min(begun, task.max_attempts), error)

    def _begin_attempt(self, task: ShardTask, failed: Set[int], *, is_retry: bool) -> tuple[int, bool]:
        """Note that an attempt begins, and which ones before it were killed.

        Returns its number, as ``RunAttempts.begin`` does, and whether the shard's attempts were used up before it.
        """
        attempts = self._attempts(task)
        begun = attempts.begin(is_retry=is_retry, share=self._share, node=self._node.name)
        for lost in attempts.keep_killed(sorted({*range(1, begun)} - failed)):
            self._log_lost(lost)
        is_used_up = begun > task.max_attempts and self._charged(task, begun) > task.max_attempts
        if begun and not is_used_up:
            self._log(task, "retry" if begun > 1 else "start", begun)
        return begun, is_used_up

    def _attempts(self, task: ShardTask) -> RunAttempts:
        return self.records.attempts(task.stage, task.source, task.shard, task.run_id)

    def _keep_failed(self, task: ShardTask, number: int, error: str) -> None:
        """Keep what an attempt cost that ends now with an error."""
        error = error[-_MAX_ERROR_CHARACTERS:]
        self._log_lost(self._attempts(task).keep_failed(number, WORKER_TIME.seconds(), error, task.share))

    def _log_lost(self, lost: LostAttemptRecord) -> None:
        cost = {"seconds": lost.seconds, "gpus": lost.gpus or 0.0, "cause": lost.cause, "error": lost.error}
        self._log_event(ShardEvent.of(lost, "lost", lost.number, lost.host, **cost))

    def _log(self, task: ShardTask, event: EventName, number: int, **more: Any) -> None:
        more = {"gpus": self._share.gpus, **more}
        self._log_event(ShardEvent.of(task, event, number, socket.gethostname(), **more))

    def _attempt(self, task: ShardTask, is_retry: bool) -> ShardRecord:
        """Do the task, as often as the storage fails it, unless a try before has committed it without learning so."""
        may_be_committed = is_retry

        def work() -> ShardRecord:
            nonlocal may_be_committed
            committed = self._committed(task) if may_be_committed else None
            may_be_committed = True
            return committed or self._ready_worker()(task)

        with WORKER_TIME.working():
            return self._patience.call(work)

    def _charged(self, task: ShardTask, begun: int) -> int:
        """Return how many of the attempts are the shard's own: all but those whose node is gone."""
        nodes = self._attempts(task).nodes(begun)
        charged = begun - self._gone(nodes)
        if charged > task.max_attempts and any(node != self._node.name for node in nodes):
            time.sleep(self._node.noticed_s)
            charged = begun - self._gone(nodes)
        return charged

    def _gone(self, nodes: Sequence[str]) -> int:
        gone = self._node.gone(set(nodes))
        return sum(node in gone for node in nodes)

    def _committed(self, task: ShardTask) -> ShardRecord | None:
        committed = self.records.read(task.stage, task.source, task.shard)
        return committed if committed is not None and committed.fingerprint == task.fingerprint else None

    def _end_attempts(self, task: ShardTask, begun: int) -> None:
        """Forget the attempts of a committed shard; what a storage refuses of it, the end of a run makes up for."""
        with contextlib.suppress(OSError):
            self._attempts(task).end(begun)

    def _give_up(self, task: ShardTask, attempts: int, error: str) -> ShardOutcome:
        """Quarantine the shard, unless another runner has committed it meanwhile."""
        if committed := self._committed(task):
            return ShardOutcome.committed(committed)
        self.records.quarantine(
            QuarantineRecord(
                stage=task.stage,
                source=task.source,
                shard=task.shard,
                run_id=task.run_id,
                attempts=attempts,
                error=error[-_MAX_ERROR_CHARACTERS:],
                finished_at=utc_now(),
            )
        )
        self._log(task, "quarantine", attempts, error=error)
        return self._outcome(task, "quarantined", error)

    def _ready_worker(self) -> Worker:
        """Return the worker, its weights loaded and checked to be those that the fingerprints name."""
        with self._loading:
            if self._worker is None:
                expected = self.settings.models.get(self.stage, ())
                if expected:
                    self._report_state(self.stage, "loading weights")
                worker = self._load(self.stage, self.settings.config, self.records)
                if getattr(worker, "models", ()) != expected:
                    raise CapfiltError(
                        f"{socket.gethostname()} has other weights for {self.stage} than the driver: pin "
                        "caption.revision (or hf-hub:...@REVISION), or make the model folder the same on every "
                        "node"
                    )
                self._worker = worker
                self._report_state(self.stage, "at work")
            return self._worker
