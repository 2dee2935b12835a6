"""What a corpus holds, as plain rows: status, statistics, failures and shards. Reads only."""

from collections.abc import Sequence
from typing import Any

from pipeline.corpus.lost_attempts import noted_attempts
from pipeline.manifest.manifest import Manifest, Query
from schemas.catalog.views import STAGE_ORDER
from schemas.stages import STAGES, Stage, stages_of_source
from schemas.statuses import REASONS

Row = dict[str, Any]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

# Retried URLs are in two shards: counted once as URLs, and at most once as images.
_CRAWLED = """
    SELECT crawl.source, sum(crawl.rows_in) FILTER (again IS NULL)::BIGINT AS urls,
        sum(crawl.rows_in) FILTER (again)::BIGINT AS tried_again, sum(crawl.images)::BIGINT AS images
    FROM shards AS crawl LEFT JOIN (
        SELECT source, shard, true AS again FROM shards WHERE stage = 'urls' AND counts['retry'] > 0
    ) AS retry ON crawl.source = retry.source AND crawl.shard = retry.shard
    WHERE crawl.stage = 'crawl' AND crawl.state = 'committed' GROUP BY crawl.source ORDER BY crawl.source"""


def status(manifest: Manifest) -> dict[str, Any]:
    """Return how far each stage of each source is, the last run, and the attempts under way."""
    with manifest.open() as query:
        progress = {(row["source"], row["stage"]): row for row in query.rows("SELECT * FROM progress")}
        runs = query.rows("SELECT * EXCLUDE (config, versions) FROM runs ORDER BY run_id DESC LIMIT 1")
        unused = _unused_stages(query)
        crawled = query.rows(_CRAWLED)
    rows = []
    for source in sorted({source for source, _ in progress}):
        total = progress.get((source, "urls"), {}).get("shards", 0)
        for stage in STAGES:
            counts = progress.get((source, stage), {})
            if stage in unused.get(source, {"filter"}) and not counts:
                continue
            rows.append(
                {
                    "source": source,
                    "stage": stage,
                    "done": counts.get("shards", 0),
                    "total": total,
                    "quarantined": counts.get("quarantined", 0),
                    "images": counts.get("images") or 0,
                    "bytes": counts.get("bytes") or 0,
                    "last_commit": counts.get("last_commit"),
                }
            )
    return {
        "corpus": manifest.storage.root,
        "stages": rows,
        "sources": [_success(row) for row in crawled],
        "last_run": runs[0] if runs else None,
        "attempts": _uncommitted_attempts(manifest),
    }


def stats(manifest: Manifest) -> dict[str, list[Row]]:
    """Return success, outcomes, quantiles of every histogram, rates: sums over records, no sample is read."""
    with manifest.open() as query:
        return {
            "sources": [_success(row) for row in query.rows(_CRAWLED)],
            "outcomes": query.rows("SELECT * FROM outcomes"),
            "histograms": _summaries(query.histogram_sums()),
            "throughput": query.rows("SELECT * FROM throughput"),
        }


def runs(manifest: Manifest, *, limit: int = 50) -> list[Row]:
    """Return the runs, newest first; one without ``outcome`` is under way, or was killed.

    ``gpu_hours`` and ``cost`` include attempts that were lost.
    """
    with manifest.open() as query:
        return query.rows(
            """SELECT run_id, command, started_at, finished_at, outcome, shards_done, shards_skipped,
                shards_failed, round(gpu_hours, 4) AS gpu_hours, round(cost, 2) AS cost, host
            FROM runs LEFT JOIN (
                SELECT run_id, sum(gpu_hours) AS gpu_hours, sum(cost) AS cost FROM costs GROUP BY run_id
            ) USING (run_id)
            ORDER BY started_at DESC, run_id DESC LIMIT $1""",
            (limit,),
        )


def failures(
    manifest: Manifest, *, hosts: bool = False, source: str | None = None, limit: int = 50
) -> list[Row]:
    """Return the samples that are not ok, by reason (and host), most frequent first, with an example each."""
    by = "source, status, reason, host" if hosts else "source, status, reason"
    with manifest.open(in_place=True) as query:
        rows = query.rows(
            f"""SELECT {by}, count(*) AS samples, arg_min(http_status, url) AS http_status, min(url) AS
            example,
                arg_min(detail, url) AS detail
            FROM failures WHERE $1 IS NULL OR source = $1
            GROUP BY {by} ORDER BY samples DESC, {by} LIMIT $2""",
            (source, limit),
        )
    for row in rows:
        reason = REASONS.get(row["reason"])
        row["transient"] = reason is not None and reason.transient
    return rows


def shards(
    manifest: Manifest,
    *,
    stage: str | None = None,
    source: str | None = None,
    state: str | None = None,
    limit: int = 100,
) -> list[Row]:
    """Return the table of shards, those that match."""
    with manifest.open() as query:
        return query.rows(
            f"""SELECT stage, source, shard, state, rows_in, rows_out, images, bytes,
                seconds['total'] AS seconds,
                run_id, attempt, host, device, finished_at, error
            FROM shards WHERE ($1 IS NULL OR stage = $1) AND ($2 IS NULL OR source = $2)
                AND ($3 IS NULL OR state = $3)
            ORDER BY source, shard, {STAGE_ORDER}, finished_at LIMIT $4""",
            (stage, source, state, limit),
        )


def quantiles(
    lows: Sequence[float], highs: Sequence[float], counts: Sequence[int]
) -> dict[str, float | None]:
    """Return the QUANTILES of a histogram, a value spread evenly over its bin; of an empty one all are None."""
    total = sum(counts)
    values: dict[str, float | None] = {}
    for quantile in QUANTILES:
        wanted, below = quantile * total, 0
        values[f"p{quantile * 100:02.0f}"] = None
        for low, high, count in zip(lows, highs, counts, strict=True):
            if count and below + count >= wanted:
                values[f"p{quantile * 100:02.0f}"] = round(low + (high - low) * (wanted - below) / count, 4)
                break
            below += count
    return values


def _summaries(bins: list[Row]) -> list[Row]:
    grouped: dict[tuple[str, str, str], list[Row]] = {}
    for row in bins:
        grouped.setdefault((row["source"], row["stage"], row["name"]), []).append(row)
    summaries = []
    for (source, stage, name), rows in grouped.items():
        counts = [row["count"] for row in rows]
        quantile_values = quantiles([row["low"] for row in rows], [row["high"] for row in rows], counts)
        summaries.append(
            {"source": source, "stage": stage, "name": name, "values": sum(counts), **quantile_values}
        )
    return summaries


def _success(row: Row) -> Row:
    urls = row["urls"] or 0
    return {
        "source": row["source"],
        "urls": urls,
        "retried": row["tried_again"] or 0,
        "images": row["images"],
        "success_share": round(row["images"] / urls, 6) if urls else None,
    }


def _unused_stages(query: Query) -> dict[str, set[Stage]]:
    """Return the stages that no shard of a source goes through, by source, as the latest run's config says."""
    rows = query.rows(
        """SELECT json_extract_string(source, '$.name') AS name, json_extract_string(source, '$.kind') AS kind,
            filtered, chosen_by
        FROM (SELECT unnest(from_json(json_extract(config, '$.source'), '["JSON"]')) AS source,
                coalesce(json_type(config, '$.filter'), 'NULL') <> 'NULL' AS filtered,
                json_extract_string(config, '$.select.by') AS chosen_by
              FROM runs ORDER BY run_id)"""
    )
    unused: dict[str, set[Stage]] = {}
    for row in rows:
        used = stages_of_source(row["kind"], filtered=row["filtered"], chosen_by=row["chosen_by"])
        unused[row["name"]] = {*STAGES} - {*used}
    return unused


def _uncommitted_attempts(manifest: Manifest) -> list[Row]:
    """Return the attempts that began and did not commit: under way, or killed."""
    names = ("stage", "source", "shard", "run_id")
    return [
        {name: getattr(attempts, name) for name in names} | {"since": info.modified}
        for info, attempts, _ in noted_attempts(manifest.storage)
    ]
