"""The demo's training: stage 1 on the curated captions and on the web's, then stage 2 with a tiny OPT and a tiny T5.

As with ``capfilt pretrain -c jobs/recipes/demo-stage1.toml``, checkpoints, metrics and manifest rows are
those of any run, and a run that is done is not done again.
"""

import json
import tarfile
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from jobs.demo.evaluate_training import evaluate_language, evaluate_retrieval
from jobs.demo.held_out import held_out_scenes, write_benchmark
from jobs.pretrain import pretrain
from pipeline.config import load_config
from pipeline.corpus.records import Records
from pipeline.corpus.shard_reader import committed_table
from pipeline.storage.storage import Storage
from schemas.pretrain import PretrainConfig
from training.convert.load import load_trained
from training.data.snapshot import take_snapshot
from training.trainer.run import run_folder

Captions = Literal["curated", "web"]
Family = Literal["opt", "t5"]
CAPTIONS: tuple[Captions, ...] = ("curated", "web")
FAMILIES: tuple[Family, ...] = ("opt", "t5")

_HERE = Path(__file__).resolve().parent
_WEIGHTS = _HERE / "weights"
RECIPES = _HERE.parent / "recipes"
NUM_HELD_OUT = 200
HELD_OUT = "held-out"
# Of the corpus; the recipes hold none out, so that they fit data of any size.
_HELD_OUT_IMAGES = 100
_WEB_CAPTIONS = "web-captions"


def train_demo(corpus: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Train on a demo corpus and evaluate the models: the figures by stage, as ``capfilt demo --json`` prints them.

    ``training_seconds`` are of the CPU: a busy machine does not stretch them.

    Args:
        corpus: the corpus's folder, its curated shards made.
        log: called with a line as each training begins.
    """
    began = time.process_time()
    # A second thread gains little on models of this size, and waits by spinning.
    torch.set_num_threads(1)
    write_web_captions(corpus)
    held_out = held_out_scenes(NUM_HELD_OUT)
    write_benchmark(held_out, corpus / HELD_OUT)

    def trained(config: PretrainConfig, what: str) -> Any:
        log(f"{what}: {config.optim.steps} steps of {config.optim.batch_size} images")
        pretrain(config)
        return load_trained(run_folder(config))

    stage1: dict[str, Any] = {}
    for captions in CAPTIONS:
        stage = trained(stage1_config(corpus, captions), f"stage 1 on {captions} captions")
        stage1[captions] = evaluate_retrieval(stage, held_out)
    stage2 = {}
    for family in FAMILIES:
        stage = trained(stage2_config(corpus, family), f"stage 2 with a frozen {family.upper()}")
        stage2[family] = evaluate_language(stage, held_out)
    return {
        "training_seconds": round(time.process_time() - began, 1),
        "stage1": stage1 | {"chance": 1 / NUM_HELD_OUT},
        "stage2": stage2,
    }


def stage1_config(corpus: Path, captions: Captions, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Return stage 1's recipe for the curated captions of a corpus, or for the web captions of the same images.

    The folder of web captions lacks the images that the curated side holds out, so nothing of it is held out.
    """
    return _config("demo-stage1", corpus, captions, overrides)


def stage2_config(corpus: Path, family: Family) -> PretrainConfig:
    """Return stage 2's recipe for a language model, to begin with the stage 1 of the curated captions."""
    folder = json.dumps(run_folder(stage1_config(corpus, "curated")))
    return _config(f"demo-stage2-{family}", corpus, "curated", [f"run.init_from={folder}"])


def reads_eva(corpus: Path) -> bool:
    """Tell whether the trainings of a demo read the EVA, so that transformers loads their exports."""
    return Path(stage1_config(corpus, "curated").vision.model).name == "tower"


def _config(recipe: str, corpus: Path, captions: Captions, overrides: Sequence[str]) -> PretrainConfig:
    path = corpus if captions == "curated" else corpus / _WEB_CAPTIONS / "world"
    name = recipe if captions == "curated" else f"{recipe}-web"
    held_out = [] if captions == "curated" else ["data.held_out=0"]
    return load_config(
        RECIPES / f"{recipe}.toml",
        [
            f"run.name={json.dumps(name)}",
            f"run.output={json.dumps(str(corpus / 'checkpoints'))}",
            f"data.corpus.path={json.dumps(str(path))}",
            *_as_begun(corpus),
            *held_out,
            *overrides,
        ],
        PretrainConfig,
    )


def _as_begun(corpus: Path) -> list[str]:
    """Return overrides by which a demo goes on as it began: the first ones read the ranker's image encoder.

    The first of all held no images out, as those now for ``capfilt evaluate probe``.
    """
    config = corpus / "checkpoints" / "stage1" / "demo-stage1" / "config.json"
    if not config.exists():
        return [f"data.held_out={_HELD_OUT_IMAGES}"]
    begun = json.loads(config.read_text())
    encoder = _WEIGHTS / Path(begun["vision"]["model"]).name
    return [
        f"data.held_out={begun['data']['held_out']}",
        f"vision.model={json.dumps(f'local-dir:{encoder}')}",
    ]


def write_web_captions(corpus: Path) -> None:
    """Copy the crawled shards, whose KEY.txt is the web caption, under the names of the curated ones.

    The folder is a WebDataset as others make them. Equal names of source and shards give both sides the same images
    in the same order, without those that the curated side holds out: all that differs is what is said of them.
    """
    records = Records(Storage(str(corpus)))
    snapshot = take_snapshot(stage1_config(corpus, "curated").data)
    held_out = {uid for shard in snapshot.shards for uid in shard.held_out}
    for (_, source, shard), record in records.shards(("crawl",)).items():
        samples = committed_table(records, record.outputs["parquet"], ("uid", "key")).to_pylist()
        without = {sample["key"] for sample in samples if sample["uid"] in held_out}
        copy = corpus / _WEB_CAPTIONS / source / f"{shard}.tar"
        if without or not copy.exists():
            _copy_without(corpus / record.outputs["tar"].path, copy, without)


def _copy_without(tar: Path, copy: Path, keys: Collection[str]) -> None:
    """Copy a tar, the samples of some keys left out; equal input gives equal bytes."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    unfinished = copy.with_suffix(".unfinished")
    with tarfile.open(tar) as old, tarfile.open(unfinished, "w") as new:
        for member in old:
            if member.name.partition(".")[0] not in keys:
                new.addfile(member, old.extractfile(member))
    unfinished.replace(copy)
