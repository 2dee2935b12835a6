"""docs/manifest.md: every table, column, view and macro as the code declares them; questions with answers.

``make docs`` writes the page with the answers it has; ``python -m jobs.docs.manifest_page CORPUS`` asks a corpus
anew.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

from schemas.catalog import FUNCTIONS, TABLE_MACROS, VIEWS
from schemas.tables import TABLE_DOCS, TABLES, column_doc

# Real output, kept beside the page so that `make docs` gives the same page on every machine.
ANSWERS = Path(__file__).resolve().parent.parent.parent / "docs" / "manifest_answers.json"

# What people ask, in the order they ask it.
QUERIES: dict[str, str] = {
    "How much of the web answered?": """
SELECT source, status, count(*) AS samples,
    round(100 * count(*) / sum(count(*)) OVER (PARTITION BY source), 1) AS percent
FROM samples GROUP BY source, status ORDER BY samples DESC""",
    "Which hosts fail, and why?": """
SELECT host, reason, count(*) AS samples, round(avg(seconds), 2) AS seconds
FROM failures GROUP BY host, reason ORDER BY samples DESC, reason LIMIT 5""",
    "How do web captions score beside synthetic ones?": """
SELECT origin, count(*) AS candidates, round(avg(score), 3) AS mean,
    round(quantile_cont(score, 0.5), 3) AS median, round(quantile_cont(score, 0.95), 3) AS p95
FROM candidates GROUP BY origin ORDER BY origin""",
    "How often is the web caption among those kept?": """
SELECT place, origin, count(*) AS captions, round(avg(score), 3) AS score
FROM kept_captions GROUP BY place, origin ORDER BY place, origin""",
    "What would another threshold keep?": """
SELECT threshold, count(*) FILTER (best >= threshold) AS images
FROM (SELECT max(score) AS best FROM candidates GROUP BY source, uid),
    (VALUES (0.6), (0.7), (0.8), (0.9)) AS thresholds (threshold)
GROUP BY threshold ORDER BY threshold""",
    "How alike are the ten captions of an image?": """
SELECT distinct_texts, count(*) AS images
FROM (
    SELECT count(DISTINCT text) AS distinct_texts FROM candidates
    WHERE origin = 'synthetic' GROUP BY source, uid)
GROUP BY distinct_texts ORDER BY distinct_texts""",
    "How are the scores distributed? (records only)": """
SELECT round(floor(low * 10) / 10, 1) AS score, sum("count")::BIGINT AS captions
FROM histogram_of('kept_score') GROUP BY 1 HAVING captions > 0 ORDER BY 1""",
    "How fast is each stage? (records only)": """
SELECT stage, device, shards, images, round(worker_seconds, 1) AS worker_seconds,
    round(images_per_second, 1) AS images_per_second
FROM throughput""",
    "Which model made which shards?": """
SELECT stage, kind, left(digest, 12) AS digest, parameters, count(*) AS shards
FROM (SELECT stage, unnest(models) AS digest FROM shards WHERE state = 'committed') JOIN models USING (digest)
GROUP BY ALL ORDER BY stage""",
    "What failed every attempt?": """
SELECT stage, source, shard, error FROM shards WHERE state = 'quarantined'""",
    "What does a column mean?": """
SELECT column_name, data_type, comment FROM duckdb_columns()
WHERE schema_name = 'main' AND table_name = 'candidates' AND column_name LIKE '%score%'""",
}

_INTRODUCTION = """\
# The manifest

Every sample of a corpus in SQL. `make docs` writes this page from `schemas/tables.py` and
`schemas/catalog.py`.

The truth is the records under `records/`, one small JSON file for each shard and stage, created once. A run
copies new ones into Parquet parts under `manifest/` every 15 seconds (`[cluster] compact_interval_s`); the
samples and captions themselves stay in the shards' own Parquet. `manifest.duckdb` holds views and macros
over both, no data: nobody needs the write lock of a database, so any number of people can query while a run
of days writes, and what is not committed is never seen. `capfilt manifest rebuild CORPUS` makes the parts
anew from the records alone.

## Two ways to ask

`capfilt sql CORPUS "SELECT ..."` is a sandbox: one SELECT, DESCRIBE, SUMMARIZE or EXPLAIN; no other file, no
network, no writing in any form, nothing about the machine (settings, platform, folders); bounded in time
(`--timeout`) and memory (`--memory`). It works on S3 and
GCS as on local disk, includes what the manifest has not copied yet, and prints a table, `--json` or
`--csv`. It opens only the files that a filter on `source` and `shard` leaves.

Your own DuckDB, for long or heavy work:

```python
import duckdb

corpus = duckdb.connect("corpus/manifest.duckdb", read_only=True)
corpus.sql("SELECT status, count(*) FROM samples GROUP BY status")
```

The views look for new shards each time they are asked, so an open connection sees a run's progress. They
need no extension on local disk; for a corpus on S3, load `httpfs` and set the credentials first, or use
`capfilt sql`. DuckDB's own shell opens the file as well, from version 1.5 on. The views hold absolute paths:
where a corpus was copied or moved, the first capfilt command that reads it there writes them anew.

Do not write into the file: it is replaced when capfilt's views change. To take rows out, print them (`--csv`,
`--json`), or attach the file to a database of your own, where any `COPY` and `CREATE TABLE` works (the macros
need `USE corpus` first):

```sql
ATTACH 'corpus/manifest.duckdb' AS corpus (READ_ONLY);
COPY (SELECT uid, url, captions FROM corpus.curated) TO 'captions.parquet';
```
"""


def manifest_page() -> str:
    """Return docs/manifest.md."""
    parts = [_INTRODUCTION, "## Tables", ""]
    for table, schema in TABLES.items():
        parts += [f"### `{table}`", "", TABLE_DOCS[table], "", "| column | type | meaning |", "|---|---|---|"]
        parts += [
            f"| `{field.name}` | {field.type} | {_in_cell(column_doc(field))} |" for field in schema
        ] + [""]
    parts += ["## Views and macros", "", "| name | what it answers |", "|---|---|"]
    named = {**VIEWS, **FUNCTIONS, **TABLE_MACROS}
    parts += [f"| `{name}` | {_in_cell(doc)} |" for name, (doc, _) in named.items()]
    parts += ["", '"Records only" reads no sample: as quick on 129M images as on a thousand.', ""]
    parts += ["## Questions, with the answers of `make demo`'s corpus", ""]
    answers = json.loads(ANSWERS.read_text()) if ANSWERS.exists() else {}
    for question, sql in QUERIES.items():
        parts += [f"### {question}", "", "```sql", sql.strip(), "```", ""]
        if question in answers:
            parts += ["```text", answers[question], "```", ""]
    return "\n".join(parts)


def ask(corpus: str) -> dict[str, str]:
    """Return each question's answer, as ``capfilt sql`` prints it."""
    from jobs.output.render import print_table
    from pipeline.corpus.storage import Storage
    from pipeline.manifest.manifest import Manifest

    manifest, answers = Manifest(Storage(corpus)), {}
    for question, sql in QUERIES.items():
        answer = manifest.query(sql)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            print_table(answer.dicts(), answer.columns)
        answers[question] = printed.getvalue().rstrip("\n")
    return answers


def _in_cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    ANSWERS.write_text(json.dumps(ask(sys.argv[1]), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
