"""Keeps a Ray that runs on one machine off the network."""

import contextlib
from collections.abc import Iterator

from ray._private import ray_constants

from jobs.environment import variables

# Ray's switch for Windows and macOS, where it is off by default; read at import in each of its processes.
_VARIABLE = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR


@contextlib.contextmanager
def loopback_only(local: bool = True) -> Iterator[None]:
    """Have a Ray that starts in here listen on 127.0.0.1 alone; do nothing unless ``local``.

    By itself Ray takes the machine's own address for its node, whatever ``ray.init`` is told, and its control store,
    node manager and workers listen on all interfaces.
    """
    if not local:
        yield
        return
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        with variables({_VARIABLE: "0"}):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
