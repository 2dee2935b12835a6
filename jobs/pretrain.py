"""A training run as a command: on this machine or on a Ray cluster, noted in the manifests from start to end."""

import os
import socket

from jobs.ranks import Outcome, train_here
from jobs.run import new_run_id
from pipeline.attempt import library_versions
from pipeline.configfile import config_digest, dump_config
from pipeline.manifest import Manifest
from pipeline.records import now
from pipeline.storage import sweep_temporary_folders
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from schemas.records import RunRecord
from training.ledger import Ledger
from training.loop import Summary


class TrainingFailedError(Exception):
    """Report a training that ended before its last step, as one message for people."""


def pretrain(config: PretrainConfig) -> Summary:
    """Train until the last step, from the newest good checkpoint of ``run.name``. Safe to repeat and to kill.

    Raises:
        CapfiltError: the input is at fault; nothing was written.
        TrainingFailedError: it ended early; the message says why, and from where it can go on.
    """
    sweep_temporary_folders()
    run = RunRecord(
        run_id=new_run_id(),
        command="pretrain",
        config=dump_config(config),
        config_digest=config_digest(config),
        started_at=now(),
        host=socket.gethostname(),
        versions=library_versions(),
    )
    outcome = None
    try:
        outcome = _train(config, run)
    finally:
        _note_end(config, run, outcome)
    if outcome.kind == "refused":
        raise CapfiltError(outcome.text)
    if outcome.summary is None:
        raise TrainingFailedError(outcome.text)
    return outcome.summary


def _train(config: PretrainConfig, run: RunRecord) -> Outcome:
    # A submitted job is told its cluster by Ray itself.
    if address := os.environ.get("RAY_ADDRESS", "") or config.cluster.address:
        from jobs.raytrain import train_on_ray

        return train_on_ray(config, run, address)
    return train_here(config, run)


def _note_end(config: PretrainConfig, run: RunRecord, outcome: Outcome | None) -> None:
    """Write the run's end beside its start; of a run that was refused there is neither."""
    ended = outcome.summary.outcome if outcome and outcome.summary else "error"
    for records in Ledger(config.data).end(run.run_id, ended):
        Manifest(records.storage).compact()
