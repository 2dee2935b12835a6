"""The candidates of a shard as rows: the synthetic captions, those that came with the URLs, and how many are judged."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import pyarrow as pa

from pipeline.corpus.commit import ShardCommit, ShardStats
from pipeline.corpus.records import Records
from pipeline.prefetch import in_batches, prefetch_map
from pipeline.shards.shard_files import write_parquet
from pipeline.shards.shard_reader import CrawledShard, committed_table
from pipeline.text import clean_caption, mark_duplicates
from schemas.records import ShardRecord, ShardTask
from schemas.stages import Stage
from schemas.tables import STAGE_SCHEMAS

P = TypeVar("P")
Rows = dict[str, list[dict[str, Any]]]


def candidate_rows(records: Records, shard: CrawledShard, task: ShardTask) -> Rows:
    """Return the rows of each key: the synthetic captions, then those that the source's list gave."""
    rows: Rows = defaultdict(list)
    if "caption" in task.inputs:
        rows = _stored(records, task, "caption", ("key", "candidate"))
    samples = shard.samples.select(["uid", "source", "shard", "key", "captions"])
    for sample in samples.to_pylist():
        given = sample.pop("captions") or []
        rows[sample["key"]].extend(_given_rows(sample, given, task.kind))
    return rows


def scored_rows(records: Records, shard: CrawledShard, task: ShardTask) -> Rows:
    """Return the rows of each key with the scores of the rank stage; without them where CLIP ranks nothing."""
    if "rank" not in task.inputs:
        return candidate_rows(records, shard, task)
    # Within an image as the ranking has them: the synthetic captions first.
    return _stored(records, task, "rank", ("key",))


def distinct_texts(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the texts of an image's rows that a model can judge, each once."""
    return list(dict.fromkeys(row["text"] for row in rows if row["text"]))


def count_judged(
    rows: Sequence[dict[str, Any]], column: str, num_images: int, stats: ShardStats
) -> list[dict[str, Any]]:
    """Count the rows by whether ``column`` has what a model says of them, and why not; return those where it has."""
    judged = [row for row in rows if row.get(column) is not None]
    empty = sum(not row["text"] for row in rows)
    stats.rows_in, stats.rows_out, stats.images = len(rows), len(judged), num_images
    stats.count("scored", rows=len(judged))
    if empty:
        stats.count("unscored", "empty", rows=empty)
    if undecodable := len(rows) - len(judged) - empty:
        stats.count("unscored", "undecodable", rows=undecodable)
    return judged


@dataclass(slots=True)
class ImageCandidates(Generic[P]):
    """The rows of an image's candidates, and its pixels as a model takes them; None where it does not decode."""

    candidates: list[dict[str, Any]]
    pixels: P | None


def image_batches(
    shard: CrawledShard,
    rows: Rows,
    prepare: Callable[[bytes], P | None],
    stats: ShardStats,
    *,
    size: int,
    threads: int,
) -> Iterator[list[ImageCandidates[P]]]:
    """Return batches of images in order of key, those that do not decode included; ``threads`` prepare them."""

    def image(key: str) -> ImageCandidates[P]:
        return ImageCandidates(rows.get(key, []), prepare(shard.image_bytes(key)))

    images = prefetch_map(image, shard.keys, ahead=2 * size, threads=threads)
    return in_batches(images, size, partial(stats.timed, "decode"))


def publish_rows(commit: ShardCommit, rows: Sequence[dict[str, Any]], schema: pa.Schema) -> ShardRecord:
    """Write rows as the Parquet of a shard and publish it; return the record that stands."""
    path = commit.folder / "rows.parquet"
    with commit.stats.timed("write"):
        written = write_parquet(path, rows, schema)
    return commit.publish({"parquet": (path, written)})


def _stored(records: Records, task: ShardTask, stage: Stage, order: Sequence[str]) -> Rows:
    rows: Rows = defaultdict(list)
    table = committed_table(records, task.inputs[stage].outputs["parquet"], STAGE_SCHEMAS[stage].names)
    for row in table.sort_by([(name, "ascending") for name in order]).to_pylist():
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
