"""What is asked beyond the tables: views, functions and macros, each with what it answers."""

from schemas.catalog.sql_text import quote
from schemas.names import URL_HOST
from schemas.stages import STAGE_INFO, STAGES

# Of rows with a column ``stage``: the order of the work, for ORDER BY.
STAGE_ORDER = f"list_position({['urls', *STAGES]}, stage)"

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
