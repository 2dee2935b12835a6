"""Which checkpoints were trained on some images of a shard, of shards that were selected anew since, too."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.candidates import CANDIDATE_COLUMNS, choose_again
from pipeline.manifest.manifest import Query
from schemas.catalog.sql_text import quote
from schemas.config import SelectConfig
from schemas.records import MARKS_INPUT

Row = dict[str, Any]
Use = Literal["trained on", "held out", "not known"]

# The image as its checkpoint was trained on it: the shard as it was in the snapshot of the checkpoint's run.
_CHECKPOINTS = """
    SELECT checkpoints.path, checkpoints.stage, checkpoints.run_id, step, samples, snapshot, created_at, held_out,
        snapshots.sha256['tar'] AS tar
    FROM checkpoints JOIN snapshots ON snapshot = digest AND starts_with(checkpoints.path, folder || '/step-')
    WHERE snapshots.source = $1 AND snapshots.shard = $2 ORDER BY created_at, checkpoints.path"""
# Every tar that the shard had: of its selections, and of its crawls, of which others may have made copies.
_TARS = """
    SELECT shards.stage, sha256['tar'] AS tar, state, inputs, config FROM shards LEFT JOIN runs USING (run_id)
    WHERE shards.stage IN ('crawl', 'select') AND shards.state <> 'quarantined' AND source = $1 AND shard = $2
    ORDER BY shards.finished_at"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A checkpoint, as the table has it, and by uid what it did with the images that were asked about."""

    checkpoint: Row
    uses: dict[str, Use]


def trained_on(query: Query, source: str, shard: str, uids: Collection[str]) -> list[Trained]:
    """Return the checkpoints whose snapshot has the shard, oldest first, with those of the images that it had.

    Where the shard was selected anew since, what was kept before is computed from the scores and the config of that
    run. It is ``not known`` where the scores are new too, or marks were obeyed, or the config cannot be read; of
    copies, where the shard was crawled anew since.
    """
    checkpoints = query.rows(_CHECKPOINTS, (source, shard))
    if not checkpoints:
        return []
    tars = query.rows(_TARS, (source, shard))
    kept_by_tar: dict[str, set[str] | None] = {}
    by_checkpoint = []
    for row in checkpoints:
        tar, held_out = row.pop("tar"), set(row.pop("held_out"))
        if tar not in kept_by_tar:
            kept_by_tar[tar] = _kept(query, source, shard, uids, tar, tars)
        kept = kept_by_tar[tar]
        uses: dict[str, Use] = {
            uid: "held out" if uid in held_out else "trained on" if kept is not None else "not known"
            for uid in sorted(uids)
            if kept is None or uid in kept
        }
        # A tar that the corpus never committed is that of another corpus under the same name.
        if uses and any(known["tar"] == tar for known in tars):
            by_checkpoint.append(Trained(checkpoint=row, uses=uses))
    return by_checkpoint


def _kept(
    query: Query, source: str, shard: str, uids: Collection[str], tar: str, tars: list[Row]
) -> set[str] | None:
    """Return which of the images a tar of the shard has; None where that is not known any more."""
    at = f"source = {quote(source)} AND shard = {quote(shard)} AND uid = ANY($1)"
    for row in tars:
        if row["state"] == "committed" and row["tar"] == tar:
            images = "curated" if row["stage"] == "select" else "(SELECT * FROM samples WHERE status = 'ok')"
            return {row["uid"] for row in query.rows(f"SELECT uid FROM {images} WHERE {at}", (list(uids),))}
    selections = [row for row in tars if row["stage"] == "select"]
    current = next((row for row in selections if row["state"] == "committed"), None)
    selection = next((row for row in reversed(selections) if row["tar"] == tar), None)
    config = select_config(selection)
    if selection is None or current is None or config is None or MARKS_INPUT in selection["inputs"]:
        return None
    if (
        selection["inputs"].items()
        != {k: v for k, v in current["inputs"].items() if k != MARKS_INPUT}.items()
    ):
        return None
    rows_by_uid: dict[str, list[Row]] = {}
    for row in query.rows(
        f"SELECT uid, {', '.join(CANDIDATE_COLUMNS)} FROM candidates WHERE {at}", (list(uids),)
    ):
        rows_by_uid.setdefault(row["uid"], []).append(row)
    return {
        uid
        for uid, rows in rows_by_uid.items()
        if any(choice.reason is None for choice in choose_again(rows, config))
    }


def select_config(run: Row | None) -> SelectConfig | None:
    """Return ``[select]`` as a run had it; None where its record, or a key of it, is not there."""
    if run is None or run["config"] is None:
        return None
    try:
        return SelectConfig.model_validate(json.loads(run["config"]).get("select", {}))
    except ValueError:
        return None
