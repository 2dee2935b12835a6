"""A training on a Ray cluster: Ray Train places the ranks, and starts them again when a node dies or is preempted."""

import logging
import secrets
import sys
import threading
from concurrent.futures import Future, wait
from contextlib import redirect_stdout
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_preemption_info
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.cluster.session import joined_ray
from jobs.environment import WORKER_ENVIRONMENT
from jobs.interrupts import Interrupts
from jobs.ranks.launcher import num_gpus
from jobs.ranks.rank_outcome import TIMEOUT_S, RankOutcome, log, worst_outcome
from pipeline.corpus.checkpoint_files import newest_step
from pipeline.storage.scratch import temporary_folder
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from schemas.records import RunRecord

# How often the ranks' lines are fetched.
_POLL_S = 1.0
# All ranks wait for each other to learn of a preemption, of which clouds tell 30 to 120 seconds before.
_PREEMPTION_EVERY_STEPS = 10
# Of ranks that became fewer: how often to look for more. They begin again from the last checkpoint.
_GROW_EVERY_S = 1800.0


class _ProgressActor:
    """Collects the ranks' log lines and how they ended, since Ray Train returns numbers only; asks them to stop."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._outcomes: list[RankOutcome] = []
        self._has_begun = False
        self._is_stopping = False

    def begin(self) -> bool:
        """Note that a rank starts; return whether it shall."""
        self._has_begun = True
        return not any(map(_is_final, self._outcomes))

    def stop(self) -> bool:
        """Ask the ranks to stop after their step; return whether there are ranks."""
        self._is_stopping = True
        return self._has_begun

    def is_stopping(self) -> bool:
        return self._is_stopping

    def log(self, line: str) -> None:
        self._lines.append(line)

    def end(self, outcome: RankOutcome) -> None:
        self._outcomes.append(outcome)

    def new_lines(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines

    def outcomes(self) -> list[RankOutcome]:
        return self._outcomes


def _is_final(outcome: RankOutcome) -> bool:
    """Return whether another try would end the same."""
    return outcome.kind not in ("ended", "lost")


def train_on_ray(config: PretrainConfig, run: RunRecord, address: str, interrupts: Interrupts) -> RankOutcome:
    """Train on the cluster at an address, on ``cluster.gpus`` GPUs, all GPUs, or ``cpu_ranks`` CPUs.

    Ranks that died are started again by Ray Train, ``cluster.max_restarts`` times without a checkpoint between them.
    The first signal asks the ranks to stop after their step, with a checkpoint.
    """
    dashboard = False if address == "local" else None
    with joined_ray(address, interrupts, include_dashboard=dashboard):
        logging.getLogger("ray.train").setLevel(logging.ERROR)
        actor = _progress_actor()
        # Ray prints workers that died on standard output, which is for --json.
        with temporary_folder() as folder, redirect_stdout(sys.stderr):
            is_on = True
            while is_on:
                step = newest_step(config)
                try:
                    _fit(_trainer(config, run, actor, str(folder)), actor, interrupts)
                    is_on = False
                except TrainingFailedError as error:
                    # The first line says that a rank failed, the last one how.
                    lines = str(error).strip().splitlines()
                    log(" ".join(dict.fromkeys((lines[0], lines[-1]))))
                    # Ray Train counts the failures of a run. Behind another checkpoint it gets all of them again.
                    is_on = newest_step(config) > step and not ray.get(actor.is_stopping.remote())
        outcomes = ray.get(actor.outcomes.remote())
        # Ranks that lost another were started again: what counts is what stopped that, or the end of the last try.
        final = [outcome for outcome in outcomes if _is_final(outcome)]
        ended = [outcome for outcome in outcomes if outcome.kind == "ended"]
        return worst_outcome(
            final or ended or outcomes or [RankOutcome(kind="lost", text="every rank was killed")]
        )


def _progress_actor() -> ray.actor.ActorHandle:
    """Start the actor on the driver's node, so that no other node's death takes it along, and have it restarted.

    It only waits for calls, so that no CPU is reserved for it. A restarted one has lost a second's lines.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    kind = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_ProgressActor)
    return kind.options(scheduling_strategy=here).remote()


def _trainer(config: PretrainConfig, run: RunRecord, actor: Any, folder: str) -> TorchTrainer:
    gpus = _num_gpus(config)
    # Objects (which checkpoint to take) go over gloo, tensors over NCCL.
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    return TorchTrainer(
        _rank,
        train_loop_config={"config": config.model_dump(mode="json"), "run": run.to_json(), "actor": actor},
        torch_config=TorchConfig(timeout_s=int(TIMEOUT_S), backend=backend),
        scaling_config=scaling(config, gpus),
        run_config=RunConfig(
            name=f"{run.run_id}-{secrets.token_hex(3)}",
            storage_path=folder,
            failure_config=FailureConfig(max_failures=config.cluster.max_restarts),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
        ),
    )


def _fit(trainer: TorchTrainer, actor: Any, interrupts: Interrupts) -> None:
    """Train, and print the ranks' log lines as they come.

    In a thread: in the main one Ray Train would take Ctrl-C for itself and end the process with 0.

    Raises:
        KeyboardInterrupt: at a signal before there are ranks, or at a second one.
    """
    ended: Future[None] = Future()

    def fit() -> None:
        try:
            trainer.fit()
            ended.set_result(None)
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=fit, daemon=True).start()
    is_last = has_ranks = False
    with interrupts.passed_on(lambda: None):
        while not is_last:
            is_last = bool(wait([ended], _POLL_S).done)
            for line in ray.get(actor.new_lines.remote()):
                log(line)
            if interrupts.asked():
                # Asked at each turn: an actor that was restarted meanwhile knows of neither.
                has_ranks = ray.get(actor.stop.remote()) or has_ranks
                if interrupts.count > 1 or not has_ranks:
                    raise KeyboardInterrupt
    ended.result()


def _rank(settings: dict[str, Any]) -> None:
    """Run as one rank. If it fails, it raises, so that Ray Train ends the others, which may wait for it, and retries.

    Where another try cannot succeed (a refusal, full memory), its ranks return at once.
    """
    # Here, in the rank: the driver needs no trainer.
    from jobs.ranks.rank import train_as
    from training.distributed import World

    config, actor = PretrainConfig.model_validate(settings["config"]), settings["actor"]
    if not ray.get(actor.begin.remote()):
        return
    world = World(get_device())
    signs = _StopSigns(actor, is_first=world.rank == 0)
    outcome = train_as(world, config, RunRecord.from_json(settings["run"]), signs.asked, actor.log.remote)
    if signs.is_preempted and outcome.summary is not None and outcome.summary.outcome == "interrupted":
        raise RuntimeError("a node is preempted: the ranks start again from the checkpoint made for it")
    ray.get(actor.end.remote(outcome))
    if outcome.kind != "ended":
        raise RuntimeError(outcome.text)


class _StopSigns:
    """What makes a rank stop after a step: a signal to the driver, or the preemption of a node of any rank."""

    def __init__(self, actor: Any, is_first: bool) -> None:
        self.is_preempted = False
        self._actor, self._is_first = actor, is_first
        self._steps = 0

    def asked(self) -> bool:
        """Return whether to stop; called by every rank at each step."""
        self._steps += 1
        if self._steps % _PREEMPTION_EVERY_STEPS == 0:
            self.is_preempted = self.is_preempted or get_preemption_info() is not None
        return self.is_preempted or (self._is_first and ray.get(self._actor.is_stopping.remote()))


def _num_gpus(config: PretrainConfig) -> int:
    available = int(ray.cluster_resources().get("GPU", 0))
    if 0 < config.cluster.min_ranks <= available:
        return config.cluster.gpus or available
    return num_gpus(config, available, "the cluster")


def scaling(config: PretrainConfig, gpus: int) -> ScalingConfig:
    """Return how many ranks a cluster with so many GPUs is asked for, and what each of them takes.

    Raises CapfiltError where fewer would begin than have to go on.
    """
    most, least = gpus or config.cluster.cpu_ranks, config.cluster.min_ranks
    if least > most:
        raise CapfiltError(f"cluster.min_ranks = {least}, and {most} ranks begin; lower it")
    return ScalingConfig(
        num_workers=(least, most) if least and least < most else most,
        use_gpu=bool(gpus),
        resources_per_worker={"GPU": 1, "CPU": config.cluster.cpus_per_gpu} if gpus else {"CPU": 1},
        elastic_resize_monitor_interval_s=_GROW_EVERY_S,
    )
