"""Joins a Ray cluster, or starts one on this machine that fits it."""

import contextlib
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray._common.network_utils import parse_address
from ray._private import ray_constants, services

from jobs.environment import WORKER_ENVIRONMENT, ray_address, variables
from jobs.interrupts import Interrupts
from schemas.config import CapfiltConfig, StageResources
from schemas.errors import CapfiltError
from schemas.stages import Stage

_log = logging.getLogger(__name__)

# Ray's switch for Windows and macOS, where it is off by default; read at import in each of its processes.
_CLUSTERS_VARIABLE = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
# Rows are shard names: the object store holds next to nothing.
_OBJECT_STORE_BYTES = 128 << 20


@contextlib.contextmanager
def ray_session(config: CapfiltConfig, stages: tuple[Stage, ...], interrupts: Interrupts) -> Iterator[None]:
    """Connect to ``cluster.address`` (or the job's own cluster), else start a local Ray; leave it at the end.

    A local Ray is given at least the CPUs that one worker of each stage asks for, so that a small machine
    streams too: its workers then share the cores.
    """
    if ray.is_initialized():
        interrupts.listen()
        yield
        return
    # Ray sets the address, and the runtime environment, of a submitted job.
    address = ray_address(config.cluster.address)
    settings: dict[str, Any] = {}
    if not address:
        pools = [getattr(config.cluster, stage) for stage in stages]
        needed = math.ceil(sum(pool.cpus * pool.min_workers for pool in pools))
        settings["num_cpus"] = max(os.cpu_count() or 1, needed)
        settings["object_store_memory"] = _OBJECT_STORE_BYTES
        settings["include_dashboard"] = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger("ray.data.exceptions").addFilter(_for_log_file_alone)
    os.environ.update(WORKER_ENVIRONMENT)
    # Ray's C++ side would print its own warnings between our lines; its log files keep them.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with joined_ray(address or "local", interrupts, **settings):
        _check_resources(config, stages, growing=bool(address))
        yield


def living_nodes() -> list[dict[str, Any]]:
    """Return what Ray says of each node that is there now."""
    return [node for node in ray.nodes() if node["Alive"]]


def _for_log_file_alone(record: logging.LogRecord) -> bool:
    """Keep the trace of a broken execution, 150 lines, off the terminal, by the mark that Ray Data's handler obeys."""
    record.__dict__["hide"] = True
    return True


@contextlib.contextmanager
def joined_ray(
    address: str, interrupts: Interrupts, *, patience_s: float = 20.0, **settings: Any
) -> Iterator[None]:
    """Join the Ray at an address, or start one (``"local"``), and leave it at the end.

    Raises CapfiltError, where nothing listens at the address after ``patience_s``.
    """
    try:
        try:
            _wait_for_listener(address, patience_s)
            listening = _loopback_only() if address == "local" else contextlib.nullcontext()
            with interrupts.delayed(), _without_stderr(), listening:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **settings)
        except (OSError, RuntimeError, ValueError) as error:
            raise CapfiltError(f"cluster.address {address!r}: cannot join Ray there: {error}") from error
        except Exception as error:
            # Ray has no type of its own for a node that was not up after 30 seconds, a time that nothing can change.
            if type(error) is not Exception:
                raise
            raise CapfiltError(
                f"Ray does not start on this machine: {error} If other work keeps it busy, do the same again later; "
                "`capfilt run --local` needs no Ray"
            ) from error
        yield
    finally:
        with interrupts.delayed():
            ray.shutdown()


def _wait_for_listener(address: str, patience_s: float) -> None:
    """Return once something listens at an address, as where a head has just been started. Raises OSError.

    Ray itself would try for ten minutes, and not hear a signal meanwhile.
    """
    # "auto" is what RAY_ADDRESS or the last Ray on this machine says; None where that is nothing, or to be started.
    place = services.canonicalize_bootstrap_address(address.removeprefix("ray://"))
    deadline = time.monotonic() + patience_s
    while place is not None:
        try:
            socket.create_connection(parse_address(place), timeout=10).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
        else:
            break


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Have a Ray that starts in here listen on 127.0.0.1 alone.

    By itself Ray takes the machine's own address for its node, whatever ``ray.init`` is given, and its control store,
    node manager and workers listen on all interfaces.
    """
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        with variables({_CLUSTERS_VARIABLE: "0"}):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Drop what Ray's C++ side says on the terminal while it starts; what fails comes as an exception."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as null:  # noqa: PTH123
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check_resources(config: CapfiltConfig, stages: tuple[Stage, ...], growing: bool) -> None:
    """Refuse a pool that no node can host, where Ray would wait for it forever; of a cluster that may grow, say so.

    Pools whose smallest sizes do not fit together run one after the other: that is said as well.
    """
    nodes = living_nodes()
    pools: dict[str, StageResources] = {stage: getattr(config.cluster, stage) for stage in stages}
    for resource, key in (("CPU", "cpus"), ("GPU", "gpus")):
        wanted = sum(getattr(pool, key) * pool.min_workers for pool in pools.values())
        there = sum(node["Resources"].get(resource, 0) for node in nodes)
        if wanted > there:
            _log.warning(
                "the stages want %g %ss at once, the cluster has %g: some will wait", wanted, resource, there
            )
    for stage, pool in pools.items():
        if not any(_has_room(node, pool) for node in nodes):
            labels = "".join(f", {name}={value}" for name, value in pool.labels.items())
            memory = f", {pool.memory_gb:g} GB" if pool.memory_gb else ""
            message = (
                f"cluster.{stage}: a worker wants {pool.cpus:g} CPUs and {pool.gpus:g} GPUs{memory}{labels}, and no "
                f"node of the cluster has that; lower what cluster.{stage} asks for, or add a node"
            )
            if not growing:
                raise CapfiltError(message)
            _log.warning("%s", message)


def _has_room(node: Mapping[str, Any], pool: StageResources) -> bool:
    """Tell whether an empty node could run one worker of a pool."""
    resources, labels = node["Resources"], node.get("Labels", {})
    wanted = {"CPU": pool.cpus, "GPU": pool.gpus, "memory": pool.memory_gb * 1e9}
    if any(resources.get(name, 0) < amount for name, amount in wanted.items()):
        return False
    # Ray also takes conditions, such as in(a, b) and !a, which it alone judges.
    return all(
        "(" in value or value.startswith("!") or labels.get(name) == value
        for name, value in pool.labels.items()
    )
