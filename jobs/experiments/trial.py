"""One training of an experiment, in a process of its own, and what it has learnt.

The judge is a stage 1 of BLIP-2 on the frozen image encoder of the demo, the same for every arm: for as many steps, of
as many images. What it finds among new scenes says what its captions have taught it.
"""

import contextlib
from pathlib import Path

from jobs.demo.evaluate_training import evaluate_retrieval
from jobs.demo.held_out import held_out_scenes
from jobs.demo.training_configs import trial_config
from jobs.pretrain import TrainingFailedError, pretrain
from pipeline.corpus.checkpoint_files import run_folder
from training.convert.load import load_trained


def train_and_judge(
    folder: str, arm: str, data: str, seed: int, steps: int, num_scenes: int
) -> dict[str, float]:
    """Train on an arm's tars with a seed, or go on; return recalls among new scenes, as shares of 1."""
    config = trial_config(
        Path(folder),
        f"{arm}-{seed}-{steps}",
        Path(data),
        (f"run.seed={seed}", f"optim.steps={steps}", f"optim.warmup_steps={max(1, steps // 10)}"),
    )
    log = Path(folder, "logs", f"{config.run.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stderr(file):
        summary = pretrain(config)
    if summary.outcome != "done":
        raise TrainingFailedError(f"{config.run.name} was stopped; the same command goes on")
    return evaluate_retrieval(load_trained(run_folder(config)), held_out_scenes(num_scenes))
