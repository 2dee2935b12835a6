"""Select the captions that training sees, and write them with their images as curated shards. Needs no GPU.

A curated shard is what others already read: ``KEY.jpg``, ``KEY.json`` (a JSON list of captions, best first:
LAVIS's LaionDataset draws from its first two) and ``KEY.txt`` (the best one: open_clip, img2dataset). Its
bytes are a function of its inputs and ``[select]`` alone. The image's bytes are those of the raw shard, never
encoded again; a PNG or WebP of an adopted folder keeps its extension (open_clip reads those too, LAVIS reads
``jpg`` only).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from math import isfinite
from operator import itemgetter
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.corpus.commit import SCORE_EDGES, ShardCommit, ShardStats, histogram
from pipeline.corpus.records import Records
from pipeline.corpus.shard_files import rows_to_table, write_parquet, write_tar
from pipeline.corpus.shard_reader import CrawledShard, committed_table, open_crawled
from pipeline.text import same_text_key
from schemas.config import CapfiltConfig, SelectConfig
from schemas.errors import CorruptShardError
from schemas.records import ShardRecord, ShardTask
from schemas.tables import CURATED

_CANDIDATE_COLUMNS = ("key", "origin", "candidate", "text", "score", "rerank_score")
_ORIGIN_ORDER = {"synthetic": 0, "human": 1, "web": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One scored text of an image; columns as in the table ``candidates``."""

    origin: str
    candidate: int
    text: str
    score: float | None
    rerank_score: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What is kept of an image's candidates, best first; ``reason`` says why nothing is."""

    kept: tuple[Candidate, ...]
    reason: str | None = None


def select(
    candidates: Sequence[Candidate], config: SelectConfig, kind: Literal["web", "human"] = "web"
) -> Selection:
    """Choose among the candidates of one image, whatever order they come in.

    - Texts that differ in case alone are one text: its best candidate stands for it.
    - Best first: by ``rerank_score``, candidates that have one before those that have none, then by
      ``score``; equal scores by origin (synthetic, human, web), then by index within the origin.
    - A web source keeps the ``top_k`` of those that reach ``min_score``. The web caption is one candidate
      more (``compete``), none (``never``), or kept beside the ``top_k`` synthetic ones if it reaches
      ``min_score`` too (``always``).
    - A human source keeps every distinct caption: they are the truth here, and a model's score is no reason
      to drop one. ``top_k`` and ``min_score`` do not apply.
    - A candidate without a score (its text is empty, or the image does not decode) is never kept, nor one whose
      score is NaN or infinite.
    """
    if kind == "web" and config.web_caption == "never":
        candidates = [one for one in candidates if one.origin != "web"]
    texts = [one for one in candidates if one.text]
    scored = [one for one in texts if _has_score(one)]
    if not scored:
        return Selection(kept=(), reason="not_scored" if texts else "no_candidates")
    if kind == "human":
        return Selection(kept=_distinct(scored))
    passing = [one for one in scored if config.min_score is None or one.score >= config.min_score]
    if not passing:
        return Selection(kept=(), reason="below_min_score")
    if config.web_caption == "always":
        web = [one for one in passing if one.origin == "web"]
        others = _distinct([one for one in passing if one.origin != "web"])
        return Selection(kept=_distinct([*others[: config.top_k], *web]))
    return Selection(kept=_distinct(passing)[: config.top_k])


def _has_score(one: Candidate) -> bool:
    return one.score is not None and isfinite(one.score) and isfinite(one.rerank_score or 0.0)


def _distinct(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Return the best candidate of each text, best first."""
    distinct: dict[str, Candidate] = {}
    for one in sorted(candidates, key=_best_first):
        distinct.setdefault(same_text_key(one.text), one)
    return tuple(distinct.values())


def _best_first(one: Candidate) -> tuple[bool, float, float, int, int, str]:
    reranked = one.rerank_score is not None
    return (
        not reranked,
        -one.rerank_score if reranked else 0.0,
        -one.score,
        _ORIGIN_ORDER[one.origin],
        one.candidate,
        one.text,
    )


class SelectWorker:
    """Write the curated shard of one raw shard per call."""

    def __init__(self, config: CapfiltConfig, records: Records) -> None:
        self.config = config
        self.records = records

    def __call__(self, task: ShardTask) -> ShardRecord:
        """Make and commit the curated shard; return the record that stands."""
        with ShardCommit(self.records, task, plain_names=True) as commit, ExitStack() as stack:
            stats = commit.stats
            with stats.timed("read"):
                shard = stack.enter_context(open_crawled(self.records, task.inputs["crawl"]))
                file = task.inputs["rank"].outputs["parquet"]
                scores = committed_table(self.records, file, _CANDIDATE_COLUMNS)
                _require_finite_scores(scores, file.path)
            with stats.timed("select"):
                candidates = _candidates_by_key(scores.sort_by("key").to_pylist())
                selections = {
                    key: select(candidates.get(key, ()), self.config.select, task.kind) for key in shard.keys
                }
            with stats.timed("write"):
                tar = commit.folder / "curated.tar"
                kept = write_tar(tar, _curated_samples(shard, selections))
                parquet = commit.folder / "curated.parquet"
                rows = [_curated_row(sample, selections) for sample in shard.samples.to_pylist()]
                written = write_parquet(parquet, rows_to_table(rows, CURATED), CURATED)
            _count(selections, stats)
            assert stats.rows_out == kept and stats.rows_in == written, "a sample was lost on the way"
            return commit.publish({"tar": (tar, kept), "parquet": (parquet, written)})


def _require_finite_scores(scores: pa.Table, path: str) -> None:
    """Raise CorruptShardError for scores of a ranker whose weights were damaged, as older versions stored them."""
    for name in ("score", "rerank_score"):
        known = scores[name].drop_null()
        wrong = len(known) - (pc.sum(pc.is_finite(known)).as_py() or 0)
        if wrong:
            raise CorruptShardError(
                f"{path}: {wrong:,} of {len(known):,} values of {name} are not finite (NaN or infinite): the ranker's "
                "weights were damaged. Set rank.model to sound ones and run `capfilt rank --recompute`"
            )


def _candidates_by_key(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Candidate]]:
    """Group rows that are sorted by key."""
    return {
        key: [Candidate(**{name: row[name] for name in _CANDIDATE_COLUMNS[1:]}) for row in group]
        for key, group in groupby(rows, key=itemgetter("key"))
    }


def _curated_samples(
    shard: CrawledShard, selections: Mapping[str, Selection]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the members of each kept sample, in order of key."""
    for key, selection in selections.items():
        if not selection.kept:
            continue
        captions = [one.text for one in selection.kept]
        extension = shard.extension(key)
        yield (
            key,
            {
                "jpg" if extension == "jpeg" else extension: shard.image_bytes(key),
                "json": json.dumps(captions, ensure_ascii=False).encode(),
                "txt": captions[0].encode(),
            },
        )


def _curated_row(sample: dict[str, Any], selections: Mapping[str, Selection]) -> dict[str, Any]:
    """Return the row of one image, kept or dropped."""
    selection = selections[sample["key"]]
    kept = selection.kept
    return sample | {
        "status": "kept" if kept else "dropped",
        "reason": selection.reason,
        "caption": kept[0].text if kept else None,
        "captions": [one.text for one in kept],
        "scores": [one.score for one in kept],
        "origins": [one.origin for one in kept],
        "candidates": [one.candidate for one in kept],
    }


def _count(selections: Mapping[str, Selection], stats: ShardStats) -> None:
    kept = [one for selection in selections.values() for one in selection.kept]
    stats.rows_in = stats.images = len(selections)
    for selection in selections.values():
        if selection.kept:
            stats.rows_out += 1
            stats.count("kept")
        else:
            stats.count("dropped", selection.reason)
    dropped = stats.counts.get("dropped", 0)
    assert stats.rows_in == stats.rows_out + dropped, "kept and dropped images do not add up"
    for one in kept:
        name = f"captions/{one.origin}"
        stats.counts[name] = stats.counts.get(name, 0) + 1
    stats.histograms = {"kept_score": histogram([one.score for one in kept], SCORE_EDGES)}
