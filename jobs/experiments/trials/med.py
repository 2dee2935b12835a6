"""A MED of BLIP by the demo's recipe, on what an arm keeps: what it finds and what it writes."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jobs.demo.evaluate_med import evaluate_med
from jobs.demo.held_out import held_out_scenes
from jobs.demo.tower_vit import TOWER_MLP_RATIO, write_tower_vit
from jobs.demo.training_configs import trial_config
from jobs.experiments.task import Task
from jobs.experiments.trials.training import run_overrides, trained
from pipeline.corpus.checkpoint_files import run_folder
from schemas.pretrain import PretrainConfig


def train_and_judge(task: Task, times: int, overrides: Sequence[str]) -> dict[str, float]:
    """Train so many times a task's steps, or go on; return recalls and the share of true captions."""
    config = _config(replace(task, steps=times * task.steps), overrides)
    return evaluate_med(trained(config, task.log), held_out_scenes(task.num_scenes))


def _config(task: Task, overrides: Sequence[str]) -> PretrainConfig:
    begin = _vision_init(task)
    if task.after:
        begin = f"run.init_from={json.dumps(run_folder(_config(task.before(), overrides)))}"
    given = (
        *run_overrides(task.seed, task.steps),
        f"blip.vision.mlp_ratio={TOWER_MLP_RATIO}",
        begin,
        *overrides,
    )
    return trial_config("demo-blip-pretrain", task.folder, task.name, task.data, given)


def _vision_init(task: Task) -> str:
    """Write the ViT that sees already, in a folder of this training's own: two may begin at once."""
    folder = Path(task.folder, "vit", task.name)
    if not (folder / "config.json").exists():
        write_tower_vit(folder)
    return f"blip.vision.init={json.dumps(str(folder))}"
