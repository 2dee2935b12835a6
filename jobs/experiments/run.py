"""All of an experiment that is missing: the corpora, what each arm keeps, a training for each arm and seed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from jobs.experiments.arms import Arm
from jobs.experiments.corpora import filter_override, make_corpus, write_arm
from jobs.experiments.facts import Facts
from jobs.experiments.questions import Question
from jobs.experiments.results import Results, Trial
from jobs.experiments.task import Task
from jobs.experiments.trainings import NUM_SCENES, read_trial, train, write_json
from schemas.errors import CapfiltError, did_you_mean

_SEEDS, _HEADLINE_SEEDS = 3, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How much of an experiment is done; the defaults are those of docs/experiments.md."""

    arms: tuple[str, ...] = ()
    # None: three, and five of the headline arms.
    seeds: int | None = None
    # None: the judge's own.
    steps: int | None = None
    num_urls: int = 2400
    num_scenes: int = NUM_SCENES
    # Empty: the one that the demo ships.
    filter_folder: str = ""


def run_experiment(question: Question, root: Path, extent: Extent, console: Console) -> Results:
    """Do what is missing of an experiment in a folder, and return all that came out. Safe to repeat and to kill."""
    arms = _arms(question, extent.arms)
    # Before the world is crawled.
    filter_override(extent.filter_folder)
    _require_same_world(root, extent.num_urls)
    facts = _curate(question, arms, root, extent, console)
    trials: list[Trial] = []
    steps = 0
    if question.judge:
        steps = extent.steps or question.judge.steps
        trained = [arm for arm in arms if arm.trained or extent.arms]
        tasks = [
            _task(question, arm, seed, root, extent, steps)
            for seed in range(extent.seeds or _HEADLINE_SEEDS)
            for arm in trained
            if extent.seeds or seed < _SEEDS or arm.name in question.headline
        ]
        _add_seconds(root, "rounds", train(tasks, question, console))
        trials = [read_trial(task) for task in tasks]
    return Results(question=question, facts=facts, trials=trials, steps=steps, num_scenes=extent.num_scenes)


def _task(question: Question, arm: Arm, seed: int, root: Path, extent: Extent, steps: int) -> Task:
    return Task(
        root=root,
        question=question.name,
        arm=arm.name,
        seed=seed,
        after=arm.after,
        steps=steps,
        num_scenes=extent.num_scenes,
        num_urls=extent.num_urls,
    )


def _arms(question: Question, named: Sequence[str]) -> list[Arm]:
    """Return the arms that are asked for, and those whose trainings they go on from."""
    known = [arm.name for arm in question.arms]
    for name in named:
        if name not in known:
            raise CapfiltError(
                f"--arm {name!r}: {question.name} has no such arm{did_you_mean(name, known)}; it has {', '.join(known)}"
            )
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
        write_json(root, file.name, {"urls": num_urls})
    if (begun := json.loads(file.read_text())["urls"]) != num_urls:
        raise CapfiltError(f"--urls {num_urls}: {root} has begun with {begun}; name another folder")


# -- corpora ----------------------------------------------------------------------------------------------------------


def _curate(
    question: Question, arms: Sequence[Arm], root: Path, extent: Extent, console: Console
) -> dict[str, Facts]:
    """Make the corpora that arms choose from, and write what each keeps."""
    choosing = [arm for arm in arms if arm.keep]
    for variant in dict.fromkeys(arm.corpus for arm in choosing):
        filtered = any(arm.filtered for arm in choosing if arm.corpus == variant)
        seconds = make_corpus(root, variant, extent.num_urls, console, filtered, extent.filter_folder)
        _add_seconds(root, variant.folder, seconds)
    return {
        arm.name: write_arm(root / arm.corpus.folder, arm, root / "kept" / question.name / arm.name)
        for arm in choosing
    }


def _add_seconds(root: Path, corpus: str, seconds: float) -> None:
    if not seconds:
        return
    known = corpora_seconds(root)
    write_json(root, _SECONDS, known | {corpus: round(known.get(corpus, 0.0) + seconds, 1)})


def corpora_seconds(root: Path) -> dict[str, float]:
    """Return the CPU seconds that each corpus has taken."""
    file = root / _SECONDS
    return json.loads(file.read_text()) if file.exists() else {}


_SECONDS = "corpora.json"
