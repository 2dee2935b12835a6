"""The trace of one sample: list, fetches, shard, captions with scores, what was kept and why, and which runs did it."""

from typing import Any

from pipeline.candidates import Choice, choose_again
from pipeline.corpus.records import Records
from pipeline.lineage.taught_by import taught_by
from pipeline.lineage.trained_on import select_config, trained_on
from pipeline.manifest.manifest import Manifest, Query
from pipeline.shards.uids import sample_uid
from pipeline.text import same_text_key
from schemas.catalog.sql_text import quote
from schemas.catalog.views import STAGE_ORDER
from schemas.config import SelectConfig
from schemas.errors import CapfiltError
from schemas.marks import is_value

Row = dict[str, Any]

_CANDIDATE_COLUMNS = (
    "origin", "candidate", "text", "raw_text", "score", "rerank_score", "match_probability", "seed", "num_tokens",
    "duplicate_of", "truncated",
)  # fmt: skip
_MARKS = """
    SELECT * FROM marks WHERE CASE named_by WHEN 'uid' THEN value = $1 WHEN 'url' THEN value = $2
        WHEN 'host' THEN value = url_host($2) ELSE value = $3 END ORDER BY made_at, mark"""


def trace(manifest: Manifest, uid_or_url: str) -> list[Row]:
    """Return the trace of the sample with this uid or URL; one of each source, where two list the URL.

    Keys of a trace: ``uid, source, url, captions, extra``; ``fetches``, oldest first; ``shard, key, tar``;
    ``candidates``, best first, with ``outcome``; ``selection``; ``marks``, taken back or not; ``checkpoints`` that
    had it, with ``use``; ``stages``, ``runs`` and ``models``; ``taught_by``: what these learnt from.

    Raises CapfiltError where no list has it.
    """
    indexed = _indexed_shards(manifest, uid_or_url)
    # What the index does not know may be there all the same: it is looked for in every shard.
    for shards in [indexed, None] if indexed is not None else [None]:
        with manifest.open(in_place=True, shards=shards) as query:
            if traces := _traces(query, uid_or_url):
                return traces
    kind = "uid" if is_value("uid", uid_or_url) else "URL"
    raise CapfiltError(
        f"no sample of {manifest.storage.root} has the {kind} {uid_or_url!r}; it is compared letter by letter, "
        "and only what was crawled is listed: `capfilt status` shows what is not yet"
    )


def _indexed_shards(manifest: Manifest, uid_or_url: str) -> set[tuple[str, str]] | None:
    """Return the shards that may have the sample; None where that may be any."""
    batches = Records(manifest.storage).intakes()
    sources = {batch.source for batch in batches}
    is_uid = is_value("uid", uid_or_url)
    uids = [uid_or_url] if is_uid else [sample_uid(source, uid_or_url) for source in sources]
    return manifest.uids.shards_of(uids, batches)


def _traces(query: Query, uid_or_url: str) -> list[Row]:
    shards: dict[tuple[str, str], list[str]] = {}
    for row in _find(query, uid_or_url):
        shards.setdefault((row["source"], row["uid"]), []).append(row["shard"])
    return [_trace(query, source, uid, sorted(names, key=int)) for (source, uid), names in shards.items()]


def _find(query: Query, uid_or_url: str) -> list[Row]:
    """Return source, uid and shard of every crawled row of a sample, those a retry replaced included.

    This reads one column of the raw Parquet of every shard that the query looks at, and no other step does.
    """
    column = "uid" if is_value("uid", uid_or_url) else "url"
    return query.rows(
        f"SELECT source, uid, shard FROM base.raw WHERE {column} = $1 ORDER BY source, shard", (uid_or_url,)
    )


def _trace(query: Query, source: str, uid: str, shards: list[str]) -> Row:
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
    models = query.rows("SELECT * FROM models WHERE digest = ANY($1) ORDER BY kind, digest", (used,))
    crawl = _committed(stages, "crawl", last["shard"])
    marks = query.rows(_MARKS, (uid, last["url"], last["sha256"]))
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
        "candidates": _judged(candidates, selection, _select_config(stages, runs), marks),
        "selection": _selection(selection),
        "marks": marks,
        "checkpoints": [
            trained.checkpoint | {"use": trained.uses[uid]}
            for trained in trained_on(query, source, last["shard"], [uid])
        ],
        "stages": stages,
        "runs": [{name: value for name, value in row.items() if name != "config"} for row in runs],
        "models": models,
        "taught_by": taught_by(models),
    }


def _at(source: str, *shards: str) -> str:
    return f"source = {quote(source)} AND shard IN ({', '.join(map(quote, shards))})"


def _fetch(row: Row) -> Row:
    listed = ("uid", "source", "url", "captions", "extra", "input_rows")
    return {name: value for name, value in row.items() if name not in listed}


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
    run_ids = [row["run_id"] for row in stages if row["stage"] == "select" and row["state"] == "committed"]
    return select_config(next((row for row in runs if run_ids[-1:] == [row["run_id"]]), None))


def _judged(
    rows: list[Row], selection: list[Row], config: SelectConfig | None, marks: list[Row]
) -> list[Row]:
    """Return the candidates' rows, those that were kept first, then best first, each with its outcome in words."""
    numbers: dict[tuple[str, int], int] = {}
    if selection:
        kept = zip(selection[0]["origins"], selection[0]["candidates"], strict=True)
        numbers = {place: number for number, place in enumerate(kept, start=1)}
    row_by_place = {(row["origin"], row["candidate"]): row for row in rows}
    outcomes = {}
    texts = {same_text_key(mark["caption"]) for mark in marks if mark["caption"] and not mark["undone_at"]}
    is_dropped = bool(selection) and selection[0]["reason"] == "marked"
    for choice in choose_again(rows, config, texts):
        place = (choice.candidate.origin, choice.candidate.candidate)
        if is_dropped and choice.reason != "empty_text":
            outcomes[place] = "marked"
        else:
            outcomes[place] = _outcome(choice, numbers.get(place), bool(selection), config)
    # Sorting is stable: after the kept ones, the order of ``choose`` stays.
    ordered = sorted(outcomes, key=lambda place: numbers.get(place, len(rows)))
    return [
        {name: row_by_place[place][name] for name in _CANDIDATE_COLUMNS} | {"outcome": outcomes[place]}
        for place in ordered
    ]


def _outcome(choice: Choice, number: int | None, selected: bool, config: SelectConfig | None) -> str:
    if number is not None:
        return f"kept as number {number}"
    if choice.candidate.text and not selected:
        return "not selected yet" if choice.candidate.score is not None else "not scored yet"
    match choice.reason:
        case "marked":
            return "marked"
        case "empty_text":
            return "empty after clean-up"
        case "not_scored":
            return "no score: the image does not decode"
        case "web_caption_never":
            return 'not used: select.web_caption = "never"'
        case "same_text" if choice.same_as is not None:
            return f"the same text as {choice.same_as.origin} {choice.same_as.candidate}"
        case "filtered_out" if config is not None:
            return f"refused by the filter: match under {config.min_match:g}"
        case "below_min_score" if config is not None:
            return f"under select.min_score = {config.min_score:g}"
    return "others score higher"
