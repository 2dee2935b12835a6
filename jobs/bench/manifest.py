"""The manifest: the questions people ask, as ``capfilt sql`` answers them and in plain DuckDB, and compaction."""

from collections.abc import Callable
from statistics import median
from typing import Any

import duckdb

from jobs.bench.corpus import SOURCE, SyntheticCorpus
from jobs.bench.machine import Stopwatch, peak_bytes
from pipeline.manifest import CATALOG, Manifest
from pipeline.storage import temporary_folder
from pipeline.trace import trace

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
            crawl = corpus.crawl(shard)
            caption = corpus.caption(shard, crawl)
            rank = corpus.rank(shard, crawl, caption)
            corpus.select(shard, crawl, rank)
        storage = corpus.records.storage
        manifest = Manifest(storage)
        with Stopwatch() as first:
            compacted = manifest.compact()
        with Stopwatch() as idle:
            # As a process does that has compacted before; another one reads the parts first.
            assert manifest.compact() == 0
        [[uid, shard]] = manifest.query("SELECT uid, shard FROM curated ORDER BY uid LIMIT 1").rows
        queries = [
            _timed_query(name, sql.format(uid=uid, shard=shard), manifest) for name, sql in _QUERIES.items()
        ]
        queries.append({"query": "trace", "capfilt_s": _timed(lambda: trace(manifest, uid))[0], "rows": 1})
        counts = dict(manifest.query(_QUERIES["count by status"]).rows)
        candidates = manifest.query("SELECT count(*) FROM candidates").rows[0][0]
        size = sum(file.bytes for file in storage.list(""))
    assert counts["ok"] == images and candidates == 11 * images, (counts, candidates)
    return {
        "images": images,
        "urls": sum(counts.values()),
        "candidates": candidates,
        "shards": len(corpus.shards),
        "records": compacted,
        "corpus_bytes": size,
        "first_compaction_s": round(first.seconds, 3),
        "idle_compaction_s": round(idle.seconds, 3),
        "peak_bytes": peak_bytes(),
        "total_s": round(whole.seconds, 1),
        "queries": queries,
    }


def _timed_query(name: str, sql: str, manifest: Manifest) -> dict[str, Any]:
    """Ask both ways, each time from opening to the last row."""

    def plain() -> list[tuple[Any, ...]]:
        with duckdb.connect(manifest.storage.url(CATALOG), read_only=True) as connection:
            return connection.execute(sql).fetchall()

    capfilt_s, answer = _timed(lambda: manifest.query(sql).rows)
    plain_s, same = _timed(plain)
    assert answer == same, f"{name}: the two answers differ"
    return {"query": name, "capfilt_s": capfilt_s, "duckdb_s": plain_s, "rows": len(answer)}


def _timed(ask: Callable[[], Any]) -> tuple[float, Any]:
    """Return the median seconds of asking, files in the page cache, and the answer."""
    seconds = []
    for _ in range(_TIMES):
        with Stopwatch() as watch:
            answer = ask()
        seconds.append(watch.seconds)
    return round(median(seconds), 4), answer
