"""``capfilt verify`` of very many samples: CPU seconds and peak memory, whole, and stopped and gone on with.

The differences are the same both times, or the benchmark fails: a file that is cut, and URLs that two shards have.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.bench.fixtures.commands import CommandCost, measured_command
from jobs.bench.fixtures.corpus import SOURCE, SyntheticCorpus, curated_corpus
from jobs.bench.fixtures.machine import Stopwatch, peak_bytes
from pipeline.storage.scratch import temporary_folder

_SHARD_SAMPLES = 10_000
# Headers and digests are what verification reads of an image.
_PICTURE = bytes(16)
# Shards are noted as fast as small ones are read: the last one must not be before the signal.
_POLL_S = 0.002


def measure_verify(samples: int) -> dict[str, Any]:
    """Make a corpus of so many samples, of which three of four have an image, damage it, and verify it twice."""
    with temporary_folder() as folder:
        shards = max(8, samples // _SHARD_SAMPLES)
        with Stopwatch() as made:
            corpus, _ = curated_corpus(folder, shards, samples * 3 // 4 // shards, [_PICTURE])
            _damage(corpus)
        command = ["verify", corpus.config.corpus.path, "--json"]
        cache = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
        whole = measured_command(command, exit_code=1, env=cache)
        stopped_bytes = _stopped(command, cache, shards // 2)
        rest = measured_command(command, exit_code=1, env=cache)
    assert _differences(whole) == _differences(rest), "the two verifications differ"
    return {
        "samples": samples,
        "shards": shards,
        "make_cpu_s": round(made.cpu_s, 1),
        "differences": len(_differences(whole)),
        "whole": _row(whole),
        "stopped": {"peak_bytes": stopped_bytes},
        "gone on with": _row(rest),
    }


def _row(cost: CommandCost) -> dict[str, Any]:
    return {
        "cpu_s": round(cost.cpu_s, 1),
        "peak_bytes": cost.peak_bytes,
        "read_before": json.loads(cost.stdout)["read_before"],
    }


def _differences(cost: CommandCost) -> list[dict[str, str]]:
    differences: list[dict[str, str]] = json.loads(cost.stdout)["differences"]
    return differences


def _damage(corpus: SyntheticCorpus) -> None:
    """Cut a file of the first shard, and give the last one the URLs and the samples of the second."""
    storage = corpus.records.storage
    records = corpus.records.shards()
    scores = records["rank", SOURCE, corpus.shards[0]].outputs["parquet"].path
    storage.write(scores, storage.read(scores)[:-7])
    urls, second, last = corpus.records.url_shards(), corpus.shards[1], corpus.shards[-1]
    for of in (
        {shard: urls[SOURCE, shard] for shard in (second, last)},
        {shard: records["crawl", SOURCE, shard] for shard in (second, last)},
    ):
        storage.write(of[last].outputs["parquet"].path, storage.read(of[second].outputs["parquet"].path))


def _stopped(command: list[str], env: Mapping[str, str], shards: int) -> int:
    """Verify until so many shards are noted, then stop as a scheduler does; return the most memory that it held."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *command],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    noted = Path(env["XDG_CACHE_HOME"], "capfilt", "verify")
    peak = 0
    while process.poll() is None and len(list(noted.glob("*/*.json"))) < shards:
        peak = max(peak, peak_bytes(process.pid))
        time.sleep(_POLL_S)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM, "it had ended before it was stopped"
    return peak
