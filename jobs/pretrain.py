"""A training run as a command: on this machine, on a Ray cluster, or as one of the ranks that torchrun or srun started.

It is noted in the manifests from start to end.
"""

import os

from jobs.environment import ray_address
from jobs.interrupts import Interrupts
from jobs.ranks.launched_rank import LaunchedRank, is_first_rank
from jobs.ranks.launcher import train_here
from jobs.ranks.rank_outcome import RankOutcome
from jobs.run_record import begin_run
from pipeline.manifest.manifest import Manifest
from pipeline.storage.scratch import sweep_temporary_folders
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from schemas.records import RunOutcome, RunRecord
from training.trainer.lineage import LineageWriter
from training.trainer.summary import Summary


class TrainingFailedError(Exception):
    """Report a training that ended before its last step, as one message for people."""


class TrainingInterruptedError(TrainingFailedError):
    """Report a training that a signal ended before it could make a checkpoint."""


def train_to_end(config: PretrainConfig) -> None:
    """Do ``pretrain`` to the last step. Raises TrainingFailedError where a signal stopped it before."""
    if pretrain(config).outcome != "done":
        raise TrainingFailedError(f"{config.run.name} was stopped; the same command goes on")


def pretrain(config: PretrainConfig, interrupts: Interrupts | None = None) -> Summary:
    """Train until the last step, from the newest good checkpoint of ``run.name``. Safe to repeat and to kill.

    SIGINT and SIGTERM end it after the step, with a checkpoint; before the first step and, on a cluster, at once.

    Args:
        interrupts: not yet entered, for a caller that wants to know which signal it was.

    Raises:
        CapfiltError: the input is at fault; nothing was written.
        TrainingFailedError: it ended early; the message says why, and from where it can go on.
    """
    with interrupts or training_interrupts() as entered:
        return _pretrain(config, entered)


def training_interrupts() -> Interrupts:
    """Return what takes a training's signals."""
    if LaunchedRank.of(os.environ) is not None:
        return Interrupts("after the step under way, with a checkpoint", quiet=not is_first_rank(), once=True)
    return Interrupts(
        "after the step under way, with a checkpoint; a second signal does not wait for them",
        "at the last checkpoint",
    )


def _pretrain(config: PretrainConfig, interrupts: Interrupts) -> Summary:
    sweep_temporary_folders()
    run = begin_run("pretrain", config)
    outcome = None
    try:
        outcome = _train(config, run, interrupts)
    except KeyboardInterrupt:
        outcome = RankOutcome(kind="interrupted")
    finally:
        with interrupts.ignored():
            if is_first_rank():
                _note_end(config, run, outcome)
    if outcome.kind == "refused":
        if not is_first_rank():
            raise SystemExit(2)  # the first rank says the same
        raise CapfiltError(outcome.text)
    if outcome.kind == "interrupted":
        raise TrainingInterruptedError(
            f"{config.run.name} was stopped without a new checkpoint; the same command goes on from the last one, or "
            "begins where there is none"
        )
    if outcome.summary is None:
        raise TrainingFailedError(outcome.text)
    return outcome.summary


def _train(config: PretrainConfig, run: RunRecord, interrupts: Interrupts) -> RankOutcome:
    if (launched := LaunchedRank.of(os.environ)) is not None:
        from jobs.ranks.rank import train_launched

        return train_launched(config, run, launched, interrupts)
    if address := ray_address(config.cluster.address):
        from jobs.cluster.train import train_on_ray

        return train_on_ray(config, run, address, interrupts)
    return train_here(config, run, interrupts)


def _note_end(config: PretrainConfig, run: RunRecord, outcome: RankOutcome | None) -> None:
    """Write the run's end beside its start; of a run that was refused there is neither."""
    ended: RunOutcome = "interrupted" if outcome and outcome.kind == "interrupted" else "error"
    if outcome and outcome.summary:
        ended = outcome.summary.outcome
    for records in LineageWriter(config.data, config.run.output).write_end(run.run_id, ended):
        Manifest(records.storage).compact()
