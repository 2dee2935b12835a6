"""The configs of the demo's trainings: the recipes, for the paths of one demo corpus. Imports no trainer."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pipeline.config import load_config
from schemas.pretrain import PretrainConfig

Captions = Literal["curated", "web"]
Family = Literal["opt", "t5"]
CAPTIONS: tuple[Captions, ...] = ("curated", "web")
FAMILIES: tuple[Family, ...] = ("opt", "t5")

_HERE = Path(__file__).resolve().parent
_WEIGHTS = _HERE / "weights"
_RECIPES = _HERE.parent / "recipes"
NUM_HELD_OUT = 200
HELD_OUT = "held-out"
# Of each list that ITC found, ITM sees so many.
RERANK = 10
WEB_CAPTIONS = "web-captions"
# Of the corpus; the recipes hold none out, so that they fit data of any size.
_HELD_OUT_IMAGES = 100


def stage1_config(corpus: Path, captions: Captions, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Return stage 1's recipe for the curated captions of a corpus, or for the web captions of the same images.

    The folder of web captions lacks the images that the curated side holds out, so nothing of it is held out.
    """
    if captions == "curated":
        return _config("demo-stage1", "demo-stage1", corpus, corpus, overrides)
    web = corpus / WEB_CAPTIONS / "world"
    return _config("demo-stage1", "demo-stage1-web", corpus, web, ["data.held_out=0", *overrides])


def stage2_config(corpus: Path, family: Family) -> PretrainConfig:
    """Return stage 2's recipe for a language model, to begin with the stage 1 of the curated captions."""
    name = f"demo-stage2-{family}"
    init_from = json.dumps(str(_run_folder(corpus, "demo-stage1")))
    return _config(name, name, corpus, corpus, [f"run.init_from={init_from}"])


def trial_config(
    recipe: str, folder: Path, name: str, data: Path, overrides: Sequence[str]
) -> PretrainConfig:
    """Return a recipe for a training under ``folder`` that reads a folder of tars."""
    return _config(recipe, name, folder, data, ["data.held_out=0", *overrides])


def reads_eva(corpus: Path) -> bool:
    """Tell whether the trainings of a demo read the EVA, so that transformers loads their exports."""
    return Path(stage1_config(corpus, "curated").vision.model).name == "tower"


def _config(recipe: str, name: str, corpus: Path, data: Path, overrides: Sequence[str]) -> PretrainConfig:
    return load_config(
        _RECIPES / f"{recipe}.toml",
        [
            f"run.name={json.dumps(name)}",
            f"run.output={json.dumps(str(corpus / 'checkpoints'))}",
            f"data.corpus.path={json.dumps(str(data))}",
            *_as_begun(corpus, name),
            *overrides,
        ],
        PretrainConfig,
    )


def _run_folder(corpus: Path, name: str) -> Path:
    return corpus / "checkpoints" / name.partition("-")[2].partition("-")[0] / name


def _as_begun(corpus: Path, name: str) -> Iterator[str]:
    """Yield overrides by which a demo of an earlier version goes on as it began.

    The first ones read the ranker's image encoder, held no images out for ``capfilt evaluate probe``, and took more
    steps.
    """
    first = _run_folder(corpus, "demo-stage1") / "config.json"
    if not first.exists():
        yield f"data.held_out={_HELD_OUT_IMAGES}"
        return
    begun = json.loads(first.read_text())
    encoder = _WEIGHTS / Path(begun["vision"]["model"]).name
    yield f"data.held_out={begun['data']['held_out']}"
    yield f"vision.model={json.dumps(f'local-dir:{encoder}')}"
    own = _run_folder(corpus, name) / "config.json"
    if own.exists():
        yield f"optim.steps={json.loads(own.read_text())['optim']['steps']}"
