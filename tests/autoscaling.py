"""A Ray on this machine that grows: a head without a GPU, and up to so many nodes of one GPU in name alone.

As ``ray.cluster_utils.AutoscalingCluster``, which asks for a file that Ray's wheel does not have and ends every Ray of
the machine.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ray.util import get_node_ip_address

from tests.processes import ROOT, descendants

OBJECT_STORE_BYTES = 100 << 20
# A node that nobody asks for any more goes after so long.
IDLE_MINUTES = 0.1
# By which Ray's provider of such nodes knows the head.
_HEAD_ID = "f" * 51 + "00000"


@dataclass(frozen=True, slots=True)
class GrowingCluster:
    """The cluster, as a test sees it."""

    address: str
    pid: int

    def num_gpu_nodes(self) -> int:
        """Return how many nodes there are beside the head."""
        return sum(map(_is_raylet, descendants(self.pid))) - 1


@contextlib.contextmanager
def growing_cluster(folder: Path, max_gpu_nodes: int, token: str) -> Iterator[GrowingCluster]:
    """Run the cluster while the block runs.

    Args:
        folder: for Ray's own files; a short path, since sockets are among them.
        token: of Ray's authentication.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"{get_node_ip_address()}:{port}"
    config = folder / "autoscaling.json"
    config.write_text(json.dumps(_config(address, max_gpu_nodes)))
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            *(f"--port={port}", "--num-cpus=4", "--num-gpus=0", "--include-dashboard=false"),
            *(f"--autoscaling-config={config}", f"--temp-dir={folder}", "--dashboard-agent-listen-port=0"),
            *("--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={OBJECT_STORE_BYTES}"),
        ],
        cwd=ROOT,
        env=os.environ
        | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_FAKE_CLUSTER": "1",
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_until_up(process, address)
        yield GrowingCluster(address, process.pid)
    finally:
        for pid in [process.pid, *descendants(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(timeout=60)


def _wait_until_up(process: subprocess.Popen, address: str) -> None:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + 120
    while not any(map(_is_raylet, descendants(process.pid))):
        assert process.poll() is None and time.monotonic() < deadline, "the head did not start"
        time.sleep(0.2)
    socket.create_connection((host, int(port)), timeout=60).close()


def _is_raylet(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].endswith(b"/raylet")
    return False


def _config(address: str, max_gpu_nodes: int) -> dict:
    """Return what Ray's autoscaler is to do, with each key that its schema's defaults do not give."""
    node = {"CPU": 1, "GPU": 1, "object_store_memory": OBJECT_STORE_BYTES}
    lists = (
        *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
        *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude"),
        "rsync_filter",
    )
    return {key: [] for key in lists} | {
        "cluster_name": "growing",
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 4}, "node_config": {}, "max_workers": 0},
            "gpu": {"resources": node, "node_config": {}, "min_workers": 0, "max_workers": max_gpu_nodes},
        },
        "head_node_type": "ray.head.default",
        "max_workers": max_gpu_nodes,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": IDLE_MINUTES,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
    }
