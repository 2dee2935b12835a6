"""What came out of an experiment, to be read: a table of at most 100 columns, a plot and a page."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.demo.world.scenes import ATTRIBUTES
from jobs.experiments.judges import Figure
from jobs.experiments.questions import question
from jobs.experiments.results import Results, Trial
from jobs.experiments.run import corpora_seconds
from jobs.output.render import print_table
from pipeline.storage.storage import Storage


def shown_rows(results: Results, whole: bool = False) -> list[dict[str, Any]]:
    """Return the rows as a person reads them: shares in per cent, with their spread.

    Args:
        whole: with every column, as the page has them.
    """
    return [_shown(results, row, whole) for row in results.rows()]


def _shown(results: Results, row: dict[str, Any], whole: bool) -> dict[str, Any]:
    cells: dict[str, Any] = {"arm": row["arm"]} | ({"what": row["keeps"]} if whole else {})
    if results.facts and (whole or results.differ_in_texts):
        cells |= _fact_cells(row, whole or results.question.judge is None, whole)
    if results.question.judge is None:
        return cells
    cells["seeds"] = row.get("seeds")
    for name, figure in results.question.judge.figures.items():
        if whole or figure.in_table:
            cells[figure.title] = _with_spread(row.get(name), row.get(f"{name}_spread"), figure)
    over = "over " + results.question.baseline
    cells[over] = _with_spread(row.get("difference"), row.get("difference_error"), sign="+")
    cells["CPU s"] = f"{row['cpu_seconds']:.0f}" if "cpu_seconds" in row else None
    return cells


def _fact_cells(row: dict[str, Any], attributes: bool, whole: bool) -> dict[str, Any]:
    if "images" not in row:
        return dict.fromkeys(("images", "an image", "true", "unique"))
    cells: dict[str, Any] = {
        "images": row["images"],
        "an image": f"{row['an_image']:.2f}",
        "true": f"{100 * row['true_share']:.1f}",
        "unique": f"{100 * row['distinct_share']:.1f}",
    }
    if whole:
        cells |= {"texts": row["texts"], "words": f"{row['words']:.1f}"}
    if attributes:
        cells["parse"] = f"{100 * row['parsed_share']:.1f}"
        cells |= {name: f"{100 * row[f'{name}_true']:.1f}" for name in ATTRIBUTES}
    return cells


def summary(results: Results) -> dict[str, Any]:
    """Return all of it as numbers, shares of 1."""
    return {
        "experiment": results.question.name,
        "arms": results.rows(),
        "verdicts": list(results.verdicts()),
        "trainings": len(results.trials),
        "cpu_seconds": round(results.cpu_seconds, 1),
    }


def total_line(experiments: Sequence[Results], root: Path) -> str:
    """Return what experiments have cost; of a training, the call that ended it."""
    trainings = sum(len(results.trials) for results in experiments)
    seconds = sum(results.cpu_seconds for results in experiments)
    return (
        f"{trainings} trainings: {seconds:,.0f} CPU seconds; corpora: {sum(corpora_seconds(root).values()):,.0f}; "
        "in per cent, ± between seeds, of differences the standard error"
    )


_SHARE = Figure(title="")


def _with_spread(
    value: float | None, spread: float | None, figure: Figure = _SHARE, sign: str = ""
) -> str | None:
    if value is None:
        return None
    scale, digits = (100, 1) if figure.is_share else (1, 3)
    return f"{scale * value:{sign}.{digits}f}" + ("" if spread is None else f" ±{scale * spread:.{digits}f}")


def print_results(results: Results) -> None:
    """Print the table, and a line for each difference that is expected."""
    print_table(shown_rows(results), title=results.question.asks)
    for verdict in results.verdicts():
        print(verdict)


def write_page(results: Results, file: Path) -> None:
    """Write one page with the table, the plot and the verdicts, without script or request, and all numbers beside it.

    ``NAME.json`` is what ``read_results`` reads.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows = shown_rows(results, whole=True)
    judge = results.question.judge
    page = environment.get_template("page.html").render(
        question=results.question,
        papers=results.question.papers,
        verdicts=list(results.verdicts()),
        trained=judge and judge.what.format(steps=results.steps, num_scenes=results.num_scenes),
        num_scenes=results.num_scenes,
        judged_by=judge and ", ".join(judge.figures[name].title for name in judge.measures[judge.measure]),
        cpu_minutes=results.cpu_seconds / 60,
        columns=list(rows[0]) if rows else [],
        rows=rows,
        bars=_bars(results),
    )
    storage = Storage(str(file.parent))
    storage.write(file.name, page.encode())
    storage.write(f"{file.stem}.json", (json.dumps(results.as_dict(), indent=1) + "\n").encode())


def read_results(file: Path) -> Results:
    """Return what ``write_page`` has written as ``NAME.json``."""
    told = json.loads(file.read_text())
    trials = [Trial(**trial) for trial in told["trials"]]
    return Results(**told | {"question": question(told["question"]), "trials": trials})


def _bars(results: Results) -> list[dict[str, float | str]]:
    """Return a bar for each arm that was trained: what arms are compared by and its spread, in per cent."""
    bars: list[dict[str, float | str]] = []
    for arm in results.question.arms:
        scores = [100 * score for score in results.scores(arm.name).values()]
        if scores:
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            mean = statistics.fmean(scores)
            bars.append({"name": arm.name, "mean": mean, "low": mean - spread, "high": mean + spread})
    return bars
