"""A training on a Ray cluster: Ray Train places the ranks and starts them again when a node dies."""

import logging
import sys
import threading
from concurrent.futures import Future, wait
from contextlib import redirect_stdout
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError

from jobs.cluster.session import joined_ray
from jobs.environment import WORKER_ENVIRONMENT
from jobs.interrupts import Interrupts
from jobs.launcher import num_gpus
from jobs.rank_outcome import TIMEOUT_S, RankOutcome, log, worst_outcome
from pipeline.storage.scratch import temporary_folder
from schemas.pretrain import PretrainConfig
from schemas.records import RunRecord

# How often the ranks' lines are fetched.
_POLL_S = 1.0


class _ProgressActor:
    """Collects the ranks' log lines and how they ended, since Ray Train returns numbers only."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._outcomes: list[RankOutcome] = []

    def log(self, line: str) -> None:
        self._lines.append(line)

    def end(self, outcome: RankOutcome) -> None:
        self._outcomes.append(outcome)

    def lines(self, first: int) -> list[str]:
        return self._lines[first:]

    def outcomes(self) -> list[RankOutcome]:
        return self._outcomes

    def is_over(self) -> bool:
        return any(map(_is_final, self._outcomes))


def _is_final(outcome: RankOutcome) -> bool:
    """Return whether another try would end the same."""
    return outcome.kind not in ("ended", "lost")


def train_on_ray(config: PretrainConfig, run: RunRecord, address: str, interrupts: Interrupts) -> RankOutcome:
    """Train on the cluster at an address, on ``cluster.gpus`` GPUs, all GPUs, or ``cpu_ranks`` CPUs.

    Ranks that died are started again by Ray Train, ``cluster.max_restarts`` times, from the last checkpoint.
    """
    dashboard = False if address == "local" else None
    with joined_ray(address, interrupts, include_dashboard=dashboard):
        logging.getLogger("ray.train").setLevel(logging.ERROR)
        # It only waits for calls, so that no CPU is reserved for it.
        actor = ray.remote(num_cpus=0)(_ProgressActor).remote()
        # Ray prints workers that died on standard output, which is for --json.
        with temporary_folder() as folder, redirect_stdout(sys.stderr):
            trainer = TorchTrainer(
                _rank,
                train_loop_config={
                    "config": config.model_dump(mode="json"),
                    "run": run.to_json(),
                    "actor": actor,
                },
                torch_config=TorchConfig(timeout_s=int(TIMEOUT_S), backend=_backend(config)),
                scaling_config=_scaling(config),
                run_config=RunConfig(
                    name=run.run_id,
                    storage_path=str(folder),
                    failure_config=FailureConfig(max_failures=config.cluster.max_restarts),
                    worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
                ),
            )
            try:
                _fit(trainer, actor)
            except TrainingFailedError as error:
                log(str(error).splitlines()[0])
        outcomes = ray.get(actor.outcomes.remote())
        # Ranks that lost another were started again: what counts is what stopped that, or the end of the last try.
        final = [outcome for outcome in outcomes if _is_final(outcome)]
        ended = [outcome for outcome in outcomes if outcome.kind == "ended"]
        return worst_outcome(
            final or ended or outcomes or [RankOutcome(kind="lost", text="every rank was killed")]
        )


def _fit(trainer: TorchTrainer, actor: Any) -> None:
    """Train, and print the ranks' log lines as they come.

    In a thread: in the main one Ray Train would take Ctrl-C for itself and end the process with 0.
    """
    ended: Future[None] = Future()

    def fit() -> None:
        try:
            trainer.fit()
            ended.set_result(None)
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=fit, daemon=True).start()
    printed, is_last = 0, False
    while not is_last:
        is_last = bool(wait([ended], _POLL_S).done)
        lines = ray.get(actor.lines.remote(printed))
        for line in lines:
            log(line)
        printed += len(lines)
    ended.result()


def _rank(settings: dict[str, Any]) -> None:
    """Run as one rank. If it fails, it raises, so that Ray Train ends the others, which may wait for it, and retries.

    Where another try cannot succeed (a refusal, full memory), its ranks return at once.
    """
    # Here, in the rank: the driver needs no trainer.
    from jobs.rank import train_as
    from training.distributed import World

    config, actor = PretrainConfig.model_validate(settings["config"]), settings["actor"]
    if ray.get(actor.is_over.remote()):
        return
    world = World(get_device())
    outcome = train_as(world, config, RunRecord.from_json(settings["run"]), log=actor.log.remote)
    ray.get(actor.end.remote(outcome))
    if outcome.kind != "ended":
        raise RuntimeError(outcome.text)


def _num_gpus(config: PretrainConfig) -> int:
    return num_gpus(config, int(ray.cluster_resources().get("GPU", 0)), "the cluster")


def _scaling(config: PretrainConfig) -> ScalingConfig:
    if gpus := _num_gpus(config):
        resources = {"GPU": 1, "CPU": config.cluster.cpus_per_gpu}
        return ScalingConfig(num_workers=gpus, use_gpu=True, resources_per_worker=resources)
    return ScalingConfig(num_workers=config.cluster.cpu_ranks, resources_per_worker={"CPU": 1})


def _backend(config: PretrainConfig) -> str:
    # Objects (which checkpoint to take) go over gloo, tensors over NCCL.
    return "cpu:gloo,cuda:nccl" if _num_gpus(config) else "gloo"
