"""The nodes of the Ray cluster that this process has joined."""

from typing import Any

import ray


def living_nodes() -> list[dict[str, Any]]:
    """Return what Ray says of each node that is there now."""
    return [node for node in ray.nodes() if node["Alive"]]
