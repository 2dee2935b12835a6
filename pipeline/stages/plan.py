"""What is done, what is missing and what is stale: decided from records and fingerprints alone.

``next_step`` decides for one stage of one shard, and both the survey before a run and the worker in the middle
of one ask it, so that they cannot disagree.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Literal

from pipeline.corpus.fingerprint import stage_fingerprint
from pipeline.corpus.records import ShardId
from schemas.config import CapfiltConfig
from schemas.records import STAGES, QuarantineRecord, ShardRecord, ShardTask, Stage

Kind = Literal["web", "human"]
ModelDigests = Mapping[Stage, tuple[str, ...]]

# GPU stages at full size on one H200 in bf16 until a corpus has measured its own: images per second and worker.
# Estimates, from the operations counted in docs/benchmarks.md; crawl and select are per CPU worker.
_ESTIMATED_IMAGES_PER_S: dict[Stage, float] = {
    "crawl": 80.0,
    "caption": 500.0,
    "rank": 1300.0,
    "select": 2000.0,
}
_ESTIMATED_BYTES_PER_IMAGE: dict[Stage, float] = {
    "crawl": 45e3,
    "caption": 600.0,
    "rank": 700.0,
    "select": 45e3,
}
# One core, float32, models of the published sizes: ``capfilt bench caption`` and ``capfilt bench rank``.
CPU_IMAGES_PER_S: dict[Stage, float] = {"caption": 0.33, "rank": 0.90}
_ESTIMATED_CAPTIONS = 10
_ESTIMATED_SUCCESS = 0.7


def stages_of(kind: Kind) -> tuple[Stage, ...]:
    """Return the stages a source goes through: human captions are not written anew."""
    return tuple(stage for stage in STAGES if kind == "web" or stage != "caption")


def upstream_of(stage: Stage, kind: Kind) -> tuple[Stage, ...]:
    """Return the stages whose output a stage reads."""
    match stage:
        case "crawl":
            return ("urls",)
        case "caption":
            return ("crawl",)
        case "rank":
            return ("crawl", "caption") if kind == "web" else ("crawl",)
        case "select":
            return ("crawl", "rank")
    raise AssertionError(stage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One stage of one shard: ``task`` is what to do, if anything."""

    state: Literal["done", "pending", "stale", "waiting"]
    task: ShardTask | None = None
    committed: ShardRecord | None = None


def next_step(
    config: CapfiltConfig,
    models: ModelDigests,
    stage: Stage,
    shard_id: tuple[str, str],
    kind: Kind,
    upstream: Mapping[Stage, ShardRecord],
    committed: ShardRecord | None,
    run_id: str = "",
) -> Step:
    """Decide whether a shard's stage is done, to do, stale, or waits for an earlier stage."""
    needed = upstream_of(stage, kind)
    if any(name not in upstream for name in needed):
        return Step(state="waiting", committed=committed)
    inputs = {name: upstream[name] for name in needed}
    fingerprint = stage_fingerprint(
        config,
        stage,
        kind,
        {name: record.input_digests() for name, record in inputs.items()},
        models.get(stage, ()),
    )
    if committed is not None and committed.fingerprint == fingerprint:
        return Step(state="done", committed=committed)
    source, shard = shard_id
    task = ShardTask(
        corpus=config.corpus.path,
        stage=stage,
        source=source,
        kind=kind,
        shard=shard,
        run_id=run_id,
        fingerprint=fingerprint,
        inputs=inputs,
        replaces=committed,
        max_attempts=config.cluster.max_attempts,
    )
    return Step(state="pending" if committed is None else "stale", task=task, committed=committed)


@dataclass(slots=True, kw_only=True)
class StageCount:
    """Where one stage of one source stands, and what the rest will cost."""

    stage: Stage
    source: str
    total: int = 0
    done: int = 0
    pending: int = 0
    stale: int = 0
    waiting: int = 0
    quarantined: int = 0
    images_left: int = 0
    worker_hours: float = 0.0
    gpu_hours: float = 0.0
    bytes_left: int = 0
    basis: Literal["measured", "estimate"] = "estimate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """Where a corpus stands under a config."""

    counts: list[StageCount]
    # Shards with anything to do in the chosen stages, in the order of the work: every source in turn.
    todo: list[tuple[str, str]] = field(default_factory=list)
    stale: list[ShardId] = field(default_factory=list)
    # What has changed since the stale ones were made, with the number of shards (pipeline/stages/staleness.py).
    stale_because: Mapping[str, int] = field(default_factory=dict)
    # Sources that the config does not name any more, with their url shards: they stay as they are.
    left_config: Mapping[str, int] = field(default_factory=dict)
    # Of the URLs that are not crawled yet, how many are expected to give an image.
    expected_share: float = _ESTIMATED_SUCCESS
    share_basis: Literal["measured", "estimate"] = "estimate"

    def of(self, stage: Stage) -> StageCount:
        """Return a stage's count over all sources."""
        total = StageCount(stage=stage, source="")
        sums = [field.name for field in fields(StageCount) if field.name not in ("stage", "source", "basis")]
        for count in self.counts:
            if count.stage == stage:
                for name in sums:
                    setattr(total, name, getattr(total, name) + getattr(count, name))
        return total


def survey(
    config: CapfiltConfig,
    models: ModelDigests,
    urls: Mapping[tuple[str, str], ShardRecord],
    committed: Mapping[ShardId, ShardRecord],
    quarantined: Mapping[ShardId, QuarantineRecord],
    stages: tuple[Stage, ...] = STAGES,
    unread_rows: Mapping[str, int] = MappingProxyType({}),
) -> Survey:
    """Compare what the config asks for with what is committed.

    ``unread_rows``: rows of lists that no intake has read, by source; planned for as if each were a new URL.
    A stage downstream of a pending or stale one counts as pending or stale itself when it is among ``stages``:
    the run will make its input anew first.
    """
    counts: dict[tuple[Stage, str], StageCount] = {}
    share, share_basis = _expected_share(committed)
    left_config: Counter[str] = Counter()
    todo: list[tuple[int, str, str]] = []
    stale: list[ShardId] = []
    kinds = {source.name: source.kind for source in config.source}
    for source, shard in sorted(urls):
        if source not in kinds:
            left_config[source] += 1  # what exists stays, nothing is added
            continue
        kind = kinds[source]
        known: dict[Stage, ShardRecord] = {"urls": urls[source, shard]}
        remade = False
        wanted = False
        for stage in stages_of(kind):
            record = committed.get((stage, source, shard))
            if record is not None:
                known[stage] = record
            if stage not in stages:
                continue
            step = next_step(config, models, stage, (source, shard), kind, known, record)
            state = step.state
            if remade:
                state = "pending" if record is None else "stale"
            count = counts.setdefault((stage, source), StageCount(stage=stage, source=source))
            count.total += 1
            setattr(count, state, getattr(count, state) + 1)
            count.quarantined += state != "done" and (stage, source, shard) in quarantined
            if state in ("pending", "stale"):
                remade = wanted = True
                count.images_left += _images(known, stage, share)
                if state == "stale":
                    stale.append((stage, source, shard))
        if wanted:
            todo.append((int(shard), source, shard))
    for source, rows in unread_rows.items():
        for stage in stages_of(kinds[source]):
            if rows and stage in stages:
                count = counts.setdefault((stage, source), StageCount(stage=stage, source=source))
                shards = math.ceil(rows / config.corpus.samples_per_shard)
                count.total += shards
                count.pending += shards
                count.images_left += round(rows * share)
    result = Survey(
        counts=list(counts.values()),
        todo=[item[1:] for item in sorted(todo)],
        stale=stale,
        left_config=dict(left_config),
        expected_share=share,
        share_basis=share_basis,
    )
    _estimate_cost(config, result, committed)
    return result


def _expected_share(
    committed: Mapping[ShardId, ShardRecord],
) -> tuple[float, Literal["measured", "estimate"]]:
    """Return the share of URLs that give an image: this corpus's own, where it has crawled any."""
    crawled = [record for (stage, _, _), record in committed.items() if stage == "crawl"]
    urls = sum(record.rows_in for record in crawled)
    if not urls:
        return _ESTIMATED_SUCCESS, "estimate"
    return sum(record.rows_out for record in crawled) / urls, "measured"


def _images(known: Mapping[Stage, ShardRecord], stage: Stage, share: float) -> int:
    """Return the images a pending stage will work on; before the crawl, what is expected to succeed."""
    if stage != "crawl" and "crawl" in known:
        return known["crawl"].rows_out
    return round(known["urls"].rows_out * share)


def _estimate_cost(config: CapfiltConfig, result: Survey, committed: Mapping[ShardId, ShardRecord]) -> None:
    """Fill in hours and bytes from this corpus's own rates where it has any, else from the estimates above."""
    by_stage: dict[Stage, list[ShardRecord]] = {}
    for (stage, _, _), record in committed.items():
        by_stage.setdefault(stage, []).append(record)
    for count in result.counts:
        records = by_stage.get(count.stage, [])
        images = sum(record.images for record in records)
        if images:
            seconds = sum(record.seconds.get("total", 0.0) for record in records)
            rate = images / max(seconds, 1e-9)
            size = sum(file.bytes for record in records for file in record.outputs.values()) / images
            count.basis = "measured"
        else:
            rate, size = _estimated_rate(config, count.stage), _ESTIMATED_BYTES_PER_IMAGE[count.stage]
            if count.stage in ("caption", "rank"):
                more = config.caption.num_captions / _ESTIMATED_CAPTIONS
                rate, size = rate / more, size * more
        count.worker_hours = count.images_left / rate / 3600
        count.gpu_hours = count.worker_hours * getattr(config.cluster, count.stage).gpus
        count.bytes_left = round(count.images_left * size)


def _estimated_rate(config: CapfiltConfig, stage: Stage) -> float:
    """Return the images per second of one worker: a GPU's, or that of the cores of one without a GPU."""
    resources = getattr(config.cluster, stage)
    if stage in CPU_IMAGES_PER_S and not resources.gpus:
        return CPU_IMAGES_PER_S[stage] * (resources.cpus or 1.0)
    return _ESTIMATED_IMAGES_PER_S[stage]
