"""What the trainings of all experiments have in common."""

import contextlib
from pathlib import Path
from typing import Any

from jobs.pretrain import TrainingFailedError, pretrain
from pipeline.corpus.checkpoint_files import run_folder
from schemas.pretrain import PretrainConfig
from training.convert.load import load_trained


def run_overrides(seed: int, steps: int) -> tuple[str, ...]:
    """Return what sets a training's seed and length; a tenth of its steps warms up."""
    return (f"run.seed={seed}", f"optim.steps={steps}", f"optim.warmup_steps={max(1, steps // 10)}")


def train(config: PretrainConfig, log: Path) -> None:
    """Train to the last step, or go on. Raises TrainingFailedError where a signal stopped it before."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stderr(file):
        summary = pretrain(config)
    if summary.outcome != "done":
        raise TrainingFailedError(f"{config.run.name} was stopped; the same command goes on")


def trained(config: PretrainConfig, log: Path) -> Any:
    """Do ``train``; return the model."""
    train(config, log)
    return load_trained(run_folder(config))
