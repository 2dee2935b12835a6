"""The manifest: the questions people ask, as ``capfilt sql`` answers them and in plain DuckDB, and compaction."""

from statistics import median
from typing import Any

import duckdb

from jobs.bench.fixtures.corpus import SOURCE, SyntheticCorpus
from jobs.bench.fixtures.machine import Stopwatch, peak_bytes, seconds_by_variant
from pipeline.lineage.sample_trace import trace
from pipeline.manifest.manifest import Manifest
from pipeline.storage.scratch import temporary_folder
from schemas.catalog.table_schemas import CATALOG

_TIMES = 3

# In the order of the table. {shard} and {uid} are one that exists.
_QUERIES: dict[str, str] = {
    "count by status": "SELECT status, count(*) FROM samples GROUP BY status ORDER BY status",
    "score histogram": "SELECT floor(score * 50) / 50 AS low, count(*) FROM candidates GROUP BY low ORDER BY low",
    "score histogram, records only": """
        SELECT low, sum("count")::BIGINT FROM histogram_of('score') GROUP BY low ORDER BY low""",
    "by shard and origin": """
        SELECT shard, origin, count(*), round(avg(score), 4) FROM candidates GROUP BY ALL ORDER BY ALL""",
    "one shard": f"""
        SELECT uid, max(score) FROM candidates WHERE source = '{SOURCE}' AND shard = '{{shard}}'
        GROUP BY uid ORDER BY uid""",
    "one uid": "SELECT origin, text, score FROM candidates WHERE uid = '{uid}' ORDER BY ALL",
}


def measure_manifest(images: int) -> dict[str, Any]:
    """Commit a corpus of ``images`` images, compact its records, and time each question on it."""
    with temporary_folder() as folder, Stopwatch() as whole:
        corpus = SyntheticCorpus(folder, images)
        for shard in corpus.shards:
            corpus.select(shard, **corpus.crawl_to_rank(shard))
        manifest = Manifest(corpus.records.storage)
        with Stopwatch() as first:
            compacted = manifest.compact()
        # As the run that made it: another process reads the parts first.
        with Stopwatch() as idle:
            assert manifest.compact() == 0
        [[uid, shard]] = manifest.query("SELECT uid, shard FROM curated ORDER BY uid LIMIT 1").rows
        queries = [
            _timed_query(name, sql.format(uid=uid, shard=shard), manifest) for name, sql in _QUERIES.items()
        ]
        rows = len(trace(manifest, uid))
        traced = _medians(seconds_by_variant({"capfilt_s": lambda: trace(manifest, uid)}, _TIMES))
        queries.append({"query": "trace", **traced, "duckdb_s": None, "rows": rows})
        counts = dict(manifest.query(_QUERIES["count by status"]).rows)
        [[candidates]] = manifest.query("SELECT count(*) FROM candidates").rows
        sizes = manifest.query(
            "SELECT stage, sum(bytes)::DOUBLE FROM shards GROUP BY stage ORDER BY stage"
        ).rows
    assert counts["ok"] == images and candidates == 11 * images, (counts, candidates)
    return {
        "images": images,
        "urls": sum(counts.values()),
        "candidates": candidates,
        "shards": len(corpus.shards),
        "records": compacted,
        "bytes_per_image": {stage: round(size / images, 1) for stage, size in sizes if stage != "urls"},
        "first_compaction_s": round(first.seconds, 3),
        "idle_compaction_s": round(idle.seconds, 3),
        "peak_bytes": peak_bytes(),
        "total_s": round(whole.seconds, 1),
        "queries": queries,
    }


def _timed_query(name: str, sql: str, manifest: Manifest) -> dict[str, Any]:
    """Ask both ways in turn, each time from opening to the last row."""

    def plain() -> list[tuple[Any, ...]]:
        with duckdb.connect(manifest.storage.url(CATALOG), read_only=True) as connection:
            return connection.execute(sql).fetchall()

    def capfilt() -> list[tuple[Any, ...]]:
        return manifest.query(sql).rows

    # Asked once before: files are in the page cache by then.
    answer = capfilt()
    assert answer == plain(), f"{name}: the two answers differ"
    timed = seconds_by_variant({"capfilt_s": capfilt, "duckdb_s": plain}, _TIMES)
    return {"query": name, **_medians(timed), "rows": len(answer)}


def _medians(timed: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(median(seconds), 4) for name, seconds in timed.items()}
