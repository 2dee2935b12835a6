"""What came out of an experiment as numbers: means, spreads, and differences seed by seed."""

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jobs.experiments.facts import Facts
from jobs.experiments.judges import Judge
from jobs.experiments.questions import Question


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What a training of an arm has learnt, as the judge's figures."""

    arm: str
    seed: int
    figures: Mapping[str, float]
    cpu_seconds: float

    def score(self, judge: Judge, measure: str) -> float:
        """Return what arms are compared by."""
        return statistics.fmean(self.figures[name] for name in judge.measures[measure])


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Of two arms, seed by seed: the mean difference, and its standard error (NaN of one seed)."""

    mean: float
    error: float
    seeds: int

    @property
    def certainty(self) -> str:
        """How sure that is, in words."""
        if self.seeds == 1:
            return "of one seed, which says nothing of chance"
        side = "more" if abs(self.mean) > 2 * self.error else "less"
        return f"{self.seeds} seeds, standard error {self.error:.1%}: {side} than twice that"


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All that came out; ``facts`` are what can be said of an arm without training."""

    question: Question
    facts: Mapping[str, Facts]
    trials: list[Trial]
    steps: int
    num_scenes: int

    @property
    def cpu_seconds(self) -> float:
        """Of all trainings, each by the call that ended it."""
        return sum(trial.cpu_seconds for trial in self.trials)

    @property
    def differ_in_texts(self) -> bool:
        """Whether arms keep different texts, or else are trained differently on the same; true of a single arm."""
        first, *others = self.facts.values()
        return not others or any(facts != first for facts in others)

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {
            "question": self.question.name,
            "steps": self.steps,
            "num_scenes": self.num_scenes,
            "facts": dict(self.facts),
            "trials": [asdict(trial) for trial in self.trials],
        }

    def of(self, arm: str) -> list[Trial]:
        """Return the trainings of an arm, by seed."""
        return sorted((trial for trial in self.trials if trial.arm == arm), key=lambda trial: trial.seed)

    def scores(self, arm: str, measure: str = "") -> dict[int, float]:
        """Return what an arm is compared by, of each seed; by the judge's first measure unless one is named."""
        if not (judge := self.question.judge):
            return {}
        return {trial.seed: trial.score(judge, measure or judge.measure) for trial in self.of(arm)}

    def difference(self, arm: str, other: str, measure: str = "") -> Difference | None:
        """Return by how much an arm does better than another one; None where one of them was not trained."""
        of_arm, of_other = self.scores(arm, measure), self.scores(other, measure)
        differences = [of_arm[seed] - of_other[seed] for seed in of_arm if seed in of_other]
        if not differences:
            return None
        spread = statistics.stdev(differences) if len(differences) > 1 else math.nan
        error = spread / math.sqrt(len(differences))
        return Difference(mean=statistics.fmean(differences), error=error, seeds=len(differences))

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each arm, as numbers."""
        return [
            self._row(arm.name) for arm in self.question.arms if arm.name in self.facts or self.of(arm.name)
        ]

    def _row(self, name: str) -> dict[str, Any]:
        arm, trials = self.question.arm(name), self.of(name)
        row: dict[str, Any] = {
            "arm": name,
            "keeps": arm.what,
            **(arm.columns or {}),
            **self.facts.get(name, {}),
        }
        judge = self.question.judge
        for figure in judge.figures if judge else ():
            if values := [trial.figures[figure] for trial in trials if figure in trial.figures]:
                row[figure] = statistics.fmean(values)
                row[f"{figure}_spread"] = statistics.stdev(values) if len(values) > 1 else None
        if name != self.question.baseline and (found := self.difference(name, self.question.baseline)):
            row["difference"] = found.mean
            row["difference_error"] = None if found.seeds == 1 else found.error
        if trials:
            row["seeds"] = len(trials)
            row["cpu_seconds"] = statistics.fmean(trial.cpu_seconds for trial in trials)
        return row

    def verdicts(self) -> Iterator[str]:
        """Yield a line for each measure and each pair of arms of which one is expected to do better."""
        for measure in self.question.judge.measures if self.question.judge else ():
            for arm, other in self.question.better:
                if found := self.difference(arm, other, measure):
                    agrees = "as expected" if found.mean > 0 else "not as expected"
                    yield f"{arm} over {other}: {found.mean:+.1%} {measure}, {agrees}; {found.certainty}"
