"""Runs a job in this process, one shard at a time through all stages: what a debugger steps through.

The records, retries and quarantine are those of a run on Ray, which is neither imported nor started.
"""

import math

from jobs.environment import WORKER_ENVIRONMENT, variables
from jobs.executor import ExecutorOutcome, RunMonitor, StageJob
from pipeline.runs.progress import ProgressCounter
from pipeline.runs.runner import ShardRunner
from pipeline.storage.scratch import sweep_temporary_folders
from schemas.config import StageResources
from schemas.errors import CapfiltError
from schemas.records import WorkerShare


def run_here(job: StageJob, monitor: RunMonitor) -> ExecutorOutcome:
    """Run the job; weights are loaded at the first shard that needs them, and kept.

    ``cluster.*.min_workers`` and ``max_workers`` have no effect.
    """
    sweep_temporary_folders()
    counter = ProgressCounter(job.limits)
    runners = [
        ShardRunner(
            stage,
            job.settings,
            note=counter.note,
            report_state=counter.report_state,
            report_away=counter.report_away,
            is_stopping=lambda: monitor.interrupts.count > 0,
            log_event=counter.log_event,
            share=_share(getattr(job.settings.config.cluster, stage)),
        )
        for stage in job.stages
    ]
    with (
        variables(_worker_environment(job)),
        monitor.watching(lambda timeout_s: counter.snapshot(monitor.num_events)),
        monitor.interrupts.graced(job.settings.config.cluster.stop_grace_s),
    ):
        for kind, urls in job.shards:
            for runner in runners:
                if monitor.interrupts.count:
                    return "done"  # as far as it goes: the block is interrupted here
                if counter.ask_to_begin(runner.stage, urls.source, urls.shard) == "stop":
                    return "limit"
                runner.run_shard(kind, urls)
            if monitor.has_failed_too_often(counter.snapshot()):
                return "gave up"
    return "done"


def _share(resources: StageResources) -> WorkerShare:
    """Return what a stage holds of this machine: whole GPUs, since no other process is given the rest of one."""
    return WorkerShare(cpus=resources.cpus, gpus=math.ceil(resources.gpus))


def _worker_environment(job: StageJob) -> dict[str, str]:
    """Return the variables that Ray sets for a worker: those of libraries, and no GPU where no stage asks for one.

    Raises CapfiltError where a stage asks for one and there is none.
    """
    cluster = job.settings.config.cluster
    keys = [f"cluster.{stage}.gpus" for stage in job.stages if getattr(cluster, stage).gpus]
    if not keys:
        return WORKER_ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}
    import torch

    if not torch.cuda.is_available():
        raise CapfiltError(f"{' and '.join(keys)}: this machine has no GPU; set 0 to compute on the CPU")
    return WORKER_ENVIRONMENT
