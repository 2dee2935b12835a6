"""Object storage: small writes and reads beside s3fs, on one local S3 server, and the requests of a small run."""

import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from jobs.bench.fixtures.machine import Stopwatch
from jobs.bench.fixtures.s3 import S3Request, bucket_on, serving_s3, start_objects
from jobs.bench.fixtures.server import serving_elsewhere
from jobs.demo.run import demo_config
from jobs.demo.world.site import serving, write_url_list
from jobs.run import RunOptions, run
from pipeline.storage.scratch import temporary_folder
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig
from schemas.errors import CapfiltError
from schemas.stages import STAGES

_BUCKET = "bench-storage"
_THREADS = 8
# A record without its histograms has about as many.
_BYTES = 2000
_KINDS = ("LIST", "GET", "HEAD", "PUT", "POST", "DELETE")
_URLS_A_SHARD = 10
_SHARD = re.compile(r"[^~]/\d{5}\b(?<!/~empty/00000)")


def measure_storage(operations: int, shards: int, rounds: int) -> dict[str, Any]:
    """Create and read small objects in turn with s3fs, then run the demo's stages on S3 and count their requests.

    Args:
        operations: objects created and read a round, by eight threads.
        shards: of the run that is counted.
    """
    with temporary_folder() as folder:
        rates = _rates(operations, rounds)
        requests = _counted_runs(folder, shards)
    return {"operations": rates, "requests": requests}


# -- rates -----------------------------------------------------------------------------------------------------------


def _rates(operations: int, rounds: int) -> list[dict[str, Any]]:
    """Return objects a second and CPU time an object; the server is another process."""
    with serving_elsewhere(start_objects) as host, bucket_on(f"http://{host}", _BUCKET):
        ways = {"capfilt": _capfilt_way(), "s3fs": _s3fs_way()}
        stopwatches: dict[tuple[str, str], list[Stopwatch]] = {}
        for number in range(rounds + 1):
            for way, calls in ways.items():
                for what, call in calls.items():
                    names = [f"{way}/{number}/{item}" for item in range(operations)]
                    with Stopwatch() as watch, ThreadPoolExecutor(_THREADS) as threads:
                        list(threads.map(call, names))
                    # The first round opens connections.
                    if number:
                        stopwatches.setdefault((what, way), []).append(watch)
    return [_compared(what, stopwatches, operations) for what in ("create", "read")]


def _compared(
    what: str, stopwatches: dict[tuple[str, str], list[Stopwatch]], operations: int
) -> dict[str, Any]:
    ours, reference = stopwatches[what, "capfilt"], stopwatches[what, "s3fs"]
    pairs = list(zip(ours, reference, strict=True))
    return {
        "operation": what,
        "capfilt_per_s": round(median(operations / watch.seconds for watch in ours), 1),
        "s3fs_per_s": round(median(operations / watch.seconds for watch in reference), 1),
        "rate_ratio": round(median(theirs.seconds / mine.seconds for mine, theirs in pairs), 2),
        "capfilt_cpu_ms": round(median(1000 * watch.cpu_s / operations for watch in ours), 3),
        "s3fs_cpu_ms": round(median(1000 * watch.cpu_s / operations for watch in reference), 3),
        "cpu_ratio": round(median(mine.cpu_s / theirs.cpu_s for mine, theirs in pairs), 2),
    }


def _capfilt_way() -> dict[str, Callable[[str], object]]:
    storage = Storage(f"s3://{_BUCKET}")
    return {"create": lambda name: storage.create(name, b"x" * _BYTES), "read": storage.read}


def _s3fs_way() -> dict[str, Callable[[str], object]]:
    try:
        from s3fs import S3FileSystem
    except ImportError as error:
        raise CapfiltError(f"{error}: s3fs is what capfilt is compared with; pip install s3fs") from error
    files = S3FileSystem(skip_instance_cache=True)
    return {
        "create": lambda name: files.pipe_file(f"{_BUCKET}/{name}", b"x" * _BYTES, mode="create"),
        "read": lambda name: files.cat_file(f"{_BUCKET}/{name}"),
    }


# -- requests --------------------------------------------------------------------------------------------------------


def _counted_runs(folder: Path, shards: int) -> list[dict[str, Any]]:
    """Make a corpus stage by stage, then run once more; return the requests of each, for a shard and for the run."""
    rows = []
    with serving_s3() as server, bucket_on(server.url, _BUCKET), serving(flaky=False) as world:
        config = _config_on_bucket(folder, world, shards)
        # Without a filter, as the config is.
        for stages in (*((stage,) for stage in STAGES if stage != "filter"), STAGES):
            server.requests.clear()
            result = run(config, RunOptions(quiet=True, local=True, stages=stages), Console(quiet=True))
            assert result.exit_code == 0, result.record
            work = "nothing to do" if stages == STAGES else stages[0]
            of_shards = Counter(map(_kind, filter(_is_of_a_shard, server.requests)))
            of_run = Counter(map(_kind, server.requests)) - of_shards
            rows.append(
                {"work": work, "for": "a shard"} | {kind: of_shards[kind] / shards for kind in _KINDS}
            )
            rows.append({"work": work, "for": "the run"} | {kind: of_run[kind] for kind in _KINDS})
    return rows


def _is_of_a_shard(request: S3Request) -> bool:
    """Tell whether a request names a shard; a POST deletes the notes of a shard's attempts, named in its body."""
    return request.kind == "POST" or _SHARD.search(request.key) is not None


def _kind(request: S3Request) -> str:
    return "PUT" if request.kind == "PART" else request.kind


def _config_on_bucket(folder: Path, world: str, shards: int) -> CapfiltConfig:
    urls = folder / f"{shards}.parquet"
    write_url_list(urls, world, shards * _URLS_A_SHARD)
    values = demo_config(Path("/unused"), urls, world, filtered=False).model_dump()
    values["corpus"] |= {"path": f"s3://{_BUCKET}/{shards}", "samples_per_shard": _URLS_A_SHARD}
    return CapfiltConfig.model_validate(values)
