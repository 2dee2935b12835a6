"""A stage 2 of BLIP-2 with the demo's tiny OPT, behind a stage 1 on the same images and texts, or behind none.

The model is asked three times on its way, as figure 5 of the paper asks it.
"""

import json
from dataclasses import replace

from jobs.demo.evaluate_training import evaluate_language
from jobs.demo.held_out import held_out_scenes
from jobs.demo.training_configs import trial_config
from jobs.experiments.task import Task
from jobs.experiments.trials.training import run_overrides, stage1_config, train
from pipeline.corpus.checkpoint_files import SavedCheckpoints, run_folder
from pipeline.storage.local_files import moved_when_whole
from training.build import build_stage
from training.convert.export import export_model
from training.convert.load import load_trained
from training.distributed import World

_LOOKS = ("_first", "_second", "")


def train_and_judge(task: Task, stage1_times: int) -> dict[str, float]:
    """Train, or go on; return the caption loss and the share of true captions after each third of the steps.

    Args:
        stage1_times: so many times the steps of stage 2 for the stage 1 before it; 0: it keeps its random weights.
    """
    before = replace(task, prefix="stage1-", steps=max(1, stage1_times) * task.steps)
    begin = _trained_stage1(before) if stage1_times else _fresh_stage1(before)
    third = task.steps // len(_LOOKS)
    overrides = (
        *run_overrides(task.seed, len(_LOOKS) * third),
        f"run.init_from={json.dumps(begin)}",
        f"checkpoint.every_steps={third}",
        f"checkpoint.keep_every={third}",
    )
    config = trial_config("demo-stage2-opt", task.folder, task.name, task.data, overrides)
    train(config, task.log)
    saved = SavedCheckpoints(run_folder(config))
    scenes = held_out_scenes(task.num_scenes)
    figures: dict[str, float] = {}
    # A training that was stopped on its way has more checkpoints than these.
    path_by_step = {record.step: record.path for record in saved.committed()}
    for number, look in enumerate(_LOOKS, 1):
        asked = evaluate_language(load_trained(saved.storage.url(path_by_step[number * third])), scenes)
        figures |= {
            f"caption_loss{look}": asked["caption_loss"],
            f"true_captions{look}": asked["true_share"],
        }
    return figures


def _trained_stage1(task: Task) -> str:
    config = stage1_config(task)
    train(config, task.log)
    return run_folder(config)


def _fresh_stage1(task: Task) -> str:
    """Write a stage 1 with the random weights of its seed; return its folder."""
    folder = task.folder / "fresh" / task.name
    if not folder.exists():
        stage = build_stage(stage1_config(replace(task, steps=1)), World(), "cpu")
        with moved_when_whole(folder) as unfinished:
            export_model(stage, unfinished)
    return str(folder)
