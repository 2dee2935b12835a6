"""Starts the ranks of a training on this machine, one process each, and restarts all of them when one dies.

Ranks on the CPU are forked from a server process that has imported the trainer (``jobs.ranks.rank``) once. Ranks on
GPUs are started afresh: a library that looks for GPUs while the server imports it would leave CUDA unusable in its
forks. This process imports the trainer only where it is the one rank.
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from jobs.interrupts import Interrupts
from jobs.ranks.rank_outcome import RankOutcome, log, worst_outcome
from pipeline.corpus.checkpoint_files import newest_step
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from schemas.records import RunRecord

# What multiprocessing says of a process whose server has died.
_UNKNOWN_EXIT = 255

# After one rank has failed: time for the others to notice it and to commit their last checkpoint.
_GRACE_S = 60.0
# After one rank was stopped before its first step, or by a second signal: the others have nothing to commit, and may
# wait for it in a collective, where no signal reaches them.
_STOP_GRACE_S = 5.0


def train_here(config: PretrainConfig, run: RunRecord, interrupts: Interrupts) -> RankOutcome:
    """Train on this machine: a rank for each GPU that is wanted, else ``cluster.cpu_ranks`` on the CPU."""
    size = num_gpus(config, torch.cuda.device_count(), "this machine") or config.cluster.cpu_ranks
    if size == 1:
        from jobs.ranks.rank import device_of, train_rank

        return train_rank(config, run, device_of(0), interrupts)
    restarts = Restarts(config.cluster.max_restarts, newest_step(config))
    outcome = _attempt(config, run, size, interrupts)
    while outcome.kind == "lost" and (number := restarts.take(newest_step(config))):
        log(f"{outcome.text}; restart {number}, from the last checkpoint")
        outcome = _attempt(config, run, size, interrupts)
    return outcome


class Restarts:
    """The restarts of a run: so many without progress between them.

    A run of weeks loses many nodes, while one that cannot get on fails again and again.

    Args:
        most: ``cluster.max_restarts``.
        step: of the newest checkpoint.
    """

    def __init__(self, most: int, step: int) -> None:
        self._most, self._step, self._count = most, step, 0

    def take(self, step: int) -> str:
        """Count a restart and return which one it is, as "1 of 3"; empty where none is left.

        Args:
            step: of the newest checkpoint now: behind the one before, all restarts are given back.
        """
        if step > self._step:
            self._step, self._count = step, 0
        self._count += 1
        return f"{self._count} of {self._most}" if self._count <= self._most else ""


def num_gpus(config: PretrainConfig, available: int, where: str) -> int:
    """Return how many of the available GPUs a run takes. Raises CapfiltError where more are wanted."""
    if config.cluster.gpus > available:
        raise CapfiltError(
            f"cluster.gpus = {config.cluster.gpus}, and {where} has {available}; lower it, or set 0"
        )
    return config.cluster.gpus or available


def _attempt(config: PretrainConfig, run: RunRecord, size: int, interrupts: Interrupts) -> RankOutcome:
    """Start all ranks and wait for them; when one fails, the others get some time, then are killed."""
    context = _context()
    port = _free_port()
    processes: list[BaseProcess] = []
    receivers: list[Connection] = []
    # From the first start on: ranks that were left without the others would wait for them in their first collective.
    with interrupts.passed_on(lambda: _ask_to_stop(processes)):
        for rank in range(size):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (config.model_dump(mode="json"), run.to_json(), rank, size, port, sender)
            process = context.Process(target=_rank_process, args=arguments, name=f"rank {rank}", daemon=True)
            process.start()
            sender.close()
            processes.append(process)
            receivers.append(receiver)
        if interrupts.count:  # the signal came before all of them had started
            _ask_to_stop(processes)
        outcome = worst_outcome(_outcomes(processes, receivers))
    return RankOutcome(kind="interrupted") if outcome.kind == "lost" and interrupts.count else outcome


def _context() -> SpawnContext | ForkServerContext:
    """Return how processes of ranks are started: forked from a server, or each afresh."""
    if torch.cuda.is_available() or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jobs.ranks.rank"])
    # The tracker's own start would unblock SIGTERM.
    resource_tracker.ensure_running()
    # A signal to the whole process group must not end the server, and one to a new rank waits until it has handlers.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return context


def _outcomes(processes: list[BaseProcess], receivers: list[Connection]) -> list[RankOutcome]:
    """Return how each rank ended, in order of rank."""
    outcomes: dict[int, RankOutcome] = {}
    deadline = float("inf")
    while len(outcomes) < len(processes):
        waiting: dict[Any, int] = {
            process.sentinel: rank for rank, process in enumerate(processes) if rank not in outcomes
        }
        left_s = max(0.0, deadline - time.monotonic())
        for sentinel in wait(list(waiting), None if left_s == float("inf") else left_s):
            rank = waiting[sentinel]
            outcomes[rank] = _outcome_of(rank, processes[rank], receivers[rank])
            if outcomes[rank].kind != "ended":
                grace_s = _STOP_GRACE_S if outcomes[rank].kind == "interrupted" else _GRACE_S
                deadline = min(deadline, time.monotonic() + grace_s)
        if time.monotonic() > deadline:
            for rank in waiting.values():
                processes[rank].kill()
    return [outcomes[rank] for rank in range(len(processes))]


def _outcome_of(rank: int, process: BaseProcess, receiver: Connection) -> RankOutcome:
    process.join()
    try:
        return receiver.recv()
    except EOFError:
        code = process.exitcode or 0
        if code == _UNKNOWN_EXIT and process.pid is not None:
            # The server is gone, and with it the rank's exit code: the rank may still run.
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
        return RankOutcome(kind="lost", text=f"rank {rank} {how}")


def _rank_process(config: dict, run: str, rank: int, size: int, port: int, sender: Connection) -> None:
    """Run as one rank and send the outcome, which is small enough for the pipe's buffer."""
    # A terminal's Ctrl-C reaches every process; the parent passes it on, and two of them would not wait for the step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=stop_without_parent, daemon=True).start()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if sys.platform == "linux":
        # Else gloo takes the address of the machine's name.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    with Interrupts(quiet=True) as interrupts:
        try:
            from jobs.ranks.rank import device_of, train_rank

            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            arguments = PretrainConfig.model_validate(config), RunRecord.from_json(run)
            outcome = train_rank(*arguments, device_of(rank), interrupts)
        except KeyboardInterrupt:
            outcome = RankOutcome(kind="interrupted")
    with suppress(OSError):  # the parent is gone
        sender.send(outcome)
        sender.close()


def stop_without_parent() -> None:
    """Ask this process to stop once its parent has ended: its outcome would not be received."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _ask_to_stop(processes: list[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
