"""Small corpora of the demo world, built by real runs, and what tests compare of them."""

import json
from pathlib import Path

from rich.console import Console

from jobs.demo.run import demo_config
from jobs.demo.world.site import write_url_list
from jobs.run import RunOptions, RunResult, run
from pipeline.corpus.records import Records
from pipeline.shards.shard_reader import committed_table
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig


def small_config(
    corpus: str, urls: Path, base_url: str, num_urls: int = 40, per_shard: int = 10, filtered: bool = False
) -> CapfiltConfig:
    """Return the demo recipe for a corpus of a few small shards, its URL list written to ``urls``.

    Args:
        filtered: with the demo's filter, as the demo itself.
    """
    if not urls.exists():
        write_url_list(urls, base_url, num_urls)
    config = demo_config(Path("/unused"), urls, base_url, filtered=filtered)
    return with_values(
        config, corpus={"path": corpus, "samples_per_shard": per_shard}, crawl={"timeout_s": 3.0}
    )


def with_values(config: CapfiltConfig, **sections: dict) -> CapfiltConfig:
    """Return a config with some keys of some sections changed, checked like any other."""
    values = config.model_dump()
    for section, changes in sections.items():
        values[section].update(changes)
    return CapfiltConfig.model_validate(values)


def do_run(config: CapfiltConfig, *, local: bool = True, **options: object) -> RunResult:
    """Run in this process, or with ``local=False`` on the Ray that is up (or a fresh one)."""
    return run(config, RunOptions(quiet=True, local=local, **options), Console(stderr=True))


def config_file(config: CapfiltConfig, path: Path) -> Path:
    """Write a config as the command line takes it."""
    path.write_text(json.dumps(config.model_dump(mode="json")))
    return path


def curated_files(corpus: str) -> dict[str, str]:
    """Return the sha256 of every committed curated file, by path."""
    committed = Records(Storage(corpus)).shards(("select",))
    return {file.path: file.sha256 for record in committed.values() for file in record.outputs.values()}


def committed_uids(corpus: str, stage: str = "select") -> list[str]:
    """Return the uids of every committed row of a stage, sorted, as a multiset."""
    records = Records(Storage(corpus))
    uids: list[str] = []
    for record in records.shards((stage,)).values():
        uids += committed_table(records, record.outputs["parquet"], ["uid"])["uid"].to_pylist()
    return sorted(uids)


def curated_rows(corpus: str) -> list[dict]:
    """Return every committed row of the table behind ``curated`` and ``dropped``."""
    records = Records(Storage(corpus))
    rows: list[dict] = []
    for record in records.shards(("select",)).values():
        rows += committed_table(records, record.outputs["parquet"]).to_pylist()
    return rows
