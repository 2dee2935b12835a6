"""What a selection would keep, from the scores that are stored, by the rules of the select stage. Writes nothing."""

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import pyarrow.compute as pc

from pipeline.corpus.corpus_state import CorpusState
from pipeline.corpus.records import Records
from pipeline.marks.rules import RuleBook, ShardMarks
from pipeline.runs.plan import Kind, upstream_of
from pipeline.shards.shard_reader import committed_table
from pipeline.stages.selection import Selection, read_scores, select_shard
from schemas.config import CapfiltConfig, SelectConfig
from schemas.errors import CapfiltError
from schemas.records import ShardRecord

# A shard of 10,000 images takes about a second.
PREVIEW_SHARDS = 20


@dataclass(slots=True, kw_only=True)
class SourcePreview:
    """What a selection would keep of a source's ranked shards, or of a sample of them.

    ``images`` are those that were crawled; ``kept`` of them keep ``captions``, by origin. ``kept_now`` and
    ``captions_now`` are those of the same shards as they are selected now.
    """

    source: str
    shards: int = 0
    of_shards: int = 0
    images: int = 0
    kept: int = 0
    captions: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    kept_now: int = 0
    captions_now: Counter[str] = field(default_factory=Counter)

    @property
    def web_share(self) -> float | None:
        """The share of web captions among those kept; None where none is."""
        total = self.captions.total()
        return self.captions["web"] / total if total else None

    def add(self, selection: Selection) -> None:
        """Count one image."""
        self.images += 1
        self.kept += bool(selection.kept)
        self.captions.update(candidate.origin for candidate in selection.kept)
        if selection.reason is not None:
            self.dropped[selection.reason] += 1

    def add_now(self, record: ShardRecord) -> None:
        """Count a shard as it is selected now."""
        self.kept_now += record.counts.get("kept", 0)
        for name, captions in record.counts.items():
            kind, _, origin = name.partition("/")
            if kind == "captions":
                self.captions_now[origin] += captions


def preview_selection(
    config: CapfiltConfig,
    records: Records,
    state: CorpusState,
    marks: ShardMarks,
    max_shards: int = PREVIEW_SHARDS,
    max_images: int | None = None,
) -> list[SourcePreview]:
    """Return what ``[select]`` would keep, by source.

    Args:
        max_shards: of more ranked shards, so many are read: the same ones each time, of all sources alike.
        max_images: no further shard is read once those read hold so many.

    Raises CapfiltError where no shard is ranked.
    """
    kinds = {source.name: source.kind for source in config.source}
    inputs = {
        place: shard_inputs
        for place in sorted(state.urls)
        if (shard_inputs := _inputs(config, kinds.get(place[0]), place, state))
    }
    if not inputs:
        raise CapfiltError("--preview: no shard has scores yet; `capfilt run` makes them")
    previews = {source: SourcePreview(source=source) for source, _ in inputs}
    for source, _ in inputs:
        previews[source].of_shards += 1
    sample = random.Random(0).sample(list(inputs), min(max_shards, len(inputs)))
    images_before = accumulate((inputs[place]["crawl"].images for place in sample), initial=0)
    for place, before in zip(sample, images_before, strict=False):
        if max_images is not None and before >= max_images:
            break
        preview, rules = previews[place[0]], RuleBook(marks.get(place, ()))
        for selection in _selections(config.select, kinds[place[0]], records, inputs[place], rules):
            preview.add(selection)
        preview.shards += 1
        if (selected := state.committed.get(("select", *place))) is not None:
            preview.add_now(selected)
    return list(previews.values())


def _inputs(
    config: CapfiltConfig, kind: Kind | None, place: tuple[str, str], state: CorpusState
) -> dict[str, ShardRecord] | None:
    """Return what a selection of the shard would read; None where it is not there, or the config has no such source."""
    if kind is None:
        return None
    stages = upstream_of(config, "select", kind)
    records_by_stage: dict[str, ShardRecord] = {
        stage: record for stage in stages if (record := state.committed.get((stage, *place))) is not None
    }
    return records_by_stage if len(records_by_stage) == len(stages) else None


def _selections(
    config: SelectConfig, kind: Kind, records: Records, inputs: Mapping[str, ShardRecord], rules: RuleBook
) -> Iterable[Selection]:
    file = inputs["crawl"].outputs["parquet"]
    samples = committed_table(records, file, ("key", "uid", "url", "sha256", "status"))
    samples = samples.filter(pc.equal(samples["status"], "ok")).sort_by("key")
    return select_shard(samples.to_pylist(), read_scores(records, inputs), config, kind, rules).values()
