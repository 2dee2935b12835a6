"""The crawl beside what it is built on: CrawlWorker and img2dataset's own fetch, in turn, on the same URLs.

Each has a process of its own. Both resize alike, digest the body and write a tar and a Parquet file. Ours also
guards each fetch, checks every row, and commits: uploads with sync, record last.
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.bench.fixtures.machine import Stopwatch, peak_bytes
from jobs.bench.fixtures.pictures import jpeg
from jobs.bench.fixtures.server import serving
from pipeline.corpus.records import Records
from pipeline.corpus.scratch import temporary_folder
from pipeline.corpus.storage import Storage
from pipeline.intake.read_lists import read_lists
from schemas.config import CapfiltConfig, CrawlConfig
from schemas.records import ShardTask

_PICTURES = 16
_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    """What one shard cost a crawler."""

    images: int
    seconds: float
    cpu_s: float
    peak_bytes: int
    parts: dict[str, float] = field(default_factory=dict)


def measure_crawl(images: int, size_px: tuple[int, int]) -> dict[str, Any]:
    """Crawl a shard of ``images`` URLs a round, with each crawler in turn."""
    pictures = [jpeg(seed, size_px) for seed in range(_PICTURES)]
    rounds: dict[str, list[_Shard]] = {"capfilt": [], "img2dataset": []}
    one_process = partial(ProcessPoolExecutor, 1, get_context("spawn"))
    with (
        temporary_folder() as folder,
        serving(pictures) as host,
        one_process() as capfilt,
        one_process() as reference,
    ):
        # The first round imports libraries and warms caches: not counted.
        config, tasks = _tasks(folder, host, images, _ROUNDS + 1)
        for task in tasks:
            rounds["capfilt"].append(capfilt.submit(_crawl, config, task).result())
            rounds["img2dataset"].append(reference.submit(_download, config, task).result())
    measured = {name: _summary(shards) for name, shards in rounds.items()}
    pairs = list(zip(rounds["capfilt"], rounds["img2dataset"], strict=True))[1:]
    assert all(shard.images == images for pair in pairs for shard in pair), "a crawler lost images"
    return {
        "images": images,
        "rounds": _ROUNDS,
        "size": "x".join(map(str, size_px)),
        "bytes_per_picture": sum(map(len, pictures)) // len(pictures),
        **measured,
        "rate_ratio": round(median(reference.seconds / capfilt.seconds for capfilt, reference in pairs), 3),
        "cpu_ratio": round(median(capfilt.cpu_s / reference.cpu_s for capfilt, reference in pairs), 3),
    }


def _summary(shards: list[_Shard]) -> dict[str, Any]:
    """Return the medians of the counted rounds, and the peak of all."""
    counted = shards[1:]
    total = sum(shard.seconds for shard in counted)
    return {
        "images_per_s": round(median(shard.images / shard.seconds for shard in counted), 1),
        "cpu_ms_per_image": round(median(1000 * shard.cpu_s / shard.images for shard in counted), 2),
        "peak_bytes": max(shard.peak_bytes for shard in shards),
        "share": {
            part: round(sum(shard.parts[part] for shard in counted) / total, 3) for part in counted[0].parts
        },
    }


def _tasks(folder: Path, host: str, images: int, shards: int) -> tuple[CapfiltConfig, list[ShardTask]]:
    """Take in a list of URLs; return the tasks of crawling its shards."""
    numbers = range(images * shards)
    table = {"url": [f"http://{host}/{number}.jpg" for number in numbers],
             "caption": [f"the caption that a page gives picture {number}" for number in numbers]}  # fmt: skip
    pq.write_table(pa.table(table), folder / "urls.parquet")
    config = CapfiltConfig.model_validate(
        {
            "corpus": {"path": str(folder / "corpus"), "samples_per_shard": images},
            "source": [{"name": "bench", "input": [str(folder / "urls.parquet")]}],
            # One host stands for the whole web here: politeness to it would be all that is measured.
            "crawl": {"allow_hosts": [host], "requests_per_host": 64, "rate_per_host": 1e6},
        }
    )
    records = Records(Storage(config.corpus.path))
    read_lists(config, records, "bench")
    return config, [
        ShardTask(
            corpus=config.corpus.path,
            stage="crawl",
            source=source,
            kind="web",
            shard=shard,
            run_id="bench",
            fingerprint="bench",
            inputs={"urls": record},
        )
        for (source, shard), record in sorted(records.url_shards().items())
    ]


def _crawl(config: CapfiltConfig, task: ShardTask) -> _Shard:
    """Crawl a shard as a run does; runs in a process of its own."""
    from pipeline.stages.crawl import CrawlWorker

    worker = CrawlWorker(config, Records(Storage(task.corpus)))
    with Stopwatch() as watch:
        record = worker(task)
    parts = {part: record.seconds[part] for part in ("fetch", "decode", "write")}
    return _Shard(
        images=record.images,
        seconds=watch.seconds,
        cpu_s=watch.cpu_s,
        peak_bytes=peak_bytes(),
        parts=parts,
    )


def _download(config: CapfiltConfig, task: ShardTask) -> _Shard:
    """Download a shard with img2dataset's classes as its command line drives them; in a process of its own."""
    path = Storage(task.corpus).url(task.inputs["urls"].outputs["parquet"].path)
    table = pq.read_table(path, columns=["url", "captions"])
    rows = pa.table({"url": table["url"], "caption": [texts[0] for texts in table["captions"].to_pylist()]})
    with temporary_folder() as folder:
        downloader = _downloader(config.crawl, folder)
        with pa.ipc.new_file(str(folder / "rows.arrow"), rows.schema) as writer:
            writer.write_table(rows)
        with Stopwatch() as watch:
            downloader.download_shard((0, str(folder / "rows.arrow")))
        stored = json.loads((folder / "00000_stats.json").read_text())["successes"]
    return _Shard(images=stored, seconds=watch.seconds, cpu_s=watch.cpu_s, peak_bytes=peak_bytes())


def _downloader(config: CrawlConfig, folder: Path) -> Any:
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    return Downloader(
        sample_writer_class=WebDatasetSampleWriter,
        resizer=Resizer(
            image_size=config.image_size_px,
            resize_mode=config.resize_mode,
            resize_only_if_bigger=config.resize_only_if_bigger,
            encode_quality=config.encode_quality,
            encode_format="jpg",
        ),
        thread_count=config.threads,
        save_caption=True,
        extract_exif=False,
        output_folder=str(folder),
        column_list=["url", "caption"],
        timeout=config.connect_timeout_s,
        number_sample_per_shard=100_000,
        oom_shard_count=5,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,
        user_agent_token=None,
        disallowed_header_directives=None,
    )
