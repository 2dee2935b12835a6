"""What a run or a plan says at its end: a few lines for people, one object for programs."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs.run import RunResult, digests_of, model_weights, survey_corpus
from pipeline.intake import unread_lists
from pipeline.plan import StageCount
from pipeline.records import Records
from pipeline.storage import Storage
from schemas.config import CapfiltConfig
from schemas.records import STAGES


def result_json(result: RunResult) -> dict[str, Any]:
    """Return a run's result as one JSON object."""
    record = result.record
    return {
        "run_id": record.run_id,
        "outcome": record.outcome,
        "shards_done": record.shards_done,
        "shards_skipped": record.shards_skipped,
        "quarantined": result.quarantined,
        "stages": {
            stage: {"done": count.done, "total": count.total}
            for stage in STAGES
            if (count := result.survey.of(stage)).total
        },
    }


def print_result(result: RunResult, console: Console) -> None:
    """Say what was done and, shard by shard, what was not."""
    record, survey = result.record, result.survey
    if record.outcome == "done" and not record.shards_done:
        console.print("nothing to do: every shard is done")
        return
    done = ", ".join(f"{stage} {count.done:,} of {count.total:,}" for stage in STAGES if (count := survey.of(stage)).total)
    console.print(f"{record.outcome}: {record.shards_done:,} shards in run {record.run_id} ({done})", highlight=False)
    for name, error in sorted(result.quarantined.items()):
        console.print(f"quarantined: {name}: {escape(error.splitlines()[-1] if error else '')}", highlight=False)
    if record.outcome == "interrupted":
        console.print("the same command goes on where this one stopped")
    elif result.quarantined:
        console.print("the same command tries them again; capfilt shards CORPUS --state quarantined shows the errors")


def plan_corpus(config: CapfiltConfig) -> list[dict[str, Any]]:
    """Return what is done, pending and stale by stage and source, and what the rest costs; changes nothing."""
    records = Records(Storage(config.corpus.path))
    models = digests_of(model_weights(config, STAGES))
    survey, _ = survey_corpus(config, records, models, STAGES)
    rows = [asdict(count) for count in survey.counts]
    rows += [
        asdict(StageCount(stage="urls", source=source)) | {"pending": files}
        for source, files in unread_lists(config, records).items()
    ]
    return rows


def print_plan(rows: list[dict[str, Any]]) -> None:
    """Print the plan as a table with its totals."""
    table = Table(box=None, pad_edge=False)
    for title in ("stage", "source"):
        table.add_column(title)
    for title in ("shards", "done", "pending", "stale", "images left", "worker-hours", "GPU-hours", "GB", "basis"):
        table.add_column(title, justify="right")
    for row in rows:
        if row["stage"] == "urls":
            continue
        table.add_row(
            row["stage"],
            row["source"],
            *(f"{row[name]:,}" for name in ("total", "done", "pending", "stale", "images_left")),
            f"{row['worker_hours']:,.2f}",
            f"{row['gpu_hours']:,.2f}",
            f"{row['bytes_left'] / 1e9:,.2f}",
            row["basis"],
        )
    console = Console()
    console.print(table)
    for row in rows:
        if row["stage"] == "urls":
            console.print(f"{row['source']}: {row['pending']} list files not read yet (capfilt run reads them)")
    gpu_hours = sum(row["gpu_hours"] for row in rows)
    console.print(f"in all: {gpu_hours:,.2f} GPU-hours, {sum(row['bytes_left'] for row in rows) / 1e9:,.2f} GB to write")
