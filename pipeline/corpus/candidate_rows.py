"""The candidates of a shard as rows: the synthetic captions, and those that came with the URLs."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from pipeline.corpus.records import Records
from pipeline.corpus.shard_reader import CrawledShard, committed_table
from pipeline.text import clean_caption, mark_duplicates
from schemas.records import ShardTask
from schemas.tables import CANDIDATES, CAPTIONS

Rows = dict[str, list[dict[str, Any]]]


def candidate_rows(records: Records, shard: CrawledShard, task: ShardTask) -> Rows:
    """Return the rows of each key: the synthetic captions, then those that the source's list gave."""
    rows = (
        _stored(records, task, CAPTIONS.names, "caption") if "caption" in task.inputs else defaultdict(list)
    )
    samples = shard.samples.select(["uid", "source", "shard", "key", "captions"])
    for sample in samples.to_pylist():
        given = sample.pop("captions") or []
        rows[sample["key"]].extend(_given_rows(sample, given, task.kind))
    return rows


def scored_rows(records: Records, shard: CrawledShard, task: ShardTask) -> Rows:
    """Return the rows of each key with the scores of the rank stage; without them where CLIP ranks nothing."""
    if "rank" not in task.inputs:
        return candidate_rows(records, shard, task)
    return _stored(records, task, CANDIDATES.names, "rank")


def _stored(records: Records, task: ShardTask, columns: Sequence[str], stage: Any) -> Rows:
    rows: Rows = defaultdict(list)
    table = committed_table(records, task.inputs[stage].outputs["parquet"], columns)
    # In the order of their table: the synthetic captions first.
    order = (
        [("key", "ascending"), ("candidate", "ascending")] if stage == "caption" else [("key", "ascending")]
    )
    for row in table.sort_by(order).to_pylist():
        rows[row["key"]].append(row)
    return rows


def _given_rows(sample: dict[str, Any], given: Sequence[str], origin: str) -> list[dict[str, Any]]:
    """Return the rows of the captions that came with the URL."""
    texts = [clean_caption(raw) for raw in given]
    return [
        sample
        | {"origin": origin, "candidate": index, "raw_text": raw, "text": text, "duplicate_of": earlier}
        for index, (raw, text, earlier) in enumerate(zip(given, texts, mark_duplicates(texts), strict=True))
    ]
