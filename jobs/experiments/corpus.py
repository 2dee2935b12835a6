"""The corpus that all experiments choose from: the demo world, with many captions of each image, ranked; and what an
arm keeps of it as a folder of tars.
"""

import json
import random
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from jobs.demo.run import demo_config
from jobs.demo.world.scenes import Scene, is_true, normalise
from jobs.demo.world.site import scene_of, serving, write_url_list
from jobs.experiments.arms import Arm
from jobs.experiments.questions import NUM_CAPTIONS
from jobs.run import RunOptions, run
from pipeline.candidates import Candidate
from pipeline.corpus.records import Records
from pipeline.corpus.shard_files import read_tar, write_tar
from pipeline.corpus.shard_reader import committed_table
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.stages import Stage

# URLs are identities: the world is served at one port, so that equal seeds give equal corpora.
_PORT = 8423
_STAGES: tuple[Stage, ...] = ("crawl", "caption", "rank")


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image of the corpus, and every text that could be kept of it."""

    key: str
    uid: str
    scene: Scene
    candidates: tuple[Candidate, ...]


def make_corpus(folder: Path, num_urls: int, console: Console, num_captions: int = NUM_CAPTIONS) -> None:
    """Crawl, caption and rank the world, unless that is done. Raises CapfiltError where a shard fails."""
    urls = folder / "input" / "urls.parquet"
    with serving(_PORT, flaky=False) as base_url:
        if not urls.exists():
            urls.parent.mkdir(parents=True, exist_ok=True)
            write_url_list(urls, base_url, num_urls)
        config = demo_config(folder, urls, base_url, (f"caption.num_captions={num_captions}",))
        result = run(config, RunOptions(stages=_STAGES, local=True), console)
    if result.exit_code:
        raise CapfiltError(f"{folder}: the corpus of the experiment is not whole; see above")


def images(corpus: Path) -> Iterator[tuple[str, list[Image]]]:
    """Yield each shard's tar, relative to the corpus, and its images."""
    records = Records(Storage(str(corpus)))
    committed = records.shards(("crawl", "rank"))
    for (stage, source, shard), record in sorted(committed.items()):
        if stage != "crawl":
            continue
        rows = committed_table(records, committed["rank", source, shard].outputs["parquet"]).to_pylist()
        by_key: dict[str, list[Candidate]] = {}
        for row in rows:
            by_key.setdefault(row["key"], []).append(Candidate.of_row(row))
        samples = committed_table(
            records, record.outputs["parquet"], ("key", "uid", "url", "status")
        ).to_pylist()
        yield (
            record.outputs["tar"].path,
            [
                Image(
                    key=sample["key"],
                    uid=sample["uid"],
                    scene=scene_of(sample["url"]),
                    candidates=tuple(by_key.get(sample["key"], ())),
                )
                for sample in samples
                if sample["status"] == "ok"
            ],
        )


def write_arm(corpus: Path, arm: Arm, folder: Path) -> dict[str, float | int]:
    """Write what an arm keeps, as tars that any loader of WebDataset reads; return what can be said without training.

    Equal names of shards and keys give all arms the same images in the same order, but for those of which an arm keeps
    nothing.
    """
    texts: list[tuple[str, Scene]] = []
    num_images = 0
    for tar, shard in images(corpus):
        kept = {
            image.key: arm.keep(image.candidates, image.scene, random.Random(image.uid)) for image in shard
        }
        scenes = {image.key: image.scene for image in shard}
        texts += [(text, scenes[key]) for key, captions in kept.items() for text in captions]
        num_images += sum(map(bool, kept.values()))
        target = folder / "world" / f"{Path(tar).name.partition('.')[0]}.tar"
        if not target.exists():
            _write_tar(corpus / tar, kept, target)
    verdicts = [is_true(text, scene) for text, scene in texts]
    return {
        "images": num_images,
        "texts": len(texts),
        "true_share": sum(verdicts) / max(1, len(verdicts)),
        "distinct_share": len({normalise(text) for text, _ in texts}) / max(1, len(texts)),
        "words": sum(len(text.split()) for text, _ in texts) / max(1, len(texts)),
    }


def _write_tar(crawled: Path, kept: dict[str, list[str]], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".unfinished")
    with crawled.open("rb") as file:
        try:
            write_tar(
                unfinished,
                (
                    (key, {"jpg": members["jpg"], "json": json.dumps(kept[key]).encode()})
                    for key, members in read_tar(file)
                    if kept.get(key)
                ),
            )
        except tarfile.ReadError as error:
            raise CapfiltError(f"{crawled} is damaged ({error}); `capfilt verify` says more") from error
    unfinished.replace(target)
