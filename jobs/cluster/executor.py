"""Runs a job on Ray Data: every shard streams through the actor pools of the stages, on this machine or a cluster."""

import contextlib
import logging
from dataclasses import replace

import ray
from ray.data.exceptions import ExecutionTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.cluster.actors import ProgressActor, build_dataset
from jobs.cluster.session import ray_session
from jobs.executor import ExecutorOutcome, RunMonitor, StageJob
from pipeline.runs.progress import RunProgress
from schemas.errors import CapfiltError

# Executions (not shards) that may break in a row, with no shard committed between them.
_MAX_BROKEN_EXECUTIONS = 3

_log = logging.getLogger(__name__)


class RayExecutor:
    """Executor that joins the Ray cluster of the config, or starts one on this machine."""

    def run(self, job: StageJob, monitor: RunMonitor) -> ExecutorOutcome:
        """Run the job; an execution that breaks, as when a node dies with its actors, goes on with what is left.

        Every execution skips what is committed.
        """
        monitor.display.log("starting Ray, or joining it: some seconds")
        with ray_session(job.settings.config, job.stages, monitor.interrupts):
            # On the driver's node, so that no other node's death takes it along.
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
            counter = ProgressActor.options(scheduling_strategy=here).remote()
            monitor.display.log(f"Ray is up; the workers of {', '.join(job.stages)} start")

            def snapshot(timeout_s: float) -> RunProgress | None:
                # An actor that does not answer is being restarted, or Ray is shutting down.
                with contextlib.suppress(ray.exceptions.RayError):
                    return ray.get(counter.snapshot.remote(), timeout=timeout_s)
                return None

            with monitor.watching(snapshot):
                return _run_until_done(job, monitor, counter)


def _run_until_done(job: StageJob, monitor: RunMonitor, counter: ray.actor.ActorHandle) -> ExecutorOutcome:
    broken, left = 0, job
    while True:
        finished = monitor.progress.finished
        try:
            outcome = _run_once(left, monitor, counter)
            if refusal := ray.get(counter.snapshot.remote()).refusal:
                raise CapfiltError(refusal)
            return outcome
        except (ray.exceptions.RayError, ExecutionTimeoutError) as error:
            broken = 1 if monitor.progress.finished > finished else broken + 1
            if broken == _MAX_BROKEN_EXECUTIONS:
                raise
            _log.warning("the execution broke and is started again: %s", error)
            left = _left(job, counter)


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
        if monitor.progress.refusal:
            break
        if monitor.has_failed_too_often(monitor.progress):
            return "gave up"
    return "done"
