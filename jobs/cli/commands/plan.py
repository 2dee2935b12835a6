"""What is pending, what it will cost, and what the figures rest on; and what another selection would keep."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from jobs.output.render import print_table
from jobs.output.values import cell, readable_bytes
from jobs.run import digests_of, left_config_line, model_weights
from pipeline.corpus.corpus_state import CorpusState
from pipeline.corpus.records import Records
from pipeline.intake.read_lists import unread_rows
from pipeline.intake.retries import count_retries
from pipeline.manifest.compaction import CompactedRecords
from pipeline.manifest.manifest import Manifest
from pipeline.marks.search import marks_of_shards
from pipeline.marks.trained import checkpoints_with_marked
from pipeline.models.weights import require_model_names
from pipeline.runs.plan import stages_in_use, stale_reasons
from pipeline.runs.preview import SourcePreview, preview_selection
from pipeline.runs.survey import survey as survey_corpus
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig, ClusterConfig, StageResources
from schemas.names import printable
from schemas.stages import STAGE_INFO, STAGES, Stage
from schemas.statuses import retried_reasons

_LEAST_HOURS = 0.0001
_SHARDS_NAMED = 5
_COLUMNS = ("stage", "source", "shards", "done", "pending", "stale", "marked", "images_left", "worker_hours",
            "gpu_hours", "bytes", "basis")  # fmt: skip


def plan_corpus(
    config: CapfiltConfig,
    stages: tuple[Stage, ...] = STAGES,
    retry: str | None = None,
    *,
    only_named: bool = False,
) -> dict[str, Any]:
    """Return what is done, pending and stale by stage and source, and what the rest costs; changes nothing.

    Args:
        retry: words of pipeline.intake.retries; the URLs that a run with them would queue again are counted.
        only_named: the config was cut down to some of its sources, so that the others have not left it.
    """
    records = Records(Storage(config.corpus.path))
    records.storage.require_place("corpus.path")
    stages = stages_in_use(config, stages)
    require_model_names(config, stages)
    state = CorpusState(records, compacted=CompactedRecords(records.storage).shard_records)
    # Weights decide what is stale; where nothing is committed yet, a plan need not fetch them.
    begun = {stage for stage, _, _ in state.committed}
    models = digests_of(model_weights(config, tuple(stage for stage in stages if stage in begun)))
    rows = unread_rows(config, records) if "crawl" in stages and retry is None else {}
    marks = marks_of_shards(records, state, save=False)
    survey = survey_corpus(config, models, state, stages, rows, marks)
    return {
        "stages": [asdict(count) for count in survey.counts],
        "without_gpu": [
            stage
            for stage in stages
            if STAGE_INFO[stage].cpu_images_per_s and not getattr(config.cluster, stage).gpus
        ],
        "unread_rows": rows,
        "retries": {} if retry is None else count_retries(config, records, retried_reasons(retry)),
        "expected_share": round(survey.expected_share, 4),
        "expected_share_basis": survey.share_basis,
        "stale_because": stale_reasons(config, models, records, survey.stale, state),
        "marked": [f"{source}/{shard}" for source, shard in survey.marked],
        "trained_on_marked": checkpoints_with_marked(Manifest(records.storage), marks),
        "left_config": {} if only_named else dict(survey.left_config),
        "workers": worker_needs(config.cluster, stages),
        "gpu_hours": sum(count.gpu_hours for count in survey.counts),
        "worker_hours": sum(count.worker_hours for count in survey.counts),
        "bytes": sum(count.bytes_left for count in survey.counts),
    }


def worker_needs(cluster: ClusterConfig, stages: tuple[Stage, ...]) -> dict[str, dict[str, float]]:
    """Return the CPUs and GPUs that the workers of all stages take together, at their fewest and at their most."""
    pools: list[StageResources] = [getattr(cluster, stage) for stage in stages]
    counts = {"least": [pool.min_workers for pool in pools], "most": [pool.max_workers for pool in pools]}
    return {
        name: {
            "cpus": sum(count * pool.cpus for count, pool in zip(workers, pools, strict=True)),
            "gpus": sum(count * pool.gpus for count, pool in zip(workers, pools, strict=True)),
        }
        for name, workers in counts.items()
    }


def print_plan(plan: dict[str, Any]) -> None:
    """Print the plan as a table, what its figures rest on, and its totals."""
    rows = [_plan_row(row) for row in plan["stages"]]
    columns = [name for name in _COLUMNS if name != "marked" or plan["marked"]]
    print_table(rows, columns, title="stages", spare=("bytes", "worker_hours"))
    print("\n".join(printable(line) for line in _plan_lines(plan)))


def _plan_row(row: dict[str, Any]) -> dict[str, Any]:
    # Hours of which something is seen, however few there are.
    hours = {name: row[name] and max(row[name], _LEAST_HOURS) for name in ("worker_hours", "gpu_hours")}
    shown = row | hours | {"shards": row["total"], "bytes": row["bytes_left"]}
    return {name: shown[name] for name in _COLUMNS}


def _plan_lines(plan: dict[str, Any]) -> Iterator[str]:
    for source, rows in plan["unread_rows"].items():
        if rows:
            yield f"{source}: rows of its lists that are not read yet: {rows:,} (capfilt run reads them)"
        else:
            yield f"{source}: its lists have changed, none is longer than before; capfilt run looks for new rows"
    for source, urls in plan["retries"].items():
        yield f"{source}: URLs to be tried again, not counted above: {urls:,}"
    for change, shards in plan["stale_because"].items():
        yield f"stale: {change} ({shards:,} shards); capfilt run refuses them, --recompute replaces them"
    if marked := plan["marked"]:
        named = ", ".join(marked[:_SHARDS_NAMED]) + (", ..." if len(marked) > _SHARDS_NAMED else "")
        yield f"marks were made or taken back in {len(marked):,} shards ({named}); capfilt run selects them anew"
    for path, images in plan["trained_on_marked"].items():
        yield f"trained on {images:,} marked images: {path}"
    for source, shards in plan["left_config"].items():
        yield left_config_line(source, shards)
    if any(row["stage"] == "crawl" and row["images_left"] for row in plan["stages"]):
        is_measured = plan["expected_share_basis"] == "measured"
        basis = "measured here" if is_measured else "assumed, until this corpus has a crawl"
        share = f"{plan['expected_share']:.0%}"
        yield f"of the URLs that are not crawled yet, {share} are expected to give an image ({basis})"
    estimated = {row["stage"] for row in plan["stages"] if row["basis"] == "estimate" and row["images_left"]}
    for stage in plan["without_gpu"]:
        if stage in estimated:
            yield (
                f"{stage}: estimated for a CPU, {STAGE_INFO[stage].cpu_images_per_s:g} images/s a core with the "
                f"published models (capfilt bench {stage}; docs/benchmarks.md); smaller models are faster"
            )
    most, least = plan["workers"]["most"], plan["workers"]["least"]
    if most["gpus"] or most != least:
        yield (
            f"all stages at once want {cell(most['cpus'])} CPUs and {cell(most['gpus'])} GPUs with max_workers, "
            f"{cell(least['cpus'])} and {cell(least['gpus'])} with min_workers; of what the cluster lacks, some wait"
        )
    yield (
        f"in all: {cell(plan['worker_hours'])} worker-hours, of which {cell(plan['gpu_hours'])} GPU-hours; "
        f"{readable_bytes(plan['bytes'])} to write"
    )


def preview_corpus(config: CapfiltConfig) -> list[dict[str, Any]]:
    """Return what ``[select]`` would keep, a row a source with shards. Raises CapfiltError where nothing is ranked."""
    records = Records(Storage(config.corpus.path))
    state = CorpusState(records, compacted=CompactedRecords(records.storage).shard_records)
    marks = marks_of_shards(records, state, save=False)
    previews = preview_selection(config, records, state, marks)
    seen = {source_preview.source for source_preview in previews}
    listed = {source.name for source in config.source} & {source for source, _ in state.urls}
    previews += [SourcePreview(source=source) for source in sorted(listed - seen)]
    return [_preview_row(source_preview) for source_preview in previews]


def print_preview(rows: list[dict[str, Any]]) -> None:
    """Print the preview as a table, then what was dropped and why, and whether all shards were read."""
    shown = [
        row | {"captions": sum(row["captions"].values()), "captions_now": sum(row["captions_now"].values())}
        for row in rows
    ]
    columns = ("source", "shards", "images", "kept", "captions", "web_share", "kept_now", "captions_now")
    print_table(shown, columns, title="what select would keep", spare=("captions_now", "kept_now"))
    for row in rows:
        for line in _preview_lines(row):
            print(printable(f"{row['source']}: {line}"))


def _preview_lines(row: dict[str, Any]) -> Iterator[str]:
    for reason, images in sorted(row["dropped"].items()):
        yield f"{images:,} images dropped, {reason}"
    if not row["of_shards"]:
        yield "no shard has what this selection reads; `capfilt run` makes it"
    if row["shards"] < row["of_shards"]:
        yield f"of {row['shards']:,} of {row['of_shards']:,} ranked shards, always the same"


def _preview_row(source_preview: SourcePreview) -> dict[str, Any]:
    share = None if source_preview.web_share is None else round(source_preview.web_share, 6)
    return {
        "source": source_preview.source,
        "shards": source_preview.shards,
        "of_shards": source_preview.of_shards,
        "images": source_preview.images,
        "kept": source_preview.kept,
        "captions": dict(source_preview.captions),
        "web_share": share,
        "dropped": dict(source_preview.dropped),
        "kept_now": source_preview.kept_now,
        "captions_now": dict(source_preview.captions_now),
    }
