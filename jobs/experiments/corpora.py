"""The corpora that arms choose from: the demo world, with many captions of each image, ranked and, where an arm asks
the filter, filtered; and what an arm keeps of one as a folder of tars.
"""

import json
import random
import tarfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.demo.run import demo_config
from jobs.demo.world.scenes import Scene
from jobs.demo.world.site import scene_of, write_url_list
from jobs.experiments.arms import BASE, Arm, Variant
from jobs.experiments.facts import Facts, facts_of
from jobs.experiments.questions import NUM_CAPTIONS
from jobs.experiments.world import require_served, served_world
from jobs.run import RunOptions, run
from pipeline.candidates import Candidate
from pipeline.corpus.records import Records
from pipeline.intake.take_over import take_over_crawl
from pipeline.models.weights import filter_weights
from pipeline.runs.runner import LoadWorker, load_worker
from pipeline.shards.shard_files import read_tar, write_tar
from pipeline.shards.shard_reader import committed_table
from pipeline.storage.local_files import moved_when_whole
from pipeline.storage.storage import Storage
from schemas.config import FilterConfig
from schemas.errors import CapfiltError
from schemas.stages import Stage

_PORT = 8423


def make_corpus(
    root: Path,
    variant: Variant,
    num_urls: int,
    console: Console,
    filtered: bool = False,
    filter_folder: str = "",
) -> float:
    """Make a corpus, unless that is done; return the CPU seconds that it took.

    The world is crawled once, for the first corpus. Raises CapfiltError where a shard fails.

    Args:
        filter_folder: of another filter than the one that the demo ships.
    """
    began = time.process_time()
    base, folder = root / BASE.folder, root / variant.folder
    urls = base / "input" / "urls.parquet"
    if variant != BASE:
        make_corpus(root, BASE, num_urls, console)
        take_over_crawl(Records(Storage(str(base))), Records(Storage(str(folder))))
    with _served(base) as base_url:
        if not urls.exists():
            urls.parent.mkdir(parents=True, exist_ok=True)
            write_url_list(urls, base_url, num_urls)
        overrides = [f"caption.num_captions={NUM_CAPTIONS}", *variant.caption]
        stages: tuple[Stage, ...] = ("crawl", "caption", "rank")
        if filtered:
            overrides += filter_override(filter_folder)
            stages = (*stages, "filter")
        config = demo_config(folder, urls, base_url, overrides, filtered)
        result = run(config, RunOptions(stages=stages, local=True, load=_loader(variant)), console)
    if result.record.outcome == "interrupted":
        raise KeyboardInterrupt
    if result.exit_code:
        raise CapfiltError(f"{folder}: the corpus of the experiment is not whole; see above")
    require_served(str(folder))
    return time.process_time() - began


def _loader(variant: Variant) -> LoadWorker:
    if not variant.beam_search:
        return load_worker
    from jobs.experiments.beam_search import load_with_beam_search

    return load_with_beam_search


def _served(base: Path) -> AbstractContextManager[str]:
    """Return the world's server, which a crawled corpus does not need."""
    storage = Storage(str(base))
    if storage.is_corpus():
        records = Records(storage)
        crawled = {(source, shard) for _, source, shard in records.shards(("crawl",))}
        # A corpus that was killed before its list was read has no shards.
        if (listed := records.url_shards()) and set(listed) <= crawled:
            return nullcontext(f"http://127.0.0.1:{_PORT}")
    return served_world(_PORT)


def filter_override(named: str) -> list[str]:
    """Return the override for another filter than the demo's; none where none is named. Raises CapfiltError."""
    if not named:
        return []
    folder = Path(named).absolute()
    if not folder.is_dir():
        raise CapfiltError(
            f"--filter {named}: there is no such folder; name a filter of the demo's size, as "
            "`capfilt export` writes it"
        )
    filter_weights(FilterConfig(model=str(folder)))
    return [f"filter.model={json.dumps(str(folder))}"]


def write_arm(corpus: Path, arm: Arm, folder: Path) -> Facts:
    """Write what an arm keeps, as tars that any loader of WebDataset reads; return what can be said without training.

    Equal names of shards and keys give all arms the same images in the same order, but for those of which an arm keeps
    nothing.
    """
    assert arm.keep is not None, "an arm that makes its own corpus keeps nothing of this one"
    texts: list[tuple[list[str], Scene]] = []
    for tar, samples, candidates in _shards(corpus, arm.filtered):
        kept: dict[str, list[str]] = {}
        for sample in samples:
            key, scene = sample["key"], scene_of(sample["url"])
            kept[key] = arm.keep(candidates.get(key, ()), scene, random.Random(sample["uid"]))
            texts.append((kept[key], scene))
        target = folder / "world" / f"{Path(tar).name.partition('.')[0]}.tar"
        if not target.exists():
            _write_tar(corpus / tar, kept, target)
    return facts_of(texts)


def _shards(
    corpus: Path, filtered: bool
) -> Iterator[tuple[str, list[dict[str, Any]], dict[str, list[Candidate]]]]:
    """Yield each shard's tar, relative to the corpus, the samples in it, and by key every text that could be kept.

    Args:
        filtered: with the filter's verdicts.
    """
    records = Records(Storage(str(corpus)))
    judged_by: Stage = "filter" if filtered else "rank"
    committed = records.shards(("crawl", judged_by))
    for (stage, source, shard), record in sorted(committed.items()):
        if stage != "crawl":
            continue
        candidates: dict[str, list[Candidate]] = {}
        judged = committed[judged_by, source, shard].outputs["parquet"]
        for row in committed_table(records, judged).to_pylist():
            candidates.setdefault(row["key"], []).append(Candidate.of_row(row))
        columns = ("key", "uid", "url", "status")
        samples = committed_table(records, record.outputs["parquet"], columns).to_pylist()
        yield record.outputs["tar"].path, [row for row in samples if row["status"] == "ok"], candidates


def _write_tar(crawled: Path, kept: dict[str, list[str]], target: Path) -> None:
    with crawled.open("rb") as file, moved_when_whole(target) as unfinished:
        samples = (
            (key, {"jpg": members["jpg"], "json": json.dumps(kept[key]).encode()})
            for key, members in read_tar(file)
            if kept.get(key)
        )
        try:
            write_tar(unfinished, samples)
        except tarfile.ReadError as error:
            raise CapfiltError(f"{crawled} is damaged ({error}); `capfilt verify` says more") from error
