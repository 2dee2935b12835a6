"""The tables: which rows of the records stand, which files count, and the samples and captions in them."""

from schemas.catalog.sql_text import quote, quoted
from schemas.catalog.table_schemas import DATA_STAGES, RECORD_TABLES
from schemas.tables import CANDIDATES, CAPTIONS, CURATED, MARKS, MATCHES, SAMPLES, SHARDS, SNAPSHOTS


# The Parquet files of the data tables, by kind: those that the record of a shard commits. Captions count until their
# shard is ranked or filtered, since scores and matches repeat them; scores until those same scores are filtered.
# Matches of other scores than the shard has now do not count. Of matches that read none (``select.by = "itm"``) and
# of scores, those count that the selection read, and before there is one the newer. ``retries`` are the raw files of
# shards that try URLs again.
def committed_files_of(shards: str) -> str:
    """Return the SELECT of ``base.committed_files`` over a relation with all rows of some shards, or of all."""
    return f"""
    WITH outputs AS (
        SELECT CASE {" ".join(f"WHEN stage = {quote(stage)} THEN {quote(name)}" for name, stage in DATA_STAGES.items())}
            ELSE stage END AS kind, source, shard, paths['parquet'] AS path,
            sha256['parquet'] AS sha256, finished_at, inputs['rank.parquet'] AS of_scores,
            inputs['filter.parquet'] AS of_matches
        FROM {shards} WHERE state = 'committed' AND stage <> 'urls'
    ), filtered AS (
        SELECT matches.source, matches.shard, scores.path IS NULL
                OR scores.sha256 = coalesce(matches.of_scores, '')
                OR matches.of_scores IS NULL AND coalesce(
                    curated.of_matches = matches.sha256, matches.finished_at > scores.finished_at) AS counts
        FROM (SELECT * FROM outputs WHERE kind = 'matches') AS matches
        LEFT JOIN (SELECT * FROM outputs WHERE kind = 'scores') AS scores USING (source, shard)
        LEFT JOIN (SELECT * FROM outputs WHERE kind = 'curated') AS curated USING (source, shard)
    )
    SELECT kind, source, shard, path FROM outputs ANTI JOIN (
        SELECT 'captions' AS kind, source, shard FROM outputs WHERE kind IN ('scores', 'matches')
        UNION ALL
        SELECT CASE WHEN counts THEN 'scores' ELSE 'matches' END, source, shard FROM filtered
    ) USING (kind, source, shard)
    UNION ALL
    SELECT 'retries', source, shard, path FROM outputs SEMI JOIN (
        SELECT 'raw' AS kind, source, shard FROM {shards} WHERE stage = 'urls' AND counts['retry'] > 0
    ) USING (kind, source, shard)"""


COMMITTED_FILES = committed_files_of("main.shards")


def _standing(columns: str, events: str) -> str:
    """Return the SELECT of the rows of shards' records that stand, each in the state that it has now.

    One row for each commit, its last state; a quarantined shard vanishes once it is committed. Of two commits of a
    shard the older is retired, and was listed before its record went.
    """
    return f"""
        WITH latest AS (
            SELECT *, state = 'quarantined' AS failed FROM {events}
            QUALIFY row_number() OVER (
                PARTITION BY stage, source, shard, attempt
                ORDER BY state = 'retired' DESC, finished_at DESC) = 1
        ), seen AS (
            SELECT *, bool_or(state = 'committed') OVER same_shard AS is_committed,
                max(finished_at) FILTER (NOT failed) OVER same_shard AS last_commit,
                max(finished_at) FILTER (state = 'committed') OVER same_shard AS committed_at
            FROM latest WINDOW same_shard AS (PARTITION BY stage, source, shard)
        )
        SELECT {columns} FROM (
            SELECT * REPLACE (CASE WHEN state = 'committed' AND finished_at < committed_at THEN 'retired'
                ELSE state END AS state)
            FROM seen)
        WHERE NOT failed OR NOT (is_committed OR coalesce(last_commit >= finished_at, false))"""


def standing_rows(events: str) -> str:
    """Return the SELECT of ``place`` and ``state`` of the rows that stand, in order; ``place`` is a column of theirs.

    A shard's only row stands as it is: there are many, and the others are judged in a fiftieth of the time.
    """
    shard = "stage, source, shard"
    of_several = f"(SELECT * FROM {events} SEMI JOIN several USING ({shard}))"
    return f"""
        WITH several AS MATERIALIZED (SELECT {shard} FROM {events} GROUP BY ALL HAVING count(*) > 1)
        SELECT place, state FROM {events} ANTI JOIN several USING ({shard})
        UNION ALL SELECT * FROM ({_standing("place, state", of_several)})
        ORDER BY place"""


def _first_by(table: str, key: str, order: str) -> str:
    """Return the SELECT of one row of a table of records for each key: the first in an order."""
    return f"""
        SELECT {quoted(RECORD_TABLES[table].names)} FROM base.{table}_events
        QUALIFY row_number() OVER (PARTITION BY {key} ORDER BY {order}) = 1"""


TABLE_SQL: dict[str, str] = {
    "shards": _standing(quoted(SHARDS.names), "base.shards_events"),
    "lost_attempts": _first_by("lost_attempts", "stage, source, shard, run_id, number", "ended_at"),
    "runs": _first_by("runs", "run_id", "outcome IS NOT NULL DESC, finished_at DESC"),
    "models": _first_by("models", "digest", "registered_at"),
    "checkpoints": _first_by("checkpoints", "path", "created_at DESC"),
    # A record of the corpus knows more than the file beside the checkpoints: of copies, which shards they are of.
    "snapshots": f"""
        SELECT {quoted(SNAPSHOTS.names)} FROM (
            SELECT *, starts_with(record, 'records/') AS is_record FROM base.snapshots_events)
        QUALIFY is_record = bool_or(is_record) OVER (PARTITION BY digest, folder)
            AND row_number() OVER (
                PARTITION BY digest, folder, is_record, corpus, source, shard, sha256['tar']) = 1""",
    # What takes a mark back has a row for each value of that mark, with nothing but ``undone_at``.
    "marks": f"""
        SELECT {", ".join(f"max({name}) AS {name}" if name not in ("mark", "value") else name for name in MARKS.names)}
        FROM base.marks_events GROUP BY mark, value HAVING max(what) IS NOT NULL""",
    # One row a uid: the row of its latest retry stands for all its tries.
    "samples": f"""
        WITH last_try AS (
            SELECT source, uid, max_by(shard, shard::BIGINT) AS shard FROM base.retried GROUP BY source, uid)
        SELECT {", ".join(f'raw."{name}"' for name in SAMPLES.names)} FROM base.raw AS raw
        LEFT JOIN last_try ON raw.source = last_try.source AND raw.uid = last_try.uid
        WHERE last_try.shard IS NULL OR raw.shard = last_try.shard""",
    "candidates": f"""
        SELECT {quoted(CANDIDATES.names)}, NULL::FLOAT AS match_probability FROM base.scores
        UNION ALL
        SELECT {quoted(MATCHES.names)} FROM base.matches
        UNION ALL
        SELECT {quoted(CAPTIONS.names)}, NULL::FLOAT AS score, NULL::FLOAT AS rerank_score, NULL::BOOLEAN AS
        truncated, NULL::FLOAT AS match_probability FROM base.captions""",
    "curated": f"SELECT {quoted(CURATED.names)} FROM base.curated WHERE status = 'kept'",
    "dropped": f"SELECT {quoted(CURATED.names)} FROM base.curated WHERE status = 'dropped'",
}
