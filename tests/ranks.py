"""Functions run on several ranks: a process each, gloo on loopback, what they return handed back."""

import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from training.distributed import World


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what ``function(world, *arguments)`` returns on each rank, in order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("forkserver")
    # Imported once for all ranks of a session: torch and transformers take seconds.
    context.set_forkserver_preload(["training.build", "tests.tiny_training"])
    with ProcessPoolExecutor(size, context) as pool:
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
