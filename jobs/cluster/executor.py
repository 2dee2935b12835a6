"""Runs a job on Ray Data: every shard streams through the actor pools of the stages, on this machine or a cluster."""

import contextlib
import time
from dataclasses import replace

import ray
from ray.data.exceptions import ExecutionTimeoutError
from ray.util.metrics import Counter, Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.cluster.actors import ProgressActor, build_dataset
from jobs.cluster.session import ray_session
from jobs.executor import ExecutorOutcome, RunMonitor, StageJob
from pipeline.faults import is_waited_for
from pipeline.runs.metrics import LABELS, METRICS, STORAGE_AWAY, STORAGE_AWAY_DESCRIPTION, Series
from pipeline.runs.progress import RunProgress
from pipeline.storage.patience import PAUSES_S
from schemas.errors import TryAgainLaterError, first_line

# Executions (not shards) that may break in a row through no node's fault, with no shard committed between them.
_MAX_BROKEN_EXECUTIONS = 3


def run_on_ray(job: StageJob, monitor: RunMonitor) -> ExecutorOutcome:
    """Run the job on the Ray cluster of the config, or on one that is started on this machine.

    An execution that breaks, as when a node dies with its actors, goes on with what is left. Every execution skips
    what is committed.
    """
    monitor.display.log("starting Ray, or joining it: some seconds")
    with ray_session(job.settings.config, job.stages, monitor.interrupts):
        # On the driver's node, so that no other node's death takes it along.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        counter = ProgressActor.options(scheduling_strategy=here).remote(job.limits)
        monitor.display.log(f"Ray is up; the workers of {', '.join(job.stages)} start")

        metrics = _RayMetrics(job.settings.config.corpus.path)

        def snapshot(timeout_s: float) -> RunProgress | None:
            # An actor that does not answer is being restarted, or Ray is shutting down.
            with contextlib.suppress(ray.exceptions.RayError):
                if monitor.interrupts.count:
                    counter.stop.remote()
                progress = ray.get(
                    counter.snapshot.remote(monitor.num_events, monitor.progress.number),
                    timeout=timeout_s,
                )
                metrics.export(progress)
                return progress
            return None

        grace_s = job.settings.config.cluster.stop_grace_s
        with monitor.watching(snapshot), monitor.interrupts.graced(grace_s):
            return _run_until_done(job, monitor, counter)


def _run_until_done(job: StageJob, monitor: RunMonitor, counter: ray.actor.ActorHandle) -> ExecutorOutcome:
    patience_s = job.settings.config.cluster.storage_patience_s
    broken, since, left = 0, time.monotonic(), job
    while True:
        finished = monitor.progress.finished
        try:
            left = _left(left, counter) if broken else job
            outcome = _run_once(left, monitor, counter)
            progress = ray.get(counter.snapshot.remote())
            if progress.refusal:
                raise progress.refusal
            return "limit" if progress.limit and outcome == "done" else outcome
        except (ray.exceptions.RayError, ExecutionTimeoutError) as error:
            if broken == 0 or monitor.progress.finished > finished:
                broken, since = 0, time.monotonic()
            broken += 1
            if is_waited_for(error):
                if time.monotonic() - since > patience_s:
                    raise TryAgainLaterError(
                        f"Ray cannot work: {first_line(error)}; run the same command again later"
                    ) from error
            elif broken == _MAX_BROKEN_EXECUTIONS:
                raise
            monitor.display.log(f"the execution broke and is started again: {_short(error)}")
            time.sleep(PAUSES_S[min(broken, len(PAUSES_S)) - 1])


def _short(error: BaseException) -> str:
    """Return the first and the last line of what an error says: Ray's messages hold whole traces between them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ... ".join(dict.fromkeys((lines[0], lines[-1])))


def _left(job: StageJob, counter: ray.actor.ActorHandle) -> StageJob:
    """Return the job without the shards that came out of its last stage; all of it where the counter forgot them."""
    passed: set[tuple[str, str]] = ray.get(counter.passed.remote(job.stages[-1]))
    shards = [(kind, urls) for kind, urls in job.shards if (urls.source, urls.shard) not in passed]
    return replace(job, shards=shards)


def _run_once(job: StageJob, monitor: RunMonitor, counter: ray.actor.ActorHandle) -> ExecutorOutcome:
    """Pass every shard through the stages once; end early where the monitor sees a reason to."""
    if not job.shards:
        return "done"
    for _ in build_dataset(job, counter).iter_batches(batch_size=None, prefetch_batches=0):
        if monitor.progress.refusal or monitor.progress.is_stopped:
            break
        if monitor.has_failed_too_often(monitor.progress):
            return "gave up"
    return "done"


class _RayMetrics:
    """A run's metrics, exported through Ray, which serves them to Prometheus on each node, as ``ray_capfilt_...``.

    The driver exports them, not the workers: a worker's series would end with it, and its sums be lost. Ray is up.
    """

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
