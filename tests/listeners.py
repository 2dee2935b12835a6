"""What a process and its descendants listen on, from /proc.

``python -m tests.listeners`` starts the Ray of a run, prints that as JSON and waits for a line.
"""

import ipaddress
import json
import os
import re
import struct
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

_LISTEN = "0A"
# What a command line is called here, by a part of it.
_NAMES = {
    "gcs_server": "gcs_server",
    "raylet/raylet": "raylet",
    "monitor.py": "monitor",
    "log_monitor.py": "log monitor",
    "dashboard.py": "dashboard head",
    "DashboardAgent": "dashboard agent",
    "RuntimeEnvAgent": "runtime env agent",
    "ray::": "worker",
}


def addresses_by_process(root: int) -> dict[str, set[str]]:
    """Return the addresses, without ports, that each kind of process below ``root`` listens on."""
    sockets = dict(_listening())
    addresses = defaultdict(set)
    for pid in _descendants(root):
        for inode in _socket_inodes(pid):
            if inode in sockets:
                addresses["driver" if pid == root else _name(pid)].add(sockets[inode])
    return dict(addresses)


def _listening() -> Iterator[tuple[str, str]]:
    """Yield (inode, address) of every listening TCP socket."""
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN:
                words = bytes.fromhex(fields[1].partition(":")[0])
                # Words of four bytes, each in the machine's order.
                packed = struct.pack(f">{len(words) // 4}I", *struct.unpack(f"={len(words) // 4}I", words))
                address = ipaddress.ip_address(packed)
                yield fields[9], str(getattr(address, "ipv4_mapped", None) or address)


def _descendants(root: int) -> list[int]:
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            children[int(stat.read_text().rpartition(")")[2].split()[1])].append(int(stat.parent.name))
        except OSError:  # ended
            continue
    pids = [root]
    for pid in pids:
        pids += children[pid]
    return pids


def _socket_inodes(pid: int) -> Iterator[str]:
    for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            target = os.readlink(descriptor)
        except OSError:  # closed
            continue
        if match := re.fullmatch(r"socket:\[(\d+)\]", target):
            yield match[1]


def _name(pid: int) -> str:
    command = Path(f"/proc/{pid}/cmdline").read_text()
    # "log_monitor.py" holds "monitor.py".
    parts = sorted((part for part in _NAMES if part in command), key=len)
    return _NAMES[parts[-1]] if parts else command.replace("\0", " ")


def main() -> None:
    """Start what a run starts, use a worker, and print what listens."""
    import ray

    from jobs.cluster.session import ray_session
    from jobs.interrupts import Interrupts
    from schemas.config import CapfiltConfig

    config = CapfiltConfig.model_validate(
        {"corpus": {"path": "corpus"}, "source": [{"name": "a", "input": ["a"]}]}
    )
    with Interrupts() as interrupts, ray_session(config, ("crawl",), interrupts):
        ray.get(ray.remote(lambda: None).remote())
        listeners = {
            name: sorted(places) for name, places in sorted(addresses_by_process(os.getpid()).items())
        }
        print(json.dumps({"listeners": listeners, "auth": os.environ.get("RAY_AUTH_MODE"),
                          "address": ray.get_runtime_context().gcs_address}), flush=True)  # fmt: skip
        sys.stdin.readline()


if __name__ == "__main__":
    main()
