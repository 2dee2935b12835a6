"""Where a corpus stands under a config: what is done, missing and stale, what the rest costs, what is in it so far."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Literal, Self

from pipeline.corpus.corpus_state import CorpusState
from pipeline.corpus.records import ShardId
from pipeline.marks.rules import ShardMarks
from pipeline.runs.metrics import rows_by_reason
from pipeline.runs.plan import Kind, ModelDigests, next_step, stages_of, upstream_of
from schemas.config import CapfiltConfig
from schemas.records import ShardRecord
from schemas.stages import STAGE_INFO, STAGES, Stage

# How many captions an image has in the estimates of schemas.stages.
_ESTIMATED_CAPTIONS = 10
_ESTIMATED_SUCCESS = 0.7

Basis = Literal["measured", "estimate"]


@dataclass(slots=True, kw_only=True)
class StageCount:
    """Where one stage of one source stands, and what the rest will cost."""

    stage: Stage
    source: str
    total: int = 0
    done: int = 0
    pending: int = 0
    stale: int = 0
    # Done, but for marks made or taken back since: a run selects them anew.
    marked: int = 0
    waiting: int = 0
    quarantined: int = 0
    images_left: int = 0
    worker_hours: float = 0.0
    gpu_hours: float = 0.0
    bytes_left: int = 0
    basis: Basis = "estimate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """Where a corpus stands under a config."""

    counts: list[StageCount]
    # Shards with anything to do in the chosen stages, in the order of the work: every source in turn.
    todo: list[tuple[str, str]] = field(default_factory=list)
    stale: list[ShardId] = field(default_factory=list)
    marked: list[tuple[str, str]] = field(default_factory=list)
    # Sources that the config does not name any more, with their url shards: they stay as they are.
    left_config: Mapping[str, int] = field(default_factory=dict)
    # Of the URLs that are not crawled yet, how many are expected to give an image.
    expected_share: float = _ESTIMATED_SUCCESS
    share_basis: Basis = "estimate"

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
    state: CorpusState,
    stages: tuple[Stage, ...] = STAGES,
    unread_rows: Mapping[str, int] = MappingProxyType({}),
    marks: ShardMarks = MappingProxyType({}),
) -> Survey:
    """Compare what the config and the marks ask for with what is committed.

    ``unread_rows``: rows of lists that no intake has read, by source; planned for as if each were a new URL.
    """
    kinds = {source.name: source.kind for source in config.source}
    share, share_basis = _expected_share(state.committed)
    counts: dict[tuple[Stage, str], StageCount] = {}

    def count_of(stage: Stage, source: str) -> StageCount:
        return counts.setdefault((stage, source), StageCount(stage=stage, source=source))

    todo: list[tuple[int, str, str]] = []
    stale: list[ShardId] = []
    marked: list[tuple[str, str]] = []
    for source, shard in sorted(state.urls):
        if source not in kinds:
            continue
        is_wanted = False
        for stage, step, images in _steps(
            config, models, stages, (source, shard), kinds[source], state, share, marks
        ):
            count = count_of(stage, source)
            count.total += 1
            setattr(count, step, getattr(count, step) + 1)
            count.quarantined += step != "done" and (stage, source, shard) in state.quarantined
            if step in ("pending", "stale", "marked"):
                is_wanted = True
                count.images_left += images
            if step == "stale":
                stale.append((stage, source, shard))
            if step == "marked":
                marked.append((source, shard))
        if is_wanted:
            todo.append((int(shard), source, shard))
    for source, rows in unread_rows.items():
        for stage in stages_of(config, kinds[source]):
            if rows and stage in stages:
                count = count_of(stage, source)
                shards = math.ceil(rows / config.corpus.samples_per_shard)
                count.total += shards
                count.pending += shards
                count.images_left += round(rows * share)
    result = Survey(
        counts=list(counts.values()),
        todo=[item[1:] for item in sorted(todo)],
        stale=stale,
        marked=marked,
        left_config=Counter(source for source, _ in sorted(state.urls) if source not in kinds),
        expected_share=share,
        share_basis=share_basis,
    )
    _estimate_cost(config, result, state.committed)
    return result


def _steps(
    config: CapfiltConfig,
    models: ModelDigests,
    stages: tuple[Stage, ...],
    shard_id: tuple[str, str],
    kind: Kind,
    state: CorpusState,
    share: float,
    marks: ShardMarks,
) -> Iterator[tuple[Stage, str, int]]:
    """Yield each chosen stage of a shard, whether it is to be done, and the images that it would work on.

    A stage downstream of a pending or stale one is pending or stale itself: the run will make its input anew first.
    """
    upstream: dict[Stage, ShardRecord] = {"urls": state.urls[shard_id]}
    remade: set[Stage] = set()
    for stage in stages_of(config, kind):
        record = state.committed.get((stage, *shard_id))
        if record is not None:
            upstream[stage] = record
        if stage not in stages:
            continue
        rules = marks.get(shard_id, ())
        step = next_step(config, models, stage, kind, upstream, record, marks=rules).state
        if remade.intersection(upstream_of(config, stage, kind)):
            step = "pending" if record is None else "stale"
        if step in ("pending", "stale"):
            remade.add(stage)
        yield stage, step, _images(upstream, stage, share)


def _expected_share(committed: Mapping[ShardId, ShardRecord]) -> tuple[float, Basis]:
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
            rate, size = _estimated_rate(config, count.stage), STAGE_INFO[count.stage].bytes_per_image
            if count.stage in ("caption", "rank"):
                more = config.caption.num_captions / _ESTIMATED_CAPTIONS
                rate, size = rate / more, size * more
        count.worker_hours = count.images_left / rate / 3600
        count.gpu_hours = count.worker_hours * getattr(config.cluster, count.stage).gpus
        count.bytes_left = round(count.images_left * size)


def _estimated_rate(config: CapfiltConfig, stage: Stage) -> float:
    """Return the images per second of one worker: of its part of a GPU, or of its cores where it has no GPU."""
    resources, info = getattr(config.cluster, stage), STAGE_INFO[stage]
    if info.cpu_images_per_s is None:
        return info.images_per_s
    if not resources.gpus:
        return info.cpu_images_per_s * (resources.cpus or 1.0)
    return info.images_per_s * min(resources.gpus, 1.0)


@dataclass(slots=True, kw_only=True)
class Totals:
    """Sums over records. ``lost`` and ``dropped`` count rows by reason: of the crawl, and of the selection.

    ``gpu_hours`` are those that workers held for these shards; attempts that were lost are not in them.
    """

    urls: int = 0
    images: int = 0
    captioned: int = 0
    ranked: int = 0
    filtered: int = 0
    selected: int = 0
    kept: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    gpu_hours: float = 0.0

    @classmethod
    def of(cls, records: Iterable[ShardRecord]) -> Self:
        """Add up records."""
        totals = cls()
        for record in records:
            totals.gpu_hours += record.gpu_seconds / 3600
            match record.stage:
                case "crawl":
                    totals.urls += record.rows_in
                    totals.images += record.images
                    totals.lost.update(_by_reason(record))
                case "caption":
                    totals.captioned += record.images
                case "rank":
                    totals.ranked += record.images
                case "filter":
                    totals.filtered += record.images
                case "select":
                    totals.selected += record.rows_in
                    totals.kept += record.counts.get("kept", 0)
                    totals.dropped.update(_by_reason(record))
        return totals


def _by_reason(record: ShardRecord) -> dict[str, int]:
    rows = rows_by_reason(record.stage, record.counts)
    return {reason: number for (_, reason), number in rows.items() if reason}
