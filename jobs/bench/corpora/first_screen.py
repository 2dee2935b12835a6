"""``capfilt look`` over the records of very many shards: when its first screen is there, and what its server holds.

The server is a process of its own, asked over HTTP as a browser does.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.request import urlopen

from jobs.bench.fixtures.machine import Stopwatch, cpu_seconds_of, peak_bytes
from jobs.bench.fixtures.many_shards import many_shards_in

# In order: the first is asked for as soon as the address is printed, while the server still prepares itself.
_PAGES = (
    ("first screen, at once", ""),
    ("first screen, again", ""),
    ("grid", "grid"),
    ("grid, lowest best score", "grid?sort=score"),
    ("runs", "runs"),
)


def measure_first_screen(shards: int, folder: str | None) -> dict[str, Any]:
    """Serve the page of a corpus of so many shards; time its start and its pages, and note its peak memory.

    Args:
        folder: see ``many_shards_in``.
    """
    with many_shards_in(folder, shards) as (_, corpus), _served(corpus) as (server, address, seconds):
        start = {"page": "address printed", "seconds": seconds, "cpu_s": cpu_seconds_of(server.pid)}
        pages = [_asked(name, address + path, server.pid) for name, path in _PAGES]
        return {"shards": shards, "peak_bytes": peak_bytes(server.pid), "pages": [start, *pages]}


@contextmanager
def _served(corpus: str) -> Iterator[tuple["subprocess.Popen[str]", str, float]]:
    """Start ``capfilt look``; yield its process, its address, and the seconds until that was printed."""
    command = [sys.executable, "-m", "jobs.cli", "look", corpus, "--no-browser"]
    with Stopwatch() as start:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert server.stdout is not None
        address = server.stdout.readline().strip()
    try:
        assert address, server.communicate()
        yield server, address, round(start.seconds, 2)
    finally:
        server.terminate()
        # What it says of the signal is not for whoever measures.
        server.communicate()


def _asked(name: str, address: str, server: int) -> dict[str, Any]:
    before = cpu_seconds_of(server)
    with Stopwatch() as watch, urlopen(address) as answer:
        answer.read()
    return {
        "page": name,
        "seconds": round(watch.seconds, 2),
        "cpu_s": round(cpu_seconds_of(server) - before, 2),
    }
