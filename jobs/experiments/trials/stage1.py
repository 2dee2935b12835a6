"""A stage 1 of BLIP-2 on the frozen image encoder of the demo: for as many steps, of as many images, for every arm.

What it finds among new scenes says what its captions have taught it.
"""

from collections.abc import Sequence

from jobs.demo.evaluate_training import evaluate_retrieval
from jobs.demo.held_out import held_out_scenes
from jobs.demo.training_configs import trial_config
from jobs.experiments.task import Task
from jobs.experiments.trials.training import run_overrides, trained
from schemas.pretrain import PretrainConfig


def train_and_judge(task: Task, overrides: Sequence[str]) -> dict[str, float]:
    """Train on an arm's tars with a seed, or go on; return recalls among new scenes, as shares of 1."""
    stage = trained(stage1_config(task, overrides), task.log)
    return evaluate_retrieval(stage, held_out_scenes(task.num_scenes))


def stage1_config(task: Task, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Return the config of a task's stage 1."""
    given = (*run_overrides(task.seed, task.steps), *overrides)
    return trial_config("demo-stage1", task.folder, task.name, task.data, given)
