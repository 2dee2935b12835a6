"""What is asked of a corpus of very many shards: each command's CPU seconds, peak memory and, on S3, requests.

Every command is a process of its own, so that its start counts.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from jobs.bench.fixtures.commands import measured_command
from jobs.bench.fixtures.machine import Stopwatch
from jobs.bench.fixtures.many_shards import SOURCE, make_many_shards, many_shards_in, recipe_options
from jobs.bench.fixtures.s3 import S3Server, bucket_on, serving_s3
from pipeline.manifest.manifest import Manifest
from pipeline.storage.scratch import temporary_folder
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError

# The folder with the list of URLs, the corpus, and the S3 server that counts requests, if there is one.
_Place = tuple[Path, str, S3Server | None]

# Questions to the records alone.
_RECORD_QUERIES: dict[str, str] = {
    "shards by state": "SELECT stage, state, count(*), sum(rows_out) FROM shards GROUP BY ALL ORDER BY ALL",
    "progress": "SELECT * FROM progress",
    "outcomes": "SELECT * FROM outcomes",
    "throughput": "SELECT * FROM throughput",
}


def measure_scale(shards: int, on_s3: bool, only: str = "", folder: str | None = None) -> dict[str, Any]:
    """Make a corpus of so many shards, and run each command on it that reads records, listings or one shard.

    Args:
        only: those commands alone whose name has this in it.
        folder: see ``many_shards_in``; not with ``on_s3``.
    """
    if on_s3 and folder:
        raise CapfiltError("--folder: a corpus on the local S3 server is not kept; leave out one of the two")
    with ExitStack() as stack:
        with Stopwatch() as made:
            place, corpus, server = stack.enter_context(_on_s3(shards) if on_s3 else _on_disk(folder, shards))
        commands = [
            _measured(name, arguments, server)
            for name, arguments in _commands(corpus, recipe_options(place, corpus), shards).items()
            if only in name
        ]
    return {
        "shards": shards,
        "make_cpu_s": round(made.cpu_s, 1),
        "commands": commands,
    }


def _commands(corpus: str, recipe: list[str], shards: int) -> dict[str, list[str]]:
    """Return the arguments of each command, by the name that the table has for it."""
    last = f"{shards - 1:05d}"
    with Manifest(Storage(corpus)).open(shards=[(SOURCE, last)]) as query:
        [row] = query.rows("SELECT url FROM base.raw ORDER BY key LIMIT 1")
    of_shard = (
        f"SELECT uid, max(score) FROM candidates WHERE source = '{SOURCE}' AND shard = '{last}' GROUP BY uid"
    )
    return {
        "status": ["status", corpus],
        "runs": ["runs", corpus],
        "shards": ["shards", corpus],
        "stats": ["stats", corpus],
        **{f"sql: {name}": ["sql", corpus, sql] for name, sql in _RECORD_QUERIES.items()},
        "plan": ["plan", *recipe],
        "run, nothing to do": ["run", *recipe, "--local", "--json"],
        "verify --quick": ["verify", corpus, "--quick"],
        "sql: one shard's candidates": ["sql", corpus, of_shard],
        "trace by URL": ["trace", corpus, row["url"]],
    }


def _measured(name: str, arguments: list[str], server: S3Server | None) -> dict[str, Any]:
    if server is not None:
        server.requests.clear()
    figures = measured_command(arguments)
    row = {"command": name, "cpu_s": round(figures.cpu_s, 2), "peak_mib": figures.peak_bytes >> 20}
    return row if server is None else row | {"requests": len(server.requests)}


@contextmanager
def _on_disk(folder: str | None, shards: int) -> Iterator[_Place]:
    with many_shards_in(folder, shards) as (place, corpus):
        yield place, corpus, None


@contextmanager
def _on_s3(shards: int) -> Iterator[_Place]:
    with temporary_folder() as folder, serving_s3() as server, bucket_on(server.url, "bench-scale") as root:
        make_many_shards(folder, f"{root}/corpus", shards)
        yield folder, f"{root}/corpus", server
