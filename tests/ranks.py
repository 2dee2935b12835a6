"""Functions in processes of their own, which a server forks that has imported the trainer once for all tests."""

import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from training.distributed import World


def _server() -> ForkServerContext:
    context = get_context("forkserver")
    # torch and transformers take seconds to import; the others are what the files of the tests import.
    context.set_forkserver_preload(["jobs.ranks.rank", "tests.tiny_training", "jobs.run", "pytest"])
    return context


def start(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Start a function in a process of its own, which may be killed."""
    process = _server().Process(target=function, args=arguments)
    process.start()
    return process


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what ``function(world, *arguments)`` returns on each rank, in order: over gloo on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(size, _server()) as pool:
        futures = [pool.submit(_run, rank, size, port, function, arguments) for rank in range(size)]
        return [future.result(timeout=240) for future in futures]


def _run(rank: int, size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    world = World.join("cpu", timeout_s=120)
    assert (world.rank, world.size) == (rank, size)
    try:
        return function(world, *arguments)
    finally:
        world.close()
