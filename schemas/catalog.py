"""The SQL of the manifest: the tables as views over committed files, and the views and macros on top of them.

The SQL keeps to what DuckDB 1.5 knows too (``CASE``, not the ``if()`` of 2.0), since people open the catalog in the
shell that they have.

Two layers. ``base`` has one relation for each kind of file; it is either Parquet found by name and kept only
where a record commits it (``file_relations``: the catalog that anyone opens), or Arrow data that the caller
registers (the sandbox of ``capfilt sql``). Everything else is the same SQL on both.
"""

import functools
import re
from collections.abc import Mapping, Sequence

import pyarrow as pa

from schemas.names import URL_HOST
from schemas.stages import STAGE_FOLDERS, STAGE_INFO, STAGES, Stage
from schemas.tables import (
    CANDIDATES,
    CAPTIONS,
    CHECKPOINTS,
    CURATED,
    LOST_ATTEMPTS,
    MARKS,
    MATCHES,
    MODELS,
    RUNS,
    SAMPLES,
    SHARDS,
    SNAPSHOTS,
    STAGE_SCHEMAS,
    TABLE_DOCS,
    TABLES,
    column_doc,
)

# Tables whose rows come from records; their Parquet parts lie under manifest/<table>/.
RECORD_TABLES: dict[str, pa.Schema] = {
    "shards": SHARDS,
    "lost_attempts": LOST_ATTEMPTS,
    "runs": RUNS,
    "models": MODELS,
    "checkpoints": CHECKPOINTS,
    "snapshots": SNAPSHOTS,
    "marks": MARKS,
}

# Tables whose rows lie in the shards' own Parquet files: folder -> schema, and the stage that writes them.
DATA_TABLES: dict[str, pa.Schema] = {STAGE_FOLDERS[stage]: STAGE_SCHEMAS[stage] for stage in STAGES}
DATA_STAGES: dict[str, Stage] = {STAGE_FOLDERS[stage]: stage for stage in STAGES}

# Of rows with a column ``stage``: the order of the work, for ORDER BY.
STAGE_ORDER = f"list_position({['urls', *STAGES]}, stage)"

# The catalog's file in a corpus.
CATALOG = "manifest.duckdb"

# Columns of the parts of shards alone.
HISTOGRAM_BINS, HISTOGRAM_COUNTS = "histogram_bins", "histogram_counts"

# A folder no source can be called: its empty file keeps a glob from matching nothing, an error in DuckDB.
# It sorts last, since DuckDB takes the first file's rows for every file's: an empty one makes it join the
# wrong way round.
EMPTY_FOLDER = "~empty"


def record_row_schema(table: str) -> pa.Schema:
    """Return a part's columns: a table's, the record that each row was read from, and that file's version.

    Of shards also columns that SQL does not show, and that old parts lack: bytes and rows of each output as JSON
    (``files``), and the histograms as the names and edges of their bins, which most records share, and a list of all
    counts.
    """
    hidden = [pa.field("files", pa.string()), pa.field(HISTOGRAM_BINS, pa.string()),
              pa.field(HISTOGRAM_COUNTS, pa.list_(pa.int64()))]  # fmt: skip
    more = [
        *(hidden if table == "shards" else ()),
        *(pa.field(name, pa.string()) for name in ("record", "version")),
    ]
    return pa.schema([*(field.remove_metadata() for field in RECORD_TABLES[table]), *more])


def _event_columns(table: str) -> list[str]:
    return [*RECORD_TABLES[table].names, "record", "version"]


def quote(text: str) -> str:
    """Return text as an SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def file_relations(root: str, *, of_formats: bool = False) -> dict[str, str]:
    """Return ``base`` as SELECTs over the corpus's files, found by glob each time they are queried.

    Globs also match files that no record commits, hence the semi-joins with the committed names.

    Args:
        of_formats: files of several formats lie there, and a column that some lack is NULL in their rows. DuckDB then
            opens every file before it answers; else it takes the columns of the first.
    """
    folder = _literal(root)
    relations = {
        f"{table}_events": f"""
        SELECT {_quoted(_event_columns(table))}
        FROM read_parquet({quote(f"{folder}/manifest/{table}/*.parquet")}, union_by_name = true)"""
        for table in RECORD_TABLES
    }
    for name, schema in DATA_TABLES.items():
        relations[name] = _committed_rows(root, folder, name, schema.names, of_formats)
    relations["retried"] = _committed_rows(root, folder, "retries", ["source", "uid", "shard"], of_formats)
    return relations


def _committed_rows(root: str, folder: str, name: str, columns: list[str], of_formats: bool) -> str:
    """Return the SELECT of the committed files of one kind."""
    pattern = f"{folder}/{'raw' if name == 'retries' else name}/*/*.parquet"
    by_name = ", union_by_name = true" if of_formats else ""
    return f"""
        SELECT {_quoted(columns)} FROM read_parquet({quote(pattern)}, filename = true{by_name})
        SEMI JOIN (
            SELECT {quote(root)} || '/' || path AS filename FROM base.committed_files WHERE kind = {quote(name)}
        ) USING (filename)"""


# The Parquet files of the data tables, by kind: those that the record of a shard commits. Captions count until their
# shard is ranked or filtered, since scores and matches repeat them; scores until those same scores are filtered.
# Matches of other scores than the shard has now do not count. ``retries`` are the raw files of shards that try URLs
# again.
def committed_files_of(shards: str) -> str:
    """Return the SELECT of ``base.committed_files`` over a relation with all rows of some shards, or of all."""
    return f"""
    WITH outputs AS (
        SELECT CASE {" ".join(f"WHEN stage = {quote(stage)} THEN {quote(name)}" for name, stage in DATA_STAGES.items())}
            ELSE stage END AS kind, source, shard, paths['parquet'] AS path,
            sha256['parquet'] AS sha256, inputs['rank.parquet'] AS of_scores
        FROM {shards} WHERE state = 'committed' AND stage <> 'urls'
    ), filtered AS (
        SELECT matches.source, matches.shard, scores.path IS NULL
                OR coalesce(scores.sha256 = matches.of_scores, false) AS counts
        FROM (SELECT * FROM outputs WHERE kind = 'matches') AS matches
        LEFT JOIN (SELECT * FROM outputs WHERE kind = 'scores') AS scores USING (source, shard)
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


_COMMITTED_FILES = committed_files_of("main.shards")


def parquet_files(paths: Sequence[str], schema: pa.Schema) -> str:
    """Return the SELECT of some Parquet files, by name, that all have the columns of the schema."""
    return f"SELECT {_quoted(schema.names)} FROM read_parquet({_list(paths)})"


def parquet_files_of_formats(paths: Sequence[str], schema: pa.Schema, empty: str) -> str:
    """Return the SELECT of some Parquet files, by name; a column that a file lacks is NULL in its rows.

    DuckDB opens every file before it answers.

    Args:
        empty: a relation with the columns of the schema and no row, for columns that all the files lack.
    """
    return (
        f"SELECT {_quoted(schema.names)} FROM (FROM read_parquet({_list(paths)}, union_by_name = true) "
        f"UNION ALL BY NAME FROM {empty})"
    )


def _list(paths: Sequence[str]) -> str:
    return f"[{', '.join(quote(_literal(path)) for path in paths)}]"


def _literal(path: str) -> str:
    """Return a path as a glob that matches it alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in path)


def unquote_glob(text: str) -> str:
    """Return the path of which ``file_relations`` made this part of a string literal."""
    return re.sub(r"\[([*?[])\]", r"\1", text.replace("''", "'"))


def registered_relations() -> dict[str, str]:
    """Return ``base`` as SELECTs from relations on the connection: ``raw_data``, ``shards_data``, ..."""
    events = {
        f"{table}_events": f"SELECT {_quoted(_event_columns(table))} FROM {table}_data"
        for table in RECORD_TABLES
    }
    data = {name: f"SELECT * FROM {name}_data" for name in DATA_TABLES}
    # Which rows stand was found out once, for all connections.
    shards = {"shards": f"SELECT {_quoted(SHARDS.names)} FROM standing_shards_data"}
    return {**events, **shards, **data, "retried": "SELECT source, uid, shard FROM retries_data"}


def record_views(relations: Mapping[str, str]) -> list[str]:
    """Return the statements that make the tables whose rows come from records.

    ``base.<table>_events`` are the rows of all records, as existing catalogs call them; the tables keep the last state.
    """
    bases = [_view(f"base.{table}_events", relations[f"{table}_events"]) for table in RECORD_TABLES]
    return [
        "CREATE SCHEMA IF NOT EXISTS base",
        *bases,
        *(_view(name, relations.get(name, _TABLES[name])) for name in RECORD_TABLES),
        _view("base.committed_files", _COMMITTED_FILES),
    ]


def data_views(relations: Mapping[str, str]) -> list[str]:
    """Return the statements that make all else, once ``record_views`` are made."""
    bases = [_view(f"base.{name}", relations[name]) for name in (*DATA_TABLES, "retried")]
    tables = [_view(name, sql) for name, sql in _TABLES.items() if name not in RECORD_TABLES]
    views = [_view(name, sql) for name, (_, sql) in VIEWS.items()]
    functions = [f"CREATE OR REPLACE MACRO {call} AS {body}" for call, (_, body) in FUNCTIONS.items()]
    macros = [f"CREATE OR REPLACE MACRO {call} AS TABLE {body}" for call, (_, body) in TABLE_MACROS.items()]
    return [*bases, *tables, *functions, *views, *macros]


def _view(name: str, sql: str) -> str:
    return f"CREATE OR REPLACE VIEW {name} AS {sql}"


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def comments() -> list[str]:
    """Return the statements that say what each view and column is, for those who ask DuckDB."""
    tables = [
        f'COMMENT ON COLUMN {table}."{field.name}" IS {quote(column_doc(field))}'
        for table, schema in TABLES.items()
        for field in schema
    ]
    docs = TABLE_DOCS | {name: doc for name, (doc, _) in VIEWS.items()}
    return tables + [f"COMMENT ON VIEW {name} IS {quote(doc)}" for name, doc in docs.items()]


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


_TABLES: dict[str, str] = {
    "shards": _standing(_quoted(SHARDS.names), "base.shards_events"),
    "lost_attempts": f"""
        SELECT {_quoted(LOST_ATTEMPTS.names)} FROM base.lost_attempts_events
        QUALIFY row_number() OVER (PARTITION BY stage, source, shard, run_id, number ORDER BY ended_at) = 1""",
    "runs": f"""
        SELECT {_quoted(RUNS.names)} FROM base.runs_events
        QUALIFY row_number() OVER (
            PARTITION BY run_id ORDER BY outcome IS NOT NULL DESC, finished_at DESC) = 1""",
    "models": f"""
        SELECT {_quoted(MODELS.names)} FROM base.models_events
        QUALIFY row_number() OVER (PARTITION BY digest ORDER BY registered_at) = 1""",
    "checkpoints": f"""
        SELECT {_quoted(CHECKPOINTS.names)} FROM base.checkpoints_events
        QUALIFY row_number() OVER (PARTITION BY path ORDER BY created_at DESC) = 1""",
    # A record of the corpus knows more than the file beside the checkpoints: of copies, which shards they are of.
    "snapshots": f"""
        SELECT {_quoted(SNAPSHOTS.names)} FROM (
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
        SELECT {_quoted(CANDIDATES.names)}, NULL::FLOAT AS match_probability FROM base.scores
        UNION ALL
        SELECT {_quoted(MATCHES.names)} FROM base.matches
        UNION ALL
        SELECT {_quoted(CAPTIONS.names)}, NULL::FLOAT AS score, NULL::FLOAT AS rerank_score, NULL::BOOLEAN AS
        truncated, NULL::FLOAT AS match_probability FROM base.captions""",
    "curated": f"SELECT {_quoted(CURATED.names)} FROM base.curated WHERE status = 'kept'",
    "dropped": f"SELECT {_quoted(CURATED.names)} FROM base.curated WHERE status = 'dropped'",
}

_IS_STATUS = " OR ".join(
    f"(stage = {quote(stage)} AND status IN ({', '.join(map(quote, STAGE_INFO[stage].row_statuses))}))"
    for stage in STAGES
)

# Beyond the tables: name -> (what it answers, SQL). Those marked "records only" read no sample.
VIEWS: dict[str, tuple[str, str]] = {
    "progress": (
        "shards and rows by source and stage (records only)",
        f"""
        SELECT source, stage, count(*) FILTER (state = 'committed') AS shards,
            count(*) FILTER (state = 'quarantined') AS quarantined,
            sum(images) FILTER (state = 'committed') AS images,
            sum(rows_in) FILTER (state = 'committed') AS rows_in,
            sum(rows_out) FILTER (state = 'committed') AS rows_out,
            sum(bytes) FILTER (state = 'committed') AS bytes,
            max(finished_at) AS last_commit
        FROM shards WHERE state <> 'retired' GROUP BY source, stage
        ORDER BY source, {STAGE_ORDER}""",
    ),
    "outcomes": (
        "rows by source, stage, status and reason, a retry counted as a row more; those of kind 'status' sum up to "
        "the stage's rows_in, those of kind 'note' were counted beside them (records only)",
        f"""
        WITH counted AS (
            SELECT source, stage, split_part(name, '/', 1) AS status,
                nullif(split_part(name, '/', 2), '') AS reason, sum("rows")::BIGINT AS "rows"
            FROM (
                -- Summed by whole names first: they are split a few times, not once a shard.
                SELECT source, stage, name, sum("rows") AS "rows" FROM (
                    SELECT source, stage, unnest(map_keys(counts)) AS name, unnest(map_values(counts)) AS "rows"
                    FROM shards WHERE state = 'committed' AND stage <> 'urls')
                GROUP BY ALL)
            WHERE name <> 'device_batch'  -- images at a time
            GROUP BY ALL
        ), apart AS (
            -- A count under the status alone includes those under its reasons.
            SELECT * REPLACE (("rows" - CASE WHEN reason IS NULL THEN coalesce(
                sum("rows") FILTER (reason IS NOT NULL) OVER (PARTITION BY source, stage, status), 0)
                ELSE 0 END)::BIGINT AS "rows")
            FROM counted
        )
        SELECT source, stage, CASE WHEN {_IS_STATUS} THEN 'status' ELSE 'note' END AS kind,
            status, reason, "rows"
        FROM apart WHERE "rows" > 0
        ORDER BY source, {STAGE_ORDER},
            kind DESC, status, reason""",
    ),
    "throughput": (
        "images per second of one worker, by stage and device (records only)",
        f"""
        SELECT stage, source, device, count(*) AS shards, sum(images)::BIGINT AS images,
            sum(seconds['total']) AS worker_seconds,
            sum(seconds['total']) FILTER (device <> 'cpu') AS gpu_seconds,
            sum(images) / nullif(sum(seconds['total']), 0) AS images_per_second
        FROM shards WHERE state = 'committed' AND stage <> 'urls' GROUP BY stage, source, device
        ORDER BY {STAGE_ORDER}, source, device""",
    ),
    "costs": (
        "worker-hours by run, stage, source, node type and outcome (committed, retired since, or lost), and their cost "
        "by cluster.prices: the run's own, else those of the latest run that has some (records only)",
        f"""
        WITH spent AS (
            SELECT run_id, stage, source, state AS outcome, coalesce(seconds['worker'], seconds['total']) AS seconds,
                cpus, gpus, coalesce(node_type, device) AS node_type
            FROM shards WHERE state IN ('committed', 'retired') AND stage <> 'urls'
            UNION ALL
            SELECT run_id, stage, source, 'lost', seconds, cpus, gpus, node_type FROM lost_attempts
        ), summed AS (
            SELECT run_id, stage, source, coalesce(node_type, 'cpu') AS node_type, outcome, cpus, gpus,
                count(*) AS attempts, sum(seconds) / 3600 AS hours
            FROM spent GROUP BY ALL
        ), priced AS (
            SELECT run_id, config, TRY_CAST(nullif(json_extract(config, '$.cluster.prices'), '{{}}')
                AS MAP(VARCHAR, DOUBLE)) AS prices FROM runs
        ), held AS (
            -- Records of earlier versions do not say what a worker held; the config of their run does.
            SELECT run_id, stage, source, node_type, outcome, attempts, hours,
                hours * coalesce(cpus, json_extract_string(config, '$.cluster.' || stage || '.cpus')::DOUBLE, 1)
                    AS cpu_hours,
                hours * coalesce(gpus, json_extract_string(config, '$.cluster.' || stage || '.gpus')::DOUBLE, 0)
                    AS gpu_hours,
                coalesce(prices, (SELECT max_by(prices, run_id) FROM priced WHERE prices IS NOT NULL)) AS prices
            FROM summed LEFT JOIN priced USING (run_id)
        )
        SELECT run_id, stage, source, node_type, outcome, sum(attempts)::BIGINT AS attempts,
            sum(hours) AS worker_hours, sum(cpu_hours) AS cpu_hours, sum(gpu_hours) AS gpu_hours,
            sum(cpu_hours * coalesce(prices['cpu'], CASE WHEN prices IS NOT NULL THEN 0 END)
                + CASE WHEN gpu_hours > 0 THEN gpu_hours * prices[node_type] ELSE 0 END) AS cost
        FROM held GROUP BY run_id, stage, source, node_type, outcome
        ORDER BY run_id, {STAGE_ORDER}, source, node_type, outcome""",
    ),
    "bins": (
        "the histograms that the stages counted, a row for each shard and bin (records only)",
        """
        SELECT stage, source, shard, name, bin, edges[bin] AS low, edges[bin + 1] AS high, counts[bin] AS
        "count" FROM (
            SELECT *, unnest(range(1, len(counts) + 1)) AS bin FROM (
                SELECT made.stage, made.source, made.shard, part.key AS name,
                    from_json(part.value->'edges', '["DOUBLE"]') AS edges,
                    from_json(part.value->'counts', '["BIGINT"]') AS counts
                FROM shards AS made, json_each(made.histograms) AS part
                WHERE made.state = 'committed' AND made.histograms IS NOT NULL))""",
    ),
    "failures": (
        "every sample that is not ok, with its host",
        """
        SELECT source, uid, shard, status, reason, detail, http_status, attempts, url_host(url) AS host,
        url, seconds FROM samples WHERE status <> 'ok'""",
    ),
    "kept_captions": (
        "one row for each kept caption, its place from 1 (best)",
        """
        SELECT source, shard, uid, key, url, unnest(range(1, len(captions) + 1)) AS place,
            unnest(captions) AS caption, unnest(scores) AS score, unnest(origins) AS origin,
            unnest(candidates) AS candidate
        FROM curated""",
    ),
    "cards": (
        "one row for each URL, as `capfilt look` shows it: status (kept or dropped once selected), best score of all "
        "candidates, lead = web_score - synthetic_score, margin = lowest kept score - best other, distinct texts",
        """
        WITH scored AS (
            SELECT source, shard, uid, max(score) AS score, max(score) FILTER (origin = 'web') AS web_score,
                max(score) FILTER (origin = 'synthetic') AS synthetic_score,
                count(*) FILTER (origin = 'synthetic' AND duplicate_of IS NULL) AS texts,
                max(score) FILTER (duplicate_of IS NULL AND NOT list_contains(captions, text)) AS best_other
            FROM candidates LEFT JOIN (SELECT source, shard, uid, captions FROM base.curated) AS selected
                USING (source, shard, uid)
            GROUP BY source, shard, uid)
        SELECT samples.uid, samples.source, samples.shard, samples.key, samples.url, url_host(samples.url) AS host,
            coalesce(selected.status, samples.status) AS status, coalesce(selected.reason, samples.reason) AS reason,
            samples.detail, samples.http_status, samples.seconds, samples.width, samples.height,
            least(samples.width, samples.height) AS short_side, samples.sha256, selected.captions, selected.scores,
            selected.origins, selected.candidates, selected.origins[1] AS origin,
            length(selected.caption) - length(replace(selected.caption, ' ', '')) + 1 AS words,
            scored.score, scored.web_score, scored.synthetic_score,
            scored.web_score - scored.synthetic_score AS lead, list_min(selected.scores) - scored.best_other AS margin,
            CASE WHEN scored.synthetic_score IS NOT NULL THEN scored.texts END AS texts
        FROM samples LEFT JOIN base.curated AS selected USING (source, shard, uid)
            LEFT JOIN scored USING (source, shard, uid)""",
    ),
    "trained_on": (
        "one row for each checkpoint and image that it was trained on, of shards that are now as they were then; "
        "`capfilt trace CORPUS UID` also knows those that were selected anew",
        """
            SELECT checkpoints.path AS checkpoint, checkpoints.stage, images.source, images.shard, images.uid
            FROM checkpoints
            JOIN snapshots ON snapshot = digest AND starts_with(checkpoints.path, folder || '/step-')
            JOIN shards ON snapshots.source = shards.source AND snapshots.shard = shards.shard
                AND snapshots.sha256['tar'] = shards.sha256['tar']
            JOIN (
                SELECT 'select' AS stage, source, shard, uid FROM curated
                UNION ALL
                SELECT 'crawl', source, shard, uid FROM samples WHERE status = 'ok'
            ) AS images ON images.stage = shards.stage AND images.source = shards.source
                AND images.shard = shards.shard
            WHERE shards.state = 'committed' AND NOT list_contains(held_out, images.uid)""",
    ),
}

# signature -> (what it returns, SQL)
FUNCTIONS: dict[str, tuple[str, str]] = {
    "url_host(url)": (
        "the host of a URL, lower case, without port",
        f"lower(regexp_extract(url, '{URL_HOST}', 1))",
    ),
}
# What this program adds to its own connections: a DuckDB of one's own does not have them.
PYTHON_FUNCTIONS: dict[str, str] = {
    "canonical_url(url)": "one spelling of all URLs that differ in spelling alone: case of the host, default port, "
    "percent-encoding, dot segments, fragment, IDNA; NULL for what is not an http(s) URL (`capfilt sql` and "
    "`Corpus.sql` alone)",
}
TABLE_MACROS: dict[str, tuple[str, str]] = {
    "histogram_of(name_)": (
        "one histogram of each source and stage (records only): SELECT * FROM histogram_of('kept_score')",
        """
        SELECT source, stage, low, high, sum("count")::BIGINT AS "count"
        FROM bins WHERE name = name_ GROUP BY ALL ORDER BY ALL""",
    ),
    "sample(who)": (
        "the row of one uid or URL: SELECT * FROM sample('https://...')",
        "SELECT * FROM samples WHERE uid = who OR url = who",
    ),
}

# What each name in a statement stands for.
_DEFINITIONS: dict[str, str] = {
    **_TABLES,
    **{name: sql for name, (_, sql) in VIEWS.items()},
    **{call.partition("(")[0]: body for call, (_, body) in (FUNCTIONS | TABLE_MACROS).items()},
    "committed_files": _COMMITTED_FILES,
}


def names_in(sql: str) -> set[str]:
    """Return every word of a statement, and every relation that the views and macros among them read."""
    names, new = set[str](), set(re.findall(r"\w+", sql.lower()))
    while new:
        names |= new
        new = set().union(*(_relations_of(name) for name in new & _DEFINITIONS.keys())) - names
    return names


@functools.cache
def _relations_of(name: str) -> set[str]:
    """Return the relations that a definition reads: of our own SQL they stand behind FROM and JOIN alone."""
    return set(re.findall(r"\b(?:FROM|JOIN)\s+(?:\w+\.)?(\w+)", _DEFINITIONS[name]))
