"""The crawl compared with what it is built on: CrawlWorker and img2dataset's own fetch, alternately, on the same URLs.

Each has a process of its own, held to as many cores as the worker has. Both resize alike, digest the body and write a
tar and a Parquet file. CrawlWorker also guards each fetch, checks every row, and commits: uploads with sync, record
last.
"""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.bench.fixtures.corpus import list_config, shard_task, write_url_list
from jobs.bench.fixtures.machine import Cost, Stopwatch, cost_ratio, cost_summary, costs_by_variant
from jobs.bench.fixtures.pictures import jpegs, mean_bytes
from jobs.bench.fixtures.server import serving
from pipeline.corpus.records import Records
from pipeline.intake.read_lists import read_lists
from pipeline.storage.scratch import temporary_folder
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig, CrawlConfig
from schemas.records import ShardTask

_ROUNDS = 3


def measure_crawl(images: int, size_px: tuple[int, int], cpus: int) -> dict[str, Any]:
    """Crawl a shard of ``images`` URLs a round, with each crawler in turn; ours decodes on ``cpus`` threads."""
    pictures = jpegs(size_px)
    with temporary_folder() as folder, serving(pictures) as host:
        config, tasks = _tasks(folder, host, images, _ROUNDS + 1, cpus)
        costs = costs_by_variant(
            {"capfilt": _crawl, "img2dataset": _download}, [(config, task) for task in tasks]
        )
    capfilt, reference = costs["capfilt"], costs["img2dataset"]
    assert all(cost.images == images for cost in capfilt + reference), "a crawler lost images"
    return {
        "images": images,
        "rounds": _ROUNDS,
        "cpus_a_worker": cpus,
        "size": "x".join(map(str, size_px)),
        "bytes_per_picture": mean_bytes(pictures),
        **{name: cost_summary(shards) for name, shards in costs.items()},
        "rate_ratio": cost_ratio("seconds", reference, capfilt),
        "cpu_ratio": cost_ratio("cpu_s", capfilt, reference),
    }


def _tasks(
    folder: Path, host: str, images: int, shards: int, cpus: int
) -> tuple[CapfiltConfig, list[ShardTask]]:
    """Take in a list of URLs; return the tasks of crawling its shards."""
    write_url_list(folder / "urls.parquet", images * shards, f"'http://{host}/' || n || '.jpg'")
    # One host stands for the whole web here: politeness to it would be all that is measured.
    crawl = {"allow_hosts": [host], "requests_per_host": 64, "rate_per_host": 1e6}
    cluster = {"crawl": {"cpus": cpus}}
    config = list_config(
        folder, folder / "urls.parquet", samples_per_shard=images, crawl=crawl, cluster=cluster
    )
    records = Records(Storage(config.corpus.path))
    read_lists(config, records, "bench")
    urls = sorted(records.url_shards().items())
    return config, [shard_task(config, "crawl", shard, urls=record) for (_, shard), record in urls]


def _crawl(config: CapfiltConfig, task: ShardTask) -> Cost:
    """Crawl a shard as a run does; runs in a process of its own."""
    from pipeline.stages.crawl import CrawlWorker

    _hold_to_cores(config)
    worker = CrawlWorker(config, Records(Storage(task.corpus)))
    with Stopwatch() as watch:
        record = worker(task)
    return watch.cost(record.images, **{part: record.seconds[part] for part in ("fetch", "decode", "write")})


def _hold_to_cores(config: CapfiltConfig) -> None:
    """Keep this process to as many cores as the worker has; the server shares them where there are no others."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(config.cluster.crawl.cpus)])


def _download(config: CapfiltConfig, task: ShardTask) -> Cost:
    """Download a shard with img2dataset's classes as its command line drives them; in a process of its own."""
    _hold_to_cores(config)
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
    return watch.cost(stored)


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
