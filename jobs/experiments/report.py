"""What came out of an experiment: means, spreads and differences, seed by seed, as a table, a plot and a page."""

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.experiments.questions import Question
from pipeline.storage.storage import Storage

# The figures that are compared, and how they are called.
FIGURES = {
    "text_r1": "text R@1",
    "image_r1": "image R@1",
    "text_r1_reranked": "text R@1, ITM",
    "image_r1_reranked": "image R@1, ITM",
    "itm_accuracy": "ITM accuracy",
}
# The one that differences are taken of: the mean of the two recalls by ITC.
_JUDGED_BY = ("text_r1", "image_r1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What a training of an arm has learnt; shares of 1."""

    arm: str
    seed: int
    figures: Mapping[str, float]
    cpu_seconds: float

    @property
    def recall(self) -> float:
        """The mean of text and image recall at 1, by ITC."""
        return statistics.fmean(self.figures[name] for name in _JUDGED_BY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Of two arms, seed by seed: the mean difference in recall, and its standard error (NaN of one seed)."""

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
    """All that came out; ``facts`` are what can be said of an arm without training: see ``write_arm``."""

    question: Question
    facts: Mapping[str, Mapping[str, float | int]]
    trials: list[Trial]
    steps: int
    num_scenes: int

    def of(self, arm: str) -> list[Trial]:
        """Return the trainings of an arm, by seed."""
        return sorted((trial for trial in self.trials if trial.arm == arm), key=lambda trial: trial.seed)

    def difference(self, arm: str, other: str) -> Difference | None:
        """Return by how much an arm does better than another one; None where one of them was not trained."""
        of_other = {trial.seed: trial.recall for trial in self.of(other)}
        differences = [
            trial.recall - of_other[trial.seed] for trial in self.of(arm) if trial.seed in of_other
        ]
        if not differences:
            return None
        spread = statistics.stdev(differences) if len(differences) > 1 else math.nan
        error = spread / math.sqrt(len(differences))
        return Difference(mean=statistics.fmean(differences), error=error, seeds=len(differences))

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each arm, as numbers."""
        return [self._row(arm.name) for arm in self.question.arms if arm.name in self.facts]

    def _row(self, name: str) -> dict[str, Any]:
        arm = next(arm for arm in self.question.arms if arm.name == name)
        trials = self.of(name)
        row: dict[str, Any] = {"arm": name, "keeps": arm.what, **(arm.columns or {}), **self.facts[name]}
        for figure in FIGURES if trials else ():
            values = [trial.figures[figure] for trial in trials]
            row[figure] = statistics.fmean(values)
            row[f"{figure}_spread"] = statistics.stdev(values) if len(values) > 1 else None
        if name != self.question.baseline and (found := self.difference(name, self.question.baseline)):
            row["difference"] = found.mean
            row["difference_error"] = None if found.seeds == 1 else found.error
        if trials:
            row["cpu_seconds"] = statistics.fmean(trial.cpu_seconds for trial in trials)
        return row

    def verdicts(self) -> Iterator[str]:
        """Yield a line for each pair of arms that the papers say something of."""
        for arm, other in self.question.better:
            found = self.difference(arm, other)
            if found is None:
                continue
            agrees = "as the papers have it" if found.mean > 0 else "against the papers"
            yield f"{arm} over {other}: {found.mean:+.1%} recall, {agrees}; {found.certainty}"


def shown_rows(results: Results) -> list[dict[str, Any]]:
    """Return the rows as a person reads them: shares as percentages with their spread."""
    shown = []
    for row in results.rows():
        cells: dict[str, Any] = {name: row[name] for name in ("arm", "keeps")}
        cells |= {
            "images": row["images"],
            "true": f"{row['true_share']:.1%}",
            "distinct": f"{row['distinct_share']:.1%}",
        }
        for figure, name in FIGURES.items():
            cells[name] = f"{row[figure]:.1%}" + _spread(row[f"{figure}_spread"]) if figure in row else None
        cells["over " + results.question.baseline] = (
            f"{row['difference']:+.1%}" + _spread(row["difference_error"]) if "difference" in row else None
        )
        shown.append(cells)
    return shown


def _spread(value: float | None) -> str:
    return "" if value is None else f" ± {value:.1%}"


def write_page(results: Results, file: Path) -> None:
    """Write one page with the table, the plot and the verdicts: no script, no request."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows = shown_rows(results)
    page = environment.get_template("page.html").render(
        results=results,
        papers=results.question.papers,
        columns=list(rows[0]) if rows else [],
        rows=rows,
        bars=_bars(results),
    )
    Storage(str(file.parent)).write(file.name, page.encode())


def _bars(results: Results) -> list[dict[str, float | str]]:
    """Return a bar for each arm that was trained: mean recall and its spread over the seeds, in per cent."""
    bars: list[dict[str, float | str]] = []
    for arm in results.question.arms:
        recalls = [100 * trial.recall for trial in results.of(arm.name)]
        if recalls:
            spread = statistics.stdev(recalls) if len(recalls) > 1 else 0.0
            mean = statistics.fmean(recalls)
            bars.append({"name": arm.name, "mean": mean, "low": mean - spread, "high": mean + spread})
    return bars
