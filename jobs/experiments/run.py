"""All of an experiment that is missing: the corpus, what each arm keeps, a training for each arm and seed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.demo.train_in_pairs import at_once
from jobs.experiments.corpus import make_corpus, write_arm
from jobs.experiments.questions import TRAINED, Question
from jobs.experiments.report import Results, Trial
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError, did_you_mean

_AT_ONCE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How much of an experiment is done; the defaults are those of docs/experiments.md."""

    arms: tuple[str, ...] = ()
    seeds: int = 3
    steps: int = 300
    num_urls: int = 2400
    # With 200 a percentage point is chance.
    num_scenes: int = 1000


def run_experiment(question: Question, folder: Path, extent: Extent, console: Console) -> Results:
    """Do what is missing of an experiment in a folder, and return all that came out. Safe to repeat and to kill."""
    trained = _trained_arms(question, extent.arms)
    _require_same_world(folder, extent.num_urls)
    corpus = folder / "corpus"
    make_corpus(corpus, extent.num_urls, console)
    facts = {}
    for each in question.arms:
        if not extent.arms or each.name in extent.arms:
            facts[each.name] = write_arm(corpus, each, _data(folder, question, each.name))
    wanted = [(arm, seed) for seed in range(extent.seeds) for arm in trained]
    missing = [
        trial for trial in wanted if not (folder / _result_path(question, *trial, extent.steps)).exists()
    ]
    for first in range(0, len(missing), _AT_ONCE):
        trials = missing[first : first + _AT_ONCE]
        console.print(
            f"training {', '.join(f'{arm} with seed {seed}' for arm, seed in trials)}", highlight=False
        )
        calls = [partial(_trial, str(folder), question.name, arm, seed, extent) for arm, seed in trials]
        for (arm, seed), (figures, cpu_seconds) in zip(trials, at_once(*calls), strict=True):
            result = {"figures": figures, "cpu_seconds": round(cpu_seconds, 1)}
            _write_json(folder, _result_path(question, arm, seed, extent.steps), result)
    done = [_read(folder, question, arm, seed, extent.steps) for arm, seed in wanted]
    return Results(
        question=question, facts=facts, trials=done, steps=extent.steps, num_scenes=extent.num_scenes
    )


def _trained_arms(question: Question, named: Sequence[str]) -> list[str]:
    known = [arm.name for arm in question.arms]
    for name in named:
        if name not in known:
            raise CapfiltError(f"--arm {name!r}: {question.name} has no such arm{did_you_mean(name, known)}")
    return list(named or TRAINED[question.name])


def _require_same_world(folder: Path, num_urls: int) -> None:
    """Refuse a folder whose corpus has another size: its results would not be comparable."""
    file = folder / "experiment.json"
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise CapfiltError(
                f"--out {folder}: the folder holds something other than experiments; name another one"
            )
        _write_json(folder, file.name, {"urls": num_urls})
    if (begun := json.loads(file.read_text())["urls"]) != num_urls:
        raise CapfiltError(f"--urls {num_urls}: {folder} has begun with {begun}; name another folder")


def _data(folder: Path, question: Question, arm: str) -> Path:
    return folder / "kept" / question.name / arm


def _result_path(question: Question, arm: str, seed: int, steps: int) -> str:
    return f"results/{question.name}/{arm}.seed-{seed}.steps-{steps}.json"


def _write_json(folder: Path, path: str, value: dict[str, Any]) -> None:
    Storage(str(folder)).write(path, (json.dumps(value) + "\n").encode())


def _read(folder: Path, question: Question, arm: str, seed: int, steps: int) -> Trial:
    result = json.loads((folder / _result_path(question, arm, seed, steps)).read_text())
    return Trial(arm=arm, seed=seed, figures=result["figures"], cpu_seconds=result["cpu_seconds"])


# -- in a process of its own: the trainer is imported inside, so that the parent names it without ---------------------


def _trial(folder: str, question: str, arm: str, seed: int, extent: Extent) -> dict[str, float]:
    from jobs.experiments.trial import train_and_judge

    data = Path(folder) / "kept" / question / arm
    return train_and_judge(
        f"{folder}/trained/{question}", arm, str(data / "world"), seed, extent.steps, extent.num_scenes
    )
