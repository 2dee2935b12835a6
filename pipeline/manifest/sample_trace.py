"""One sample's whole way: list, fetch, shard, captions with scores, what was kept and why, by whom."""

import json
import re
from typing import Any

from pipeline.manifest.manifest import Manifest, Query
from pipeline.text import same_text_key
from schemas.catalog import STAGE_ORDER, quote
from schemas.config import SelectConfig
from schemas.errors import CapfiltError

Row = dict[str, Any]

_UID = re.compile(r"[0-9a-f]{32}")


def trace(manifest: Manifest, who: str) -> list[Row]:
    """Return the way of the sample with this uid or URL; of each, where two sources list the URL.

    Keys of one way: ``uid, source, url, captions, extra``; ``fetches``, oldest first; ``shard, key, tar``;
    ``candidates``, best first, with ``outcome``; ``selection``; ``stages``, ``runs`` and ``models``.

    Raises CapfiltError where no list has it.
    """
    with manifest.open(in_place=True) as query:
        found = _find(query, who)
        if not found:
            kind = "uid" if _UID.fullmatch(who) else "URL"
            raise CapfiltError(
                f"no sample of {manifest.storage.root} has the {kind} {who!r}; it is compared letter by letter, "
                "and only what was crawled is listed: `capfilt status` shows what is not yet"
            )
        ways: dict[tuple[str, str], list[str]] = {}
        for row in found:
            ways.setdefault((row["source"], row["uid"]), []).append(row["shard"])
        return [_way(query, source, uid, sorted(shards)) for (source, uid), shards in ways.items()]


def _find(query: Query, who: str) -> list[Row]:
    """Return source, uid and shard of every crawled row of a sample, those a retry replaced included.

    The uid alone says nothing about the shard: this reads one column of every raw Parquet, and no other
    step does.
    """
    column = "uid" if _UID.fullmatch(who) else "url"
    return query.rows(
        f"SELECT source, uid, shard FROM base.raw WHERE {column} = $1 ORDER BY source, shard", (who,)
    )


def _way(query: Query, source: str, uid: str, shards: list[str]) -> Row:
    # Literal source and shard: they decide which files are opened at all.
    fetches = [
        row
        for shard in shards
        for row in query.rows(f"SELECT * FROM base.raw WHERE {_at(source, shard)} AND uid = $1", (uid,))
    ]
    last = fetches[-1]
    at = _at(source, last["shard"])
    candidates = query.rows(f"SELECT * FROM candidates WHERE {at} AND uid = $1", (uid,))
    selection = query.rows(f"SELECT * FROM base.curated WHERE {at} AND uid = $1", (uid,))
    stages = query.rows(
        f"""SELECT stage, shard, state, run_id, attempt, fingerprint, models, paths, rows_in, rows_out,
        started_at,
            finished_at, host, device, versions, error
        FROM shards WHERE {_at(source, *shards)} ORDER BY shard, {STAGE_ORDER}, finished_at"""
    )
    # Of a shard in which it failed, only what this sample went through.
    reached = last["shard"] if last["status"] == "ok" else None
    stages = [row for row in stages if row["stage"] in ("urls", "crawl") or row["shard"] == reached]
    runs = query.rows("SELECT * FROM runs WHERE run_id = ANY($1)", ([row["run_id"] for row in stages],))
    used = sorted({digest for row in stages for digest in row["models"] or ()})
    crawl = _committed(stages, "crawl", last["shard"])
    return {
        "uid": uid,
        "source": source,
        "url": last["url"],
        "captions": last["captions"],
        "extra": last["extra"],
        "shard": last["shard"],
        "key": last["key"],
        "tar": crawl["paths"].get("tar") if crawl else None,
        "curated_tar": _curated_tar(stages, selection),
        "fetches": [_fetch(row) for row in fetches],
        "candidates": _judged(candidates, selection, _select_config(stages, runs)),
        "selection": _selection(selection),
        "stages": stages,
        "runs": [{name: value for name, value in row.items() if name != "config"} for row in runs],
        "models": query.rows("SELECT * FROM models WHERE digest = ANY($1) ORDER BY kind, digest", (used,)),
    }


def _at(source: str, *shards: str) -> str:
    return f"source = {quote(source)} AND shard IN ({', '.join(map(quote, shards))})"


def _fetch(row: Row) -> Row:
    given = ("uid", "source", "url", "captions", "extra", "input_rows")
    return {name: value for name, value in row.items() if name not in given}


def _selection(rows: list[Row]) -> Row | None:
    names = ("status", "reason", "captions", "scores", "origins", "candidates")
    return {name: rows[0][name] for name in names} if rows else None


def _committed(stages: list[Row], stage: str, shard: str) -> Row | None:
    rows = [
        row for row in stages if (row["stage"], row["shard"], row["state"]) == (stage, shard, "committed")
    ]
    return rows[-1] if rows else None


def _curated_tar(stages: list[Row], selection: list[Row]) -> str | None:
    if not selection or selection[0]["status"] != "kept":
        return None
    select = _committed(stages, "select", selection[0]["shard"])
    return select["paths"].get("tar") if select else None


def _select_config(stages: list[Row], runs: list[Row]) -> SelectConfig | None:
    """Return ``[select]`` as the run that selected had it."""
    made_by = [row["run_id"] for row in stages if row["stage"] == "select" and row["state"] == "committed"]
    configs = [row["config"] for row in runs if made_by and row["run_id"] == made_by[-1]]
    return SelectConfig.model_validate(json.loads(configs[0]).get("select", {})) if configs else None


def _judged(candidates: list[Row], selection: list[Row], config: SelectConfig | None) -> list[Row]:
    """Return the candidates best first, each with its outcome in words."""
    kept = list(zip(selection[0]["origins"], selection[0]["candidates"], strict=True)) if selection else []
    by_place = {place: index for index, place in enumerate(kept)}

    def best_first(row: Row) -> tuple[int, bool, float, float]:
        place = by_place.get((row["origin"], row["candidate"]), len(kept))
        rerank, score = row["rerank_score"], row["score"]
        return place, rerank is None, -(rerank or 0.0), -(score if score is not None else -2.0)

    ordered = sorted(candidates, key=best_first)
    names = (
        "origin",
        "candidate",
        "text",
        "raw_text",
        "score",
        "rerank_score",
        "seed",
        "num_tokens",
        "duplicate_of",
    )
    seen: dict[str, Row] = {}
    judged = []
    for row in ordered:
        earlier = seen.setdefault(same_text_key(row["text"]), row)
        outcome = _outcome(row, earlier, by_place, bool(selection), config)
        judged.append({name: row[name] for name in (*names, "truncated")} | {"outcome": outcome})
    return judged


def _outcome(
    row: Row, earlier: Row, kept: dict[tuple[str, int], int], selected: bool, config: SelectConfig | None
) -> str:
    if (row["origin"], row["candidate"]) in kept:
        return f"kept as number {kept[row['origin'], row['candidate']] + 1}"
    if not row["text"]:
        return "empty after clean-up"
    if not selected:
        return "not selected yet" if row["score"] is not None else "not scored yet"
    if row["score"] is None:
        return "no score: the image does not decode"
    if config is not None and row["origin"] == "web" and config.web_caption == "never":
        return 'not used: select.web_caption = "never"'
    if earlier is not row:
        return f"the same text as {earlier['origin']} {earlier['candidate']}"
    if config is not None and config.min_score is not None and row["score"] < config.min_score:
        return f"under select.min_score = {config.min_score:g}"
    return "others score higher"
