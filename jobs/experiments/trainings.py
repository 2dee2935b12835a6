"""The trainings of experiments: those that have no result yet are done, one on each core at a time.

Two arms that keep the same texts and are trained the same way are one training, in whatever experiments they stand.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.demo.train_in_pairs import at_once
from jobs.experiments.questions import Question, question
from jobs.experiments.results import Trial
from jobs.experiments.task import Task
from pipeline.storage.storage import Storage

# With 200 a percentage point is chance.
NUM_SCENES = 1000


def train(tasks: Sequence[Task], question: Question, console: Console) -> float:
    """Do the trainings that have no result yet; return the CPU seconds of what they all needed first."""
    _take_results_of_others(tasks)
    missing = [task for task in tasks if not _result_file(task).exists()]
    seconds = 0.0
    if missing and question.judge and question.judge.prepare:
        [(_, seconds)] = at_once(partial(_prepare, missing[0]))
    while missing:
        now = list(ready(missing))[: len(os.sched_getaffinity(0))]
        names = ", ".join(f"{task.arm} with seed {task.seed}" for task in now)
        console.print(f"{question.name}: training {names}", highlight=False)
        outcomes = at_once(*(partial(_trial, task) for task in now))
        for task, (figures, cpu_seconds) in zip(now, outcomes, strict=True):
            _write_result(
                task,
                {"training": training_digest(task), "figures": figures, "cpu_seconds": round(cpu_seconds, 1)},
            )
        missing = [task for task in missing if task not in now]
    return seconds


def ready(missing: Sequence[Task]) -> Iterator[Task]:
    """Yield the tasks that wait for none of the others."""
    places = {(task.arm, task.seed) for task in missing}
    return (task for task in missing if (task.after, task.seed) not in places)


# -- results ----------------------------------------------------------------------------------------------------------


def read_trial(task: Task) -> Trial:
    """Return the result of a training that is done."""
    result = json.loads(_result_file(task).read_text())
    return Trial(arm=task.arm, seed=task.seed, figures=result["figures"], cpu_seconds=result["cpu_seconds"])


def _result_file(task: Task) -> Path:
    scenes = "" if task.num_scenes == NUM_SCENES else f".scenes-{task.num_scenes}"
    name = f"{task.arm}.seed-{task.seed}.steps-{task.steps}{scenes}.json"
    return task.root / "results" / task.question / name


def _write_result(task: Task, result: dict[str, Any]) -> None:
    path = _result_file(task).relative_to(task.root)
    write_json(task.root, str(path), result)


def write_json(root: Path, path: str, value: dict[str, Any]) -> None:
    """Write a file below the experiments' folder, whole or not at all."""
    Storage(str(root)).write(path, (json.dumps(value) + "\n").encode())


def _take_results_of_others(tasks: Sequence[Task]) -> None:
    """Give each task the result that an equal training of another experiment has already."""
    if not tasks:
        return
    results = (json.loads(file.read_text()) for file in sorted(tasks[0].root.glob("results/*/*.json")))
    known = {result["training"]: result for result in results if result.get("training")}
    for task in tasks:
        if not _result_file(task).exists() and (digest := training_digest(task)) in known:
            _write_result(task, known[digest])


def training_digest(task: Task) -> str:
    """Return a digest of all that a training and its judgement depend on; empty where that is more than a task says.

    That is so of an arm that goes on from another one, or makes a corpus of its own.
    """
    asked = question(task.question)
    arm = asked.arm(task.arm)
    if arm.keep is None or arm.after or asked.judge is None:
        return ""
    how = arm.train or asked.judge.train
    tars = [
        (tar.name, hashlib.sha256(tar.read_bytes()).hexdigest()) for tar in sorted(task.data.glob("*.tar"))
    ]
    return hashlib.sha256(repr((how, task.seed, task.steps, task.num_scenes, tars)).encode()).hexdigest()


# -- in a process of its own ------------------------------------------------------------------------------------------


def _prepare(task: Task) -> None:
    judge = question(task.question).judge
    assert judge is not None and judge.prepare is not None, "the caller has seen both"
    judge.prepare(task)


def _trial(task: Task) -> dict[str, float]:
    asked = question(task.question)
    assert asked.judge is not None, "an experiment with trainings has a judge"
    return (asked.arm(task.arm).train or asked.judge.train)(task)
