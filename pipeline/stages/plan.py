"""Whether one stage of one shard is done, missing or stale: decided from records and fingerprints alone.

Both the survey before a run and the runner in the middle of one ask ``next_step``, so that they cannot disagree.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.corpus.fingerprint import stage_fingerprint
from schemas.config import CapfiltConfig
from schemas.records import ShardRecord, ShardTask
from schemas.stages import STAGE_INFO, STAGES, Stage

Kind = Literal["web", "human"]
ModelDigests = Mapping[Stage, tuple[str, ...]]


def stages_of(kind: Kind) -> tuple[Stage, ...]:
    """Return the stages a source goes through: human captions are not written anew."""
    return tuple(stage for stage in STAGES if kind == "web" or stage != "caption")


def upstream_of(stage: Stage, kind: Kind) -> tuple[Stage, ...]:
    """Return the stages whose output a stage reads."""
    return tuple(name for name in STAGE_INFO[stage].reads if name in ("urls", *stages_of(kind)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One stage of one shard: ``task`` is what to do, if anything."""

    state: Literal["done", "pending", "stale", "waiting"]
    task: ShardTask | None = None


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
        return Step(state="waiting")
    inputs: dict[str, ShardRecord] = {name: upstream[name] for name in needed}
    fingerprint = stage_fingerprint(
        config,
        stage,
        kind,
        {name: record.input_digests() for name, record in inputs.items()},
        models.get(stage, ()),
    )
    if committed is not None and committed.fingerprint == fingerprint:
        return Step(state="done")
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
    return Step(state="pending" if committed is None else "stale", task=task)
