"""The SQL of everything that the page shows. ``capfilt sql`` answers each of these statements with the same rows.

Those of records read no sample. The others read ``cards``, of a large corpus those of a sample of its shards, which
the statement names.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jobs.look.view import HAS_IMAGE, PAGE_CARDS, View
from schemas.catalog.sql_text import quote
from schemas.statuses import By

# Numbers in the order in which the sentence says them.
FUNNEL = (
    "SELECT source, sum(rows_in - coalesce(counts['retry'], 0)) FILTER (stage = 'urls')::BIGINT AS urls, "
    "sum(images) FILTER (stage = 'crawl')::BIGINT AS images, sum(images) FILTER (stage = 'caption')::BIGINT AS "
    "captioned, sum(rows_out) FILTER (stage = 'select')::BIGINT AS curated "
    "FROM shards WHERE state = 'committed' GROUP BY source ORDER BY source"
)
LOSSES = (
    "SELECT source, stage, status, reason, \"rows\" FROM outcomes WHERE kind = 'status' "
    "AND ((stage = 'crawl' AND status <> 'ok') OR status IN ('dropped', 'unscored') OR (stage = 'caption' AND "
    "status = 'failed')) ORDER BY \"rows\" DESC, source, reason"
)
RUNS = (
    "SELECT run_id, command, started_at, finished_at, outcome, shards_done, shards_skipped, shards_failed, host "
    "FROM runs ORDER BY started_at DESC, run_id DESC LIMIT 50"
)
THROUGHPUT = "SELECT * FROM throughput"
TRAININGS = (
    "SELECT run_id, stage, path, step, samples, snapshot, metrics, created_at FROM checkpoints "
    "QUALIFY row_number() OVER (PARTITION BY run_id, stage ORDER BY step DESC) = 1 ORDER BY created_at DESC LIMIT 50"
)
SHARDS = (
    "SELECT source, shard, images FROM shards WHERE stage = 'crawl' AND state = 'committed' "
    "ORDER BY finished_at DESC, source, shard"
)
LAST_RUN = "SELECT run_id, command, outcome FROM runs ORDER BY started_at DESC, run_id DESC LIMIT 1"
LAST_CONFIG = (
    "SELECT run_id, config FROM runs WHERE command IN ('run', 'select') "
    "ORDER BY started_at DESC, run_id DESC LIMIT 1"
)
PROGRESS = "SELECT source, stage, shards FROM progress"
COMMITS = (
    "SELECT (SELECT count(*) FROM shards) AS shards, (SELECT max(finished_at) FROM shards) AS last_shard, "
    "(SELECT count(*) FROM runs) AS runs, (SELECT max(finished_at) FROM runs) AS last_run, "
    "(SELECT count(*) FROM checkpoints) AS checkpoints, "
    "(SELECT count(*) FILTER (undone_at IS NULL) FROM marks) AS marks, (SELECT max(made_at) FROM marks) AS last_mark"
)


@dataclass(frozen=True, slots=True)
class Scope:
    """The shards of which samples are looked at: those named, or all."""

    shards: tuple[tuple[str, str], ...] | None = None

    @property
    def condition(self) -> list[str]:
        """Return the scope as SQL: no condition, or one."""
        if self.shards is None:
            return []
        by_source: dict[str, list[str]] = {}
        for source, shard in self.shards:
            by_source.setdefault(source, []).append(quote(shard))
        parts = [
            f"source = {quote(source)} AND shard IN ({', '.join(shards)})"
            for source, shards in by_source.items()
        ]
        return [parts[0] if len(parts) == 1 else f"({' OR '.join(f'({part})' for part in parts)})"]


def rows_of(view: View, scope: Scope, limit: int = PAGE_CARDS) -> str:
    """Return the question for the cards of a page."""
    start = f" OFFSET {(view.page - 1) * limit}" if view.page > 1 else ""
    return f"SELECT * FROM cards{_where(view, scope)} ORDER BY {view.order()} LIMIT {limit}{start}"


def count_of(view: View, scope: Scope) -> str:
    """Return the question for how many cards match."""
    return f"SELECT count(*) AS samples FROM cards{_where(view, scope)}"


def captions_of(uids: Iterable[str], shards: Iterable[tuple[str, str]]) -> str:
    """Return the question for every caption of some samples, best first."""
    (condition,) = Scope(tuple(sorted(set(shards)))).condition
    return (
        "SELECT uid, origin, candidate, text, score, duplicate_of FROM candidates "
        f"WHERE {condition} AND uid IN ({', '.join(map(quote, uids))}) "
        "ORDER BY uid, score DESC NULLS LAST, origin, candidate"
    )


def marks_of(uids: Iterable[str]) -> str:
    """Return the question for the marks that hold for some samples, whatever these are named by."""
    return (
        "SELECT cards.uid, what, named_by, value, caption, marks.reason FROM marks JOIN cards ON value = CASE named_by "
        "WHEN 'uid' THEN cards.uid WHEN 'url' THEN cards.url WHEN 'host' THEN cards.host ELSE cards.sha256 END "
        f"WHERE undone_at IS NULL AND cards.uid IN ({', '.join(map(quote, uids))}) ORDER BY made_at"
    )


def count_named(named_by: By, value: str, scope: Scope) -> str:
    """Return the question for how many samples have what a mark names."""
    return f"SELECT count(*) AS samples FROM cards{_where(View(), scope, f'{named_by} = {quote(value)}')}"


def rows_named(named_by: By, value: str, scope: Scope, limit: int) -> str:
    """Return the question for the first of these samples."""
    where = _where(View(), scope, f"{named_by} = {quote(value)}")
    return f"SELECT * FROM cards{where} ORDER BY uid LIMIT {limit}"


def bars_of(name: str, stage: str, step: float) -> str:
    """Return the question for a histogram of the records in bins of ``step``."""
    return (
        f'SELECT round(floor(low / {step:g} + 1e-6) * {step:g}, 4) AS low, sum("count")::BIGINT AS "count" '
        f'FROM histogram_of({quote(name)}) WHERE stage = {quote(stage)} AND "count" > 0 GROUP BY 1 ORDER BY 1'
    )


def hosts_of(scope: Scope, limit: int = 12) -> str:
    """Return the question for the hosts with most URLs: how many gave an image, and how long the slowest took."""
    return (
        f"SELECT host, count(*) FILTER ({HAS_IMAGE}) AS images, count(*) AS urls, "
        "round(quantile_cont(seconds, 0.95)::DOUBLE, 2) AS p95_s "
        f"FROM cards{_where(View(), scope)} GROUP BY host ORDER BY urls DESC, host LIMIT {limit}"
    )


def _where(view: View, scope: Scope, *more: str) -> str:
    conditions: Sequence[str] = [*scope.condition, *view.conditions(), *more]
    return f" WHERE {' AND '.join(conditions)}" if conditions else ""
