"""All of an experiment that is missing: the corpora, what each arm keeps, a training for each arm and seed."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.demo.train_in_pairs import at_once
from jobs.experiments.arms import Arm
from jobs.experiments.corpora import CorpusOptions, make_corpus, write_arm
from jobs.experiments.facts import Facts
from jobs.experiments.judges import Judge
from jobs.experiments.questions import Question, question
from jobs.experiments.results import Results, Trial
from jobs.experiments.task import Task
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError, did_you_mean

_SEEDS, _HEADLINE_SEEDS = 3, 5
# With 200 a percentage point is chance.
_NUM_SCENES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How much of an experiment is done; the defaults are those of docs/experiments.md."""

    arms: tuple[str, ...] = ()
    # None: three, and five of the headline arms.
    seeds: int | None = None
    # None: the judge's own.
    steps: int | None = None
    num_urls: int = 2400
    num_scenes: int = _NUM_SCENES
    # Empty: the one that the demo ships.
    filter_folder: str = ""


def run_experiment(question: Question, root: Path, extent: Extent, console: Console) -> Results:
    """Do what is missing of an experiment in a folder, and return all that came out. Safe to repeat and to kill."""
    arms = _arms(question, extent.arms)
    _require_same_world(root, extent.num_urls)
    facts = _curate(question, arms, root, extent, console)
    trials: list[Trial] = []
    steps = 0
    if question.judge:
        steps = extent.steps or question.judge.steps
        trained = [arm for arm in arms if arm.trained or extent.arms]
        tasks = [
            _task(question, arm, seed, root, extent, question.judge)
            for seed in range(extent.seeds or _HEADLINE_SEEDS)
            for arm in trained
            if extent.seeds or seed < _SEEDS or arm.name in question.headline
        ]
        _train(tasks, question.judge, console)
        trials = [_read(task) for task in tasks]
    return Results(question=question, facts=facts, trials=trials, steps=steps, num_scenes=extent.num_scenes)


def _arms(question: Question, named: Sequence[str]) -> list[Arm]:
    """Return the arms that are asked for, and those whose trainings they go on from."""
    known = [arm.name for arm in question.arms]
    for name in named:
        if name not in known:
            raise CapfiltError(f"--arm {name!r}: {question.name} has no such arm{did_you_mean(name, known)}")
    wanted = set(named or known)
    for arm in reversed(question.arms):
        if arm.name in wanted and arm.after:
            wanted.add(arm.after)
    return [arm for arm in question.arms if arm.name in wanted]


def _require_same_world(root: Path, num_urls: int) -> None:
    """Refuse a folder whose corpus has another size: its results would not be comparable."""
    file = root / "experiment.json"
    if not file.exists():
        if root.exists() and any(root.iterdir()):
            raise CapfiltError(
                f"--out {root}: the folder holds something other than experiments; name another one"
            )
        _write_json(root, file.name, {"urls": num_urls})
    if (begun := json.loads(file.read_text())["urls"]) != num_urls:
        raise CapfiltError(f"--urls {num_urls}: {root} has begun with {begun}; name another folder")


# -- corpora ----------------------------------------------------------------------------------------------------------


def _curate(
    question: Question, arms: Sequence[Arm], root: Path, extent: Extent, console: Console
) -> dict[str, Facts]:
    """Make the corpora that arms choose from, and write what each keeps."""
    choosing = [arm for arm in arms if arm.keep]
    options = CorpusOptions(num_urls=extent.num_urls, filter_folder=extent.filter_folder)
    for variant in dict.fromkeys(arm.corpus for arm in choosing):
        filtered = any(arm.filtered for arm in choosing if arm.corpus == variant)
        seconds = make_corpus(root, variant, options, console, filtered)
        _add_seconds(root, variant.folder, seconds)
    return {
        arm.name: write_arm(root / arm.corpus.folder, arm, root / "kept" / question.name / arm.name)
        for arm in choosing
    }


def _add_seconds(root: Path, corpus: str, seconds: float) -> None:
    known = corpora_seconds(root)
    _write_json(root, _SECONDS, known | {corpus: round(known.get(corpus, 0.0) + seconds, 1)})


def corpora_seconds(root: Path) -> dict[str, float]:
    """Return the CPU seconds that each corpus has taken."""
    file = root / _SECONDS
    return json.loads(file.read_text()) if file.exists() else {}


_SECONDS = "corpora.json"

# -- trainings --------------------------------------------------------------------------------------------------------


def _task(question: Question, arm: Arm, seed: int, root: Path, extent: Extent, judge: Judge) -> Task:
    return Task(
        root=root,
        question=question.name,
        arm=arm.name,
        seed=seed,
        after=arm.after,
        steps=extent.steps or judge.steps,
        num_scenes=extent.num_scenes,
        num_urls=extent.num_urls,
    )


def _train(tasks: Sequence[Task], judge: Judge, console: Console) -> None:
    """Do the trainings that have no result yet, one on each core at a time."""
    missing = [task for task in tasks if not _result_file(task).exists()]
    if missing and judge.prepare:
        [(_, cpu_seconds)] = at_once(partial(_prepare, missing[0]))
        _add_seconds(missing[0].root, "rounds", cpu_seconds)
    while missing:
        ready = list(_ready(missing))[: len(os.sched_getaffinity(0))]
        names = ", ".join(f"{task.arm} with seed {task.seed}" for task in ready)
        console.print(f"{ready[0].question}: training {names}", highlight=False)
        outcomes = at_once(*(partial(_trial, task) for task in ready))
        for task, (figures, cpu_seconds) in zip(ready, outcomes, strict=True):
            path = _result_file(task).relative_to(task.root)
            _write_json(task.root, str(path), {"figures": figures, "cpu_seconds": round(cpu_seconds, 1)})
        missing = [task for task in missing if task not in ready]


def _ready(missing: Sequence[Task]) -> Iterator[Task]:
    """Yield the tasks that wait for none of the others."""
    places = {(task.arm, task.seed) for task in missing}
    return (task for task in missing if (task.after, task.seed) not in places)


def _result_file(task: Task) -> Path:
    scenes = "" if task.num_scenes == _NUM_SCENES else f".scenes-{task.num_scenes}"
    name = f"{task.arm}.seed-{task.seed}.steps-{task.steps}{scenes}.json"
    return task.root / "results" / task.question / name


def _read(task: Task) -> Trial:
    result = json.loads(_result_file(task).read_text())
    return Trial(arm=task.arm, seed=task.seed, figures=result["figures"], cpu_seconds=result["cpu_seconds"])


def _write_json(root: Path, path: str, value: dict[str, Any]) -> None:
    Storage(str(root)).write(path, (json.dumps(value) + "\n").encode())


# -- in a process of its own ------------------------------------------------------------------------------------------


def _prepare(task: Task) -> None:
    asked = question(task.question)
    assert asked.judge is not None and asked.judge.prepare is not None, "the caller has seen both"
    asked.judge.prepare(task)


def _trial(task: Task) -> dict[str, float]:
    asked = question(task.question)
    assert asked.judge is not None, "an experiment with trainings has a judge"
    return (asked.arm(task.arm).train or asked.judge.train)(task)
