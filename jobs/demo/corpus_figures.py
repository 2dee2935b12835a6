"""What became of the demo's URLs, and how true its captions are: the web's, the captioner's, and what is kept of them.

A caption counts as true only if it parses under the world's grammar and every claim in it holds for the scene that the
picture was drawn from. No model takes part in that.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from jobs.demo.world.scenes import true_share
from jobs.demo.world.site import scene_of
from pipeline.corpus.records import Records
from pipeline.shards.shard_reader import committed_table
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig


def corpus_figures(config: CapfiltConfig, seconds: float) -> dict[str, Any]:
    """Count samples and judge every caption by the world's ground truth.

    Args:
        seconds: the wall clock of making the corpus.
    """
    records = Records(Storage(config.corpus.path))
    rows: dict[str, list[dict[str, Any]]] = {"crawl": [], "filter": [], "select": []}
    for (stage, _, _), record in records.shards(("crawl", "filter", "select")).items():
        rows[stage] += committed_table(records, record.outputs["parquet"]).to_pylist()
    images = [row for row in rows["crawl"] if row["status"] == "ok"]
    failures = Counter(row["reason"] for row in rows["crawl"] if row["status"] != "ok")
    curated = [row for row in rows["select"] if row["status"] == "kept"]
    captions = {
        "web": _judged((row["url"], row["captions"][:1]) for row in images),
        **_judged_candidates(rows["filter"], {row["uid"]: row["url"] for row in images}, config),
        "capfilt": _judged((row["url"], row["captions"]) for row in curated),
    }
    return {
        "urls": len(rows["crawl"]),
        "images": len(images),
        "failures": failures.total(),
        "failures_by_reason": dict(failures.most_common()),
        "captions": captions,
        "web_true_share": captions["web"]["true_share"],
        "curated_true_share": captions["capfilt"]["true_share"],
        "curated_images": len(curated),
        "dropped": len(rows["select"]) - len(curated),
        "seconds": round(seconds, 1),
    }


def _judged_candidates(
    rows: Iterable[dict[str, Any]], url_by_uid: dict[str, str], config: CapfiltConfig
) -> dict[str, dict[str, float]]:
    """Judge the web's captions that the filter says match, and all that the captioner wrote; nothing without rows."""
    texts: dict[str, list[tuple[str, list[str]]]] = {"filtered": [], "captioned": []}
    for row in rows:
        probability = row["match_probability"]
        if row["origin"] == "synthetic":
            texts["captioned"].append((url_by_uid[row["uid"]], [row["text"]]))
        elif probability is not None and probability >= config.select.min_match:
            texts["filtered"].append((url_by_uid[row["uid"]], [row["text"]]))
    return {name: _judged(of_urls) for name, of_urls in texts.items()} if rows else {}


def _judged(captions: Iterable[tuple[str, list[str]]]) -> dict[str, float]:
    """Return how many texts of all URLs there are, and the share of entirely true ones."""
    described = [(text, scene_of(url)) for url, texts in captions for text in texts]
    return {"texts": len(described), "true_share": round(true_share(described), 4)}
