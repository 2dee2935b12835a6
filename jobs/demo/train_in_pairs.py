"""Runs the demo's trainings two at a time, each on a core and in a process of its own.

Those processes are forked from a server that has imported the trainer (``jobs.demo.train``) once; this one never does.
"""

import contextlib
import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from jobs.demo.training_configs import (
    CAPTIONS,
    FAMILIES,
    NUM_HELD_OUT,
    Captions,
    Family,
    stage1_config,
    stage2_config,
)
from schemas.pretrain import PretrainConfig


def train_demo(corpus: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Train on a demo corpus and evaluate the models: the figures by stage, as ``capfilt demo --json`` prints them.

    ``training_seconds`` are of the CPU: a busy machine does not stretch them.

    Args:
        corpus: the corpus's folder, its curated shards made.
        log: called with a line as each training begins.
    """
    at_once(partial(_prepare, corpus))
    for captions in CAPTIONS:
        log(f"stage 1 on {captions} captions: {_size(stage1_config(corpus, captions))}")
    stage1 = at_once(*(partial(_stage1, corpus, captions) for captions in CAPTIONS))
    for family in FAMILIES:
        log(f"stage 2 with a frozen {family.upper()}: {_size(stage2_config(corpus, family))}")
    stage2 = at_once(*(partial(_stage2, corpus, family) for family in FAMILIES))
    return {
        "training_seconds": round(sum(cpu_seconds for _, cpu_seconds in stage1 + stage2), 1),
        "stage1": dict(zip(CAPTIONS, (figures for figures, _ in stage1), strict=True))
        | {"chance": 1 / NUM_HELD_OUT},
        "stage2": dict(zip(FAMILIES, (figures for figures, _ in stage2), strict=True)),
    }


def _size(config: PretrainConfig) -> str:
    return f"{config.optim.steps} steps of {config.optim.batch_size} images"


def at_once(*calls: Callable[[], Any]) -> list[tuple[Any, float]]:
    """Call functions at once, each in a process; return what they return, and the CPU seconds of each.

    Where one raises, or this process is interrupted, the others stop after the step under way, with a checkpoint.
    """
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if has_server else "spawn")
    context.set_forkserver_preload(["jobs.demo.train"])
    running: list[tuple[BaseProcess, Connection]] = []
    try:
        for call in calls:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(call, sender), daemon=True)
            process.start()
            sender.close()
            running.append((process, receiver))
        return [_result(receiver) for _, receiver in running]
    finally:
        for process, _ in running:
            process.terminate()
        for process, _ in running:
            process.join()


def _result(receiver: Connection) -> tuple[Any, float]:
    try:
        outcome, cpu_seconds = receiver.recv()
    except EOFError:
        raise RuntimeError("a process of the demo's training was killed") from None
    if isinstance(outcome, Exception):
        raise outcome
    return outcome, cpu_seconds


# -- in a process of its own: the trainer is imported inside, so that the parent names these without it ---------------


def _work(call: Callable[[], Any], sender: Connection) -> None:
    from jobs.demo.train import begin_process

    begin_process()
    began = time.process_time()
    try:
        outcome = call()
    except Exception as error:
        outcome = error
    except KeyboardInterrupt:  # of the parent, which says so
        return
    # A parent that was interrupted does not listen any more.
    with contextlib.suppress(BrokenPipeError):
        sender.send((outcome, time.process_time() - began))


def _prepare(corpus: Path) -> None:
    from jobs.demo.train import prepare

    prepare(corpus)


def _stage1(corpus: Path, captions: Captions) -> dict[str, float]:
    from jobs.demo.train import train_stage1

    return train_stage1(corpus, captions)


def _stage2(corpus: Path, family: Family) -> dict[str, float]:
    from jobs.demo.train import train_stage2

    return train_stage2(corpus, family)
