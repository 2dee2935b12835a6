"""Select the captions that training sees, and write them with their images as curated shards. Needs no GPU.

A curated shard is what others already read: ``KEY.jpg``, ``KEY.json`` (a JSON list of captions, best first:
LAVIS's LaionDataset draws from its first two) and ``KEY.txt`` (the best one: open_clip, img2dataset). Its
bytes are a function of its inputs and ``[select]`` alone. The image's bytes are those of the raw shard, never
encoded again; a PNG or WebP of an imported img2dataset folder keeps its extension (open_clip reads those too, LAVIS
reads ``jpg`` only).
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.candidates import CANDIDATE_COLUMNS, Candidate, choose, choose_by
from pipeline.corpus.commit import SCORE_EDGES, ShardCommit, ShardStats, histogram
from pipeline.corpus.records import Records
from pipeline.marks.rules import NO_MARKS, RuleBook, SampleMarks
from pipeline.shards.shard_files import write_parquet, write_tar
from pipeline.shards.shard_reader import CrawledShard, committed_table, open_crawled
from schemas.config import CapfiltConfig, SelectConfig
from schemas.errors import CorruptShardError
from schemas.records import ShardRecord, ShardTask
from schemas.stages import Stage
from schemas.tables import CURATED_FILE, STAGE_SCHEMAS

_NUMBERS = ("score", "rerank_score", "match_probability")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What is kept of an image's candidates, best first; ``reason`` says why nothing is."""

    kept: tuple[Candidate, ...]
    reason: str | None = None


def select(
    candidates: Sequence[Candidate],
    config: SelectConfig,
    kind: Literal["web", "human"] = "web",
    marks: SampleMarks = NO_MARKS,
) -> Selection:
    """Choose among the candidates of one image, whatever order they come in; see ``choose`` for the rules.

    A human source keeps every distinct caption: they are the reference, so scores drop none of them and
    ``[select]`` does not apply. Marks apply to every source.
    """
    if marks.is_dropped:
        return Selection(kept=(), reason="marked")
    if kind == "human":
        choices = choose(candidates, marked_texts=marks.texts)
    else:
        choices = choose_by(candidates, config, marks.texts)
    kept = tuple(choice.candidate for choice in choices if choice.reason is None)
    if kept:
        return Selection(kept=kept)
    reasons = {choice.reason for choice in choices}
    image_reasons = ("marked", "filtered_out", "below_min_score", "not_scored")
    return Selection(kept=(), reason=next((r for r in image_reasons if r in reasons), "no_candidates"))


def read_scores(records: Records, inputs: Mapping[str, ShardRecord]) -> pa.Table:
    """Return what a selection reads of a shard's scores: the filter's, where it is an input, else CLIP's alone.

    Raises CorruptShardError where some are not finite.
    """
    judged_by: Stage = "filter" if "filter" in inputs else "rank"
    file = inputs[judged_by].outputs["parquet"]
    columns = [name for name in ("key", *CANDIDATE_COLUMNS) if name in STAGE_SCHEMAS[judged_by].names]
    scores = committed_table(records, file, columns)
    _require_finite_scores(scores, file.path)
    return scores


def select_shard(
    samples: Sequence[Mapping[str, Any]],
    scores: pa.Table,
    config: SelectConfig,
    kind: Literal["web", "human"],
    rules: RuleBook,
) -> dict[str, Selection]:
    """Return the selection of each sample by key, in their order; ``scores`` as ``read_scores`` gives them."""
    candidates = _candidates_by_key(scores.sort_by("key").to_pylist())
    return {
        sample["key"]: select(candidates.get(sample["key"], ()), config, kind, rules.on(sample))
        for sample in samples
    }


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
                scores = read_scores(self.records, task.inputs)
            with stats.timed("select"):
                samples = shard.samples.to_pylist()
                rules = RuleBook(task.marks)
                selections = select_shard(samples, scores, self.config.select, task.kind, rules)
            with stats.timed("write"):
                tar = commit.folder / "curated.tar"
                offsets = write_tar(tar, _curated_samples(shard, selections))
                parquet = commit.folder / "curated.parquet"
                rows = [
                    _curated_row(sample, selections) | _place(sample["key"], offsets, shard)
                    for sample in samples
                ]
                written = write_parquet(parquet, rows, CURATED_FILE)
            _count(selections, stats)
            assert stats.rows_out == len(offsets) and stats.rows_in == written, "a sample was lost on the way"
            return commit.publish({"tar": (tar, len(offsets)), "parquet": (parquet, written)})


def _require_finite_scores(scores: pa.Table, path: str) -> None:
    """Raise CorruptShardError for scores of a ranker whose weights were damaged, as older versions stored them."""
    for name in (name for name in _NUMBERS if name in scores.column_names):
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
        key: [Candidate.of_row(row) for row in group] for key, group in groupby(rows, key=itemgetter("key"))
    }


def _curated_samples(
    shard: CrawledShard, selections: Mapping[str, Selection]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the members of each kept sample, in order of key."""
    for key, selection in selections.items():
        if not selection.kept:
            continue
        captions = [candidate.text for candidate in selection.kept]
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
        "captions": [candidate.text for candidate in kept],
        "scores": [candidate.score for candidate in kept],
        "origins": [candidate.origin for candidate in kept],
        "candidates": [candidate.candidate for candidate in kept],
    }


def _place(key: str, offsets: Mapping[str, int], shard: CrawledShard) -> dict[str, int]:
    """Return where the image of a kept sample lies in the curated tar."""
    return {"offset": offsets[key], "image_bytes": shard.size(key)} if key in offsets else {}


def _count(selections: Mapping[str, Selection], stats: ShardStats) -> None:
    kept = [candidate for selection in selections.values() for candidate in selection.kept]
    stats.rows_in = stats.images = len(selections)
    for selection in selections.values():
        if selection.kept:
            stats.rows_out += 1
            stats.count("kept")
        else:
            stats.count("dropped", selection.reason)
    dropped = stats.counts.get("dropped", 0)
    assert stats.rows_in == stats.rows_out + dropped, "kept and dropped images do not add up"
    stats.counts |= Counter(f"captions/{candidate.origin}" for candidate in kept)
    scores = [candidate.score for candidate in kept if candidate.score is not None]
    stats.histograms = {"kept_score": histogram(scores, SCORE_EDGES)}
