"""Whether one stage of one shard is done, missing or stale, and why: from records and fingerprints alone.

Both the survey before a run and the runner in the middle of one ask ``next_step``, so that they cannot disagree.
``stale_message`` names what differs between now and the run that made the shards, in the words of the config.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

from pydantic import ValidationError

from pipeline.corpus.corpus_state import CorpusState
from pipeline.corpus.fingerprint import deciding_fields, stage_fingerprint
from pipeline.corpus.records import Records, ShardId
from schemas.config import CapfiltConfig
from schemas.marks import MarkRule, rules_digest
from schemas.records import MARKS_INPUT, RunRecord, ShardRecord, ShardTask
from schemas.stages import STAGE_INFO, Stage, stages_of_source

Kind = Literal["web", "human"]
ModelDigests = Mapping[Stage, tuple[str, ...]]

_CHANGES_NAMED = 5
_LOADED_BY: dict[Stage, tuple[str, ...]] = {
    "caption": ("caption.model",),
    "rank": ("rank.model", "rank.rerank.model"),
    "filter": ("filter.model",),
}


def stages_of(config: CapfiltConfig, kind: Kind) -> tuple[Stage, ...]:
    """Return the stages a source goes through."""
    return stages_of_source(kind, filtered=config.filter is not None, chosen_by=config.select.by)


def stages_in_use(config: CapfiltConfig, stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return those of some stages that a source of the config goes through."""
    used = {stage for source in config.source for stage in stages_of(config, source.kind)}
    return tuple(stage for stage in stages if stage in used)


def upstream_of(config: CapfiltConfig, stage: Stage, kind: Kind) -> tuple[Stage, ...]:
    """Return the stages whose output a stage reads."""
    unread = "filter" if (stage, config.select.by) == ("select", "clip") else ""
    passed = ("urls", *stages_of(config, kind))
    return tuple(name for name in STAGE_INFO[stage].reads if name in passed and name != unread)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One stage of one shard: ``task`` is what to do, if anything."""

    # ``marked``: done, but for marks that were made or taken back since.
    state: Literal["done", "pending", "stale", "marked", "waiting"]
    task: ShardTask | None = None


def next_step(
    config: CapfiltConfig,
    models: ModelDigests,
    stage: Stage,
    kind: Kind,
    upstream: Mapping[Stage, ShardRecord],
    committed: ShardRecord | None,
    run_id: str = "",
    marks: tuple[MarkRule, ...] = (),
) -> Step:
    """Decide whether a shard's stage is done, to do, stale, or waits for an earlier stage.

    Args:
        upstream: the records of earlier stages, the shard's URLs among them.
        marks: those that concern the shard; select alone obeys them.
    """
    marks = marks if stage == "select" else ()
    needed = upstream_of(config, stage, kind)
    if any(name not in upstream for name in needed):
        return Step(state="waiting")
    inputs: dict[str, ShardRecord] = {name: upstream[name] for name in needed}
    digests = {name: record.input_digests() for name, record in inputs.items()}
    fingerprint_with = partial(stage_fingerprint, config, stage, kind, digests, models.get(stage, ()))
    fingerprint = fingerprint_with(rules_digest(marks) if marks else None)
    if committed is not None and committed.fingerprint == fingerprint:
        return Step(state="done")
    task = ShardTask(
        corpus=config.corpus.path,
        stage=stage,
        source=upstream["urls"].source,
        kind=kind,
        shard=upstream["urls"].shard,
        run_id=run_id,
        fingerprint=fingerprint,
        inputs=inputs,
        replaces=committed,
        max_attempts=config.cluster.max_attempts,
        marks=marks,
    )
    if committed is None:
        return Step(state="pending", task=task)
    is_current_but_for_marks = committed.fingerprint == fingerprint_with(committed.inputs.get(MARKS_INPUT))
    return Step(state="marked" if is_current_but_for_marks else "stale", task=task)


def stale_message(
    config: CapfiltConfig,
    models: ModelDigests,
    records: Records,
    stale: Sequence[ShardId],
    state: CorpusState,
) -> str:
    """Return how many shards are stale, what has changed since they were made, and what can be done."""
    changes = list(stale_reasons(config, models, records, stale, state))
    named = ", ".join("/".join(shard) for shard in stale[:3])
    more = ", ..." if len(stale) > 3 else ""
    rest = f"; and {len(changes) - _CHANGES_NAMED} changes more" if len(changes) > _CHANGES_NAMED else ""
    because = "; ".join(changes[:_CHANGES_NAMED]) or "an earlier stage's files are to be made again"
    return (
        f"{len(stale)} committed shards are stale ({named}{more}): {because}{rest}. Restore that, make a corpus at "
        "another corpus.path, or run again with --recompute to replace them"
    )


def stale_reasons(
    config: CapfiltConfig,
    models: ModelDigests,
    records: Records,
    stale: Sequence[ShardId],
    state: CorpusState,
) -> dict[str, int]:
    """Return what has changed, such as ``select.top_k 2 -> 3``, with the number of shards; commonest first.

    A shard that is stale for nothing but an earlier stage's staleness gives no reason of its own.
    """
    if not stale:
        return {}
    stale_ids = set(stale)
    runs = {run.run_id: run for run in records.runs()}
    names = {model.digest: model.name for model in records.models()}
    kinds = {source.name: source.kind for source in config.source}
    counted: Counter[str] = Counter()
    for stage, source, shard in stale:
        record = state.committed[stage, source, shard]
        kind = kinds[source]
        upstream = {
            name: state.urls[source, shard] if name == "urls" else state.committed.get((name, source, shard))
            for name in upstream_of(config, stage, kind)
        }
        reasons = [
            *_changed_keys(config, runs.get(record.run_id), stage, kind, source),
            *_changed_weights(record, models.get(stage, ()), stage, names),
            *_changed_inputs(record, upstream),
        ]
        is_root = not any((name, source, shard) in stale_ids for name in upstream)
        if not reasons and is_root:
            writer_version = record.versions.get("capfilt", "unknown")
            # Its record was deleted, or its attempts failed after it was retired.
            reasons = [
                f"{stage}: made of the {name} stage's files, which have no record now"
                for name, input_record in upstream.items()
                if input_record is None
            ] or [f"{stage}: made by capfilt {writer_version}, and this is {version('capfilt')}"]
        counted.update(reasons)
    return dict(counted.most_common())


def changed_keys(
    config: CapfiltConfig, runs: Mapping[str, RunRecord], committed: Mapping[ShardId, ShardRecord]
) -> list[str]:
    """Return the keys by which committed shards would be made differently now, such as ``select.top_k 2 -> 3``.

    Neither weights nor input are looked at.
    """
    kinds = {source.name: source.kind for source in config.source}
    made = {
        (record.run_id, stage, source)
        for (stage, source, _), record in committed.items()
        if source in kinds and stage in stages_of(config, kinds[source])
    }
    changes = [
        change
        for run_id, stage, source in sorted(made)
        for change in _changed_keys(config, runs.get(run_id), stage, kinds[source], source)
    ]
    return list(dict.fromkeys(changes))


def _changed_keys(
    config: CapfiltConfig, run: RunRecord | None, stage: Stage, kind: Kind, source: str
) -> Iterator[str]:
    """Yield the keys of the stage that differ from the config of the run that made the shard."""
    before = _config_of(run)
    if before is None:
        return
    old_kind = next((other.kind for other in before.source if other.name == source), kind)
    if old_kind != kind:
        yield f"source.{source}.kind {old_kind!r} -> {kind!r}"
    old, new = (_flat(deciding_fields(tree, stage, kind), stage) for tree in (before, config))
    if stage == "caption":
        old["corpus.seed"], new["corpus.seed"] = before.corpus.seed, config.corpus.seed
    if "select.by" in new | old or upstream_of(before, stage, kind) != upstream_of(config, stage, kind):
        # Of the filter too, which reads the ranking unless it alone decides.
        old["select.by"], new["select.by"] = before.select.by, config.select.by
    # A selection by CLIP has no such key.
    if "select.min_match" not in old or "select.min_match" not in new:
        old.pop("select.min_match", None), new.pop("select.min_match", None)
    for key in new | old:
        if old.get(key) != new.get(key):
            yield f"{key} {old.get(key)!r} -> {new.get(key)!r}"


def _config_of(run: RunRecord | None) -> CapfiltConfig | None:
    """Return a run's config; None where it is missing or of a version that had other keys."""
    try:
        return CapfiltConfig.model_validate(run.config) if run else None
    except ValidationError:
        return None


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}.{name}"
        flat |= _flat(value, key) if isinstance(value, dict) else {key: value}
    return flat


def _changed_weights(
    record: ShardRecord, current_digests: tuple[str, ...], stage: Stage, names: Mapping[str, str]
) -> Iterator[str]:
    if tuple(record.models) == tuple(current_digests):
        return
    keys = _LOADED_BY.get(stage, ())
    for number, key in enumerate(keys):
        old, new = (
            digests[number] if number < len(digests) else None for digests in (record.models, current_digests)
        )
        if old != new:
            yield f"{key}: weights {_named(old, names)} -> {_named(new, names)}"


def _named(digest: str | None, names: Mapping[str, str]) -> str:
    if digest is None:
        return "none"
    name = names.get(digest)
    return f"{name} ({digest[:12]})" if name else digest[:12]


def _changed_inputs(record: ShardRecord, upstream: Mapping[Stage, ShardRecord | None]) -> Iterator[str]:
    """Yield the earlier stages whose files are not those that the shard was made of."""
    for stage, current in upstream.items():
        if current is None:
            continue
        used = {
            name.partition(".")[2]: sha for name, sha in record.inputs.items() if name.startswith(f"{stage}.")
        }
        # Where it read nothing of that stage, a key has changed that says so.
        if used and used != current.input_digests():
            yield f"{record.stage}: the files of {stage} were made again since"
