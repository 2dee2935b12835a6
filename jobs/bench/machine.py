"""What a measurement needs of the machine: clocks, peak memory, and a line that says where it was made. Linux."""

import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


class Stopwatch:
    """Wall-clock and CPU seconds of a block; CPU is that of every thread of this process."""

    seconds = 0.0
    cpu_s = 0.0

    def __enter__(self) -> "Stopwatch":
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start[0]
        self.cpu_s = time.process_time() - self._start[1]


def peak_bytes() -> int:
    """Return the most memory that this process ever held.

    Not ``getrusage``: what it reports outlives exec, so a child shows what its parent held when it forked.
    """
    return _kib("/proc/self/status", "VmHWM") * 1024


def describe_machine() -> dict[str, Any]:
    """Say where and when this was measured, and how busy the machine was."""
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "cpus": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "memory_gib": round(_kib("/proc/meminfo", "MemTotal") / 2**20),
        "python": platform.python_version(),
        "load_1m": round(os.getloadavg()[0], 1),
    }


def _kib(file: str, name: str) -> int:
    lines = (line.partition(":") for line in Path(file).read_text().splitlines())
    return next(int(value.split()[0]) for key, _, value in lines if key == name)
