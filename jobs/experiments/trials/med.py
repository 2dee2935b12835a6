"""A MED of BLIP by the demo's recipe, on what an arm keeps: what it finds and what it writes."""

import json
from collections.abc import Sequence
from dataclasses import replace

from jobs.demo.evaluate_med import evaluate_med
from jobs.demo.held_out import held_out_scenes
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
    given = [*run_overrides(task.seed, task.steps), *overrides]
    if task.after:
        # In place of the recipe's ViT.
        before = run_folder(_config(task.before(), overrides))
        given += ['blip.vision.init=""', f"run.init_from={json.dumps(before)}"]
    return trial_config("demo-blip-pretrain", task.folder, task.name, task.data, given)
