"""Trainings by one recipe: a stage 1 of BLIP-2, a MED of BLIP; and what all trainings of experiments have in common."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.demo.evaluate_med import evaluate_med
from jobs.demo.evaluate_training import evaluate_retrieval
from jobs.demo.held_out import held_out_scenes
from jobs.demo.training_configs import trial_config
from jobs.experiments.task import Task
from jobs.pretrain import train_to_end
from pipeline.corpus.checkpoint_files import run_folder
from schemas.pretrain import PretrainConfig
from training.convert.load import load_trained


def judge_stage1(task: Task, overrides: Sequence[str]) -> dict[str, float]:
    """Train a stage 1 on an arm's tars with a seed, or go on; return recalls among new scenes, as shares of 1.

    Its image encoder is the demo's frozen one, the same for every arm.
    """
    stage = trained(stage1_config(task, overrides), task.log)
    return evaluate_retrieval(stage, held_out_scenes(task.num_scenes))


def judge_med(task: Task, times: int, overrides: Sequence[str]) -> dict[str, float]:
    """Train a MED so many times a task's steps, or go on; return recalls and the share of true captions."""
    config = _med_config(replace(task, steps=times * task.steps), overrides)
    return evaluate_med(trained(config, task.log), held_out_scenes(task.num_scenes))


def stage1_config(task: Task, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Return the config of a task's stage 1."""
    given = (*run_overrides(task.seed, task.steps), *overrides)
    return trial_config("demo-stage1", task.folder, task.name, task.data, given)


def run_overrides(seed: int, steps: int) -> tuple[str, ...]:
    """Return what sets a training's seed and length; a tenth of its steps warms up."""
    return (f"run.seed={seed}", f"optim.steps={steps}", f"optim.warmup_steps={max(1, steps // 10)}")


def train(config: PretrainConfig, log: Path) -> None:
    """Train to the last step, or go on. Raises TrainingFailedError where a signal stopped it before."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stderr(file):
        train_to_end(config)


def trained(config: PretrainConfig, log: Path) -> Any:
    """Do ``train``; return the model."""
    train(config, log)
    return load_trained(run_folder(config))


def _med_config(task: Task, overrides: Sequence[str]) -> PretrainConfig:
    given = [*run_overrides(task.seed, task.steps), *overrides]
    if task.after:
        # In place of the recipe's ViT.
        before = run_folder(_med_config(task.before(), overrides))
        given += ['blip.vision.init=""', f"run.init_from={json.dumps(before)}"]
    return trial_config("demo-blip-pretrain", task.folder, task.name, task.data, given)
