"""What a run or a plan says at its end: a few lines for people, one object for programs."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs.run import RunResult, digests_of, model_weights, survey_corpus
from pipeline.intake import count_retries, unread_rows
from pipeline.records import Records
from pipeline.retries import retried_reasons
from pipeline.storage import Storage
from schemas.config import CapfiltConfig
from schemas.names import printable
from schemas.records import STAGES, Stage


def result_json(result: RunResult) -> dict[str, Any]:
    """Return a run's result as one JSON object."""
    record = result.record
    return {
        "run_id": record.run_id,
        "outcome": record.outcome,
        "shards_done": record.shards_done,
        "shards_skipped": record.shards_skipped,
        "quarantined": result.quarantined,
        "note": result.note,
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
        console.print(f"nothing to do: {result.note or 'every shard is done'}")
        return
    done = ", ".join(
        f"{stage} {count.done:,} of {count.total:,}" for stage in STAGES if (count := survey.of(stage)).total
    )
    console.print(
        f"{record.outcome}: {record.shards_done:,} shards in run {record.run_id} ({done})", highlight=False
    )
    for name, error in sorted(result.quarantined.items()):
        console.print(
            f"quarantined: {name}: {escape(printable(error.splitlines()[-1]) if error else '')}", highlight=False
        )
    if result.note:
        console.print(result.note)
    if record.outcome == "interrupted":
        console.print("the same command goes on where this one stopped")
    elif record.outcome == "partial":
        console.print(
            "the same command tries them again; capfilt shards CORPUS --state quarantined shows the errors"
        )


def plan_corpus(
    config: CapfiltConfig, stages: tuple[Stage, ...] = STAGES, retry: str | None = None
) -> dict[str, Any]:
    """Return what is done, pending and stale by stage and source, and what the rest costs; changes nothing.

    Args:
        retry: words of pipeline.retries; the URLs that a run with them would queue again are counted.
    """
    records = Records(Storage(config.corpus.path))
    records.storage.require_place("corpus.path")
    # Weights decide what is stale; where nothing is committed yet, a plan need not fetch them.
    begun = tuple(stage for stage in stages if records.storage.list(f"records/{stage}"))
    models = digests_of(model_weights(config, begun))
    rows = unread_rows(config, records) if "crawl" in stages and retry is None else {}
    survey = survey_corpus(config, records, models, stages, rows)[0]
    return {
        "stages": [asdict(count) for count in survey.counts],
        "without_gpu": [stage for stage in ("caption", "rank") if not getattr(config.cluster, stage).gpus],
        "unread_rows": rows,
        "retries": {} if retry is None else count_retries(config, records, retried_reasons(retry)),
        "gpu_hours": sum(count.gpu_hours for count in survey.counts),
        "worker_hours": sum(count.worker_hours for count in survey.counts),
        "bytes": sum(count.bytes_left for count in survey.counts),
    }


def print_plan(plan: dict[str, Any]) -> None:
    """Print the plan as a table with its totals."""
    table = Table(box=None, pad_edge=False)
    for title in ("stage", "source"):
        table.add_column(title)
    for title in (
        "shards",
        "done",
        "pending",
        "stale",
        "images left",
        "worker-hours",
        "GPU-hours",
        "GB",
        "basis",
    ):
        table.add_column(title, justify="right")
    for row in plan["stages"]:
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
    for source, rows in plan["unread_rows"].items():
        console.print(
            f"{source}: {rows:,} rows of its lists are not read yet (capfilt run reads them)", highlight=False
        )
    for source, urls in plan["retries"].items():
        console.print(f"{source}: {urls:,} URLs to be tried again, not counted above", highlight=False)
    estimated = {row["stage"] for row in plan["stages"] if row["basis"] == "estimate" and row["images_left"]}
    for stage in plan["without_gpu"]:
        if stage in estimated:
            console.print(
                f"cluster.{stage}.gpus is 0: the estimate is for one H200 a worker; a CPU takes about a hundred times "
                "as long",
                highlight=False,
            )
    console.print(
        f"in all: {plan['worker_hours']:,.2f} worker-hours, of which {plan['gpu_hours']:,.2f} GPU-hours; "
        f"{plan['bytes'] / 1e9:,.2f} GB to write",
        highlight=False,
    )
