"""Rounds of BLIP's bootstrapping on the demo world: captioner and filter from one MED, a corpus by them, a new MED.

The rounds of a seed are made once, for all experiments: a later one goes on from the folder of those before it.
"""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.bootstrap.rounds import Model, Rounds
from jobs.bootstrap.run import EXPORTED, BootstrapStopped, Step, steps
from jobs.demo.bootstrap import corpus_truth, demo_rounds
from jobs.demo.evaluate_med import evaluate_med
from jobs.demo.held_out import held_out_scenes
from jobs.experiments.task import Task
from jobs.experiments.trials.training import train
from jobs.experiments.world import require_served, served_world
from jobs.pretrain import TrainingFailedError
from pipeline.corpus.checkpoint_files import run_folder
from pipeline.corpus.records import Records
from pipeline.shards.shard_reader import committed_table
from pipeline.storage.local_files import moved_when_whole
from pipeline.storage.storage import Storage
from schemas.pretrain import PretrainConfig
from training.build import build_stage
from training.convert.export import export_model
from training.convert.load import load_trained
from training.distributed import World
from training.trainer.base_models import read_initial_weights

_PORT = 8424
_BASE_URL = f"http://127.0.0.1:{_PORT}"
# As the demo's own bootstrapping (7,200 and 720 where an experiment has 2,400).
_WEB_URLS, _HUMAN_SHARE = 3, 0.1
_FIRST_MED = "round 1: pretrain"


def crawl_world(task: Task) -> None:
    """Crawl the web and the images that people captioned, once for all trainings."""
    with _logged(task) as console, served_world(_PORT):
        rounds = rounds_of(task, 1)
        for step in steps(rounds, console, local=True):
            if step.name == _FIRST_MED:
                return require_served(rounds.corpus.corpus.path)
            _do(step)


def train_and_judge(task: Task, number: int, share: float) -> dict[str, float]:
    """Do the rounds up to a number, or go on; return the figures of its corpus and of the MED that learnt from it.

    Args:
        number: 0 is the web.
        share: of the steps that the recipes say.
    """
    rounds = rounds_of(task, max(1, number), share)
    with _logged(task) as console:
        for step in steps(rounds, console, local=True):
            _do(step)
            if number == 0 and step.name == _FIRST_MED:
                break
    return _judged(rounds, number, task)


def share_and_judge(task: Task, share: float) -> dict[str, float]:
    """Do one round with a single model as captioner and filter, or go on; it begins with the same MED."""
    apart, rounds = rounds_of(task, 1, share), rounds_of(task, 1, share, "one-model-")
    joint = joint_config(rounds, apart.run_folder("pretrain", 1))
    train(joint, task.log)
    for model in EXPORTED:
        _export_part(rounds, model, run_folder(joint))
    with _logged(task) as console:
        by_name = {step.name: step for step in steps(rounds, console, local=True)}
        for name in ("round 1: corpus", "round 2: pretrain"):
            _do(by_name[name])
    return _judged(rounds, 1, task)


@contextmanager
def _logged(task: Task) -> Iterator[Console]:
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("a") as file, contextlib.redirect_stderr(file):
        yield Console(file=file, soft_wrap=True)


def _do(step: Step) -> None:
    if step.is_done():
        return
    try:
        step.do()
    except BootstrapStopped as error:
        # BootstrapStopped cannot be pickled on its way to the process that asked.
        raise TrainingFailedError(str(error)) from error


# -- configs ----------------------------------------------------------------------------------------------------------


def rounds_of(task: Task, number: int, share: float = 1.0, prefix: str = "") -> Rounds:
    """Return the demo's bootstrapping with the seed and the steps of a task, in a folder of the seed."""
    world = task.root / "rounds"
    num_web = _WEB_URLS * task.num_urls
    path = world / f"{prefix}seed-{task.seed}.steps-{task.steps}"
    rounds = demo_rounds(
        world,
        _BASE_URL,
        number,
        num_web,
        round(_HUMAN_SHARE * num_web),
        [f"bootstrap.path={str(path)!r}"],
    )
    recipes = {model: _shortened(recipe, share, task.seed) for model, recipe in rounds.recipes.items()}
    return replace(rounds, recipes=recipes)


def _shortened(recipe: PretrainConfig, share: float, seed: int) -> PretrainConfig:
    optim = recipe.optim
    assert optim.steps is not None and optim.warmup_steps is not None, "the demo's recipes say both"
    lengths = {
        "steps": max(1, round(share * optim.steps)),
        "warmup_steps": round(share * optim.warmup_steps),
    }
    update: dict[str, Any] = {
        "run": recipe.run.model_copy(update={"seed": seed}),
        "optim": optim.model_copy(update=lengths),
    }
    return recipe.model_copy(update=update)


def joint_config(rounds: Rounds, med: str) -> PretrainConfig:
    """Return the training of captioner and filter as one model: all three losses, on what people wrote.

    LM is smoothed as the captioner's, ITC's soft targets rise and the steps are as the filter's.
    """
    recipe, apart = rounds.recipes["pretrain"], rounds.training("filter", 1)
    assert recipe.blip is not None and apart.blip is not None, "recipes of BLIP's stages have it"
    run = {"name": "joint", "output": f"{rounds.config.bootstrap.path}/checkpoints", "init_from": med}
    return recipe.model_copy(
        update={
            "run": recipe.run.model_copy(update=run),
            "data": recipe.data.model_copy(update={"corpus": apart.data.corpus}),
            "blip": recipe.blip.model_copy(update={"alpha_epochs": apart.blip.alpha_epochs}),
            "objective": rounds.recipes["captioner"].objective,
            "optim": apart.optim,
        }
    )


def _export_part(rounds: Rounds, model: Model, joint: str) -> None:
    """Write the captioner or the filter that one model is, as a corpus takes it."""
    folder = Path(rounds.model_folder(model, 1))
    if folder.exists():
        return
    config = rounds.training(model, 1)
    config = config.model_copy(update={"run": config.run.model_copy(update={"init_from": joint})})
    stage = build_stage(config, World(), "cpu")
    for weights in read_initial_weights(config):
        weights.load_into(stage)
    with moved_when_whole(folder) as unfinished:
        export_model(stage, unfinished)


# -- figures ----------------------------------------------------------------------------------------------------------


def _judged(rounds: Rounds, number: int, task: Task) -> dict[str, float]:
    stage = load_trained(rounds.run_folder("pretrain", number + 1))
    learnt = evaluate_med(stage, held_out_scenes(task.num_scenes))
    if number == 0:
        return learnt
    corpus = rounds.corpus_path(number)
    kept = corpus_truth(corpus)
    return learnt | {
        "kept_true": kept["true"],
        "images_kept": kept["images_kept"],
        "refused": _refused(corpus),
    }


def _refused(corpus: str) -> float:
    """Return the share of synthetic captions that the filter calls no match: BLIP's noise ratio."""
    records = Records(Storage(corpus))
    verdicts = [
        row["match_probability"] < 0.5
        for record in records.shards(("filter",)).values()
        for row in committed_table(records, record.outputs["parquet"]).to_pylist()
        if row["origin"] == "synthetic" and row["match_probability"] is not None
    ]
    return sum(verdicts) / max(1, len(verdicts))
