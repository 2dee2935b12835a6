"""A Ray cluster of local nodes, in a process of its own that obeys lines on its standard input.

``python -m tests.cluster N`` prints one JSON object {address, gcs, nodes: [raylet pid, ...]} when a head and N more
nodes are up; the line ``kill N`` kills node N (and everything it runs) with -9; end of input takes the cluster down.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.processes import ROOT, descendants

CPUS_PER_NODE = 4


def main() -> None:
    """Serve until standard input ends."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": CPUS_PER_NODE,
            "include_dashboard": True,
            "dashboard_port": 0,
            # Not the usual port, which another Ray of this machine may have: without it no job can be submitted.
            "dashboard_agent_listen_port": 0,
            "object_store_memory": 100 << 20,
            "labels": {"capfilt-kind": "head"},
        },
    )
    nodes = [cluster.head_node]
    nodes += [
        cluster.add_node(num_cpus=CPUS_PER_NODE, object_store_memory=100 << 20)
        for _ in range(int(sys.argv[1]))
    ]
    cluster.wait_for_nodes()
    pids = [node.all_processes["raylet"][0].process.pid for node in nodes]
    addresses = {"address": f"http://{cluster.head_node.webui_url}", "gcs": cluster.address}
    print(json.dumps(addresses | {"nodes": pids}), flush=True)
    for line in sys.stdin:
        if line.strip() == "add":
            labels = {"capfilt-kind": "added"}
            nodes.append(
                cluster.add_node(num_cpus=CPUS_PER_NODE, object_store_memory=100 << 20, labels=labels)
            )
            print(nodes[-1].all_processes["raylet"][0].process.pid, flush=True)
            continue
        node = nodes[int(line.split()[1])]
        if line.startswith("drain"):
            print(drain(cluster.address, node.node_id, int(line.split()[2])), flush=True)
            continue
        below = descendants(node.all_processes["raylet"][0].process.pid)
        cluster.remove_node(node, allow_graceful=False)
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        print("killed", flush=True)
    cluster.shutdown()


def drain(address: str, node_id: str, seconds: int) -> str:
    """Tell a cluster that a node is preempted, as a cloud does; return whether it took the notice."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

    deadline_ms = time.time_ns() // 1_000_000 + seconds * 1000
    is_accepted, why = GcsClient(address=address).drain_node(
        node_id, DRAIN_NODE_REASON_PREEMPTION, "spot", deadline_ms
    )
    return "draining" if is_accepted else why


class ClusterProcess:
    """The cluster as a test sees it."""

    def __init__(self, process: subprocess.Popen, address: str, gcs: str, nodes: list[int]) -> None:
        self.process = process
        # Of the Jobs API, and what a driver joins.
        self.address, self.gcs = address, gcs
        self.raylets = nodes

    def add_node(self) -> int:
        """Add a node with the label ``capfilt-kind`` ``added``; return its number."""
        self.process.stdin.write("add\n")
        self.process.stdin.flush()
        self.raylets.append(int(self.process.stdout.readline()))
        return len(self.raylets) - 1

    def drain_node(self, number: int, seconds: int) -> None:
        """Give notice that a node will go in so many seconds."""
        self.process.stdin.write(f"drain {number} {seconds}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline().strip() == "draining"

    def kill_node(self, number: int) -> None:
        """Kill a node and wait until the cluster knows."""
        self.process.stdin.write(f"kill {number}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline().strip() == "killed"

    def kill_all(self) -> None:
        """Kill every node, the head and the drivers of its jobs among them, all at once."""
        for pid in [*descendants(self.process.pid), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout=60)


@contextlib.contextmanager
def local_cluster(token: str, more_nodes: int = 0) -> Iterator[ClusterProcess]:
    """Run a head and more nodes with token authentication while the block runs."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield from _local_cluster(token, more_nodes, folder)


def _local_cluster(token: str, more_nodes: int, folder: str) -> Iterator[ClusterProcess]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cluster", str(more_nodes)],
        cwd=ROOT,
        env=os.environ
        | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            # Where a job finds the address of its cluster: in Ray's usual folder lies that of the machine's last one.
            "RAY_TMPDIR": folder,
            # As after activating the environment on each node: a job's `python` has capfilt's libraries.
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        for line in process.stdout:
            if line.startswith("{"):
                up = json.loads(line)
                break
        else:
            raise AssertionError("the cluster did not start")
        yield ClusterProcess(process, **up)
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            ClusterProcess(process, "", "", []).kill_all()


if __name__ == "__main__":
    main()
