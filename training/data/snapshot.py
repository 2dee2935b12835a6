"""What a run trains on: the curated or crawled shards that the records commit at one moment, and how sources are mixed.

A snapshot is small (a few hundred bytes a shard) and pickles: taken once, it is handed to every rank. It also says
which images are held out from training.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import TypeAdapter, ValidationError

from pipeline.corpus.corpus_state import committed_shards
from pipeline.corpus.records import Records
from pipeline.digests import digest_json
from pipeline.manifest.compaction import CompactedRecords
from pipeline.shards.shard_reader import committed_table
from pipeline.storage.storage import Storage
from schemas.corpus_format import require_known_format
from schemas.errors import CapfiltError
from schemas.json_record import first_error
from schemas.names import is_confined, is_outside_tar, printable
from schemas.pretrain import CorpusSlice, DataConfig
from schemas.records import SnapshotShard
from schemas.stages import Stage
from training.data.shard_index import open_shard
from training.data.webdataset_folder import webdataset_shards

Kind = Literal["web", "human"]

# The stage whose shards hold the captions of ``data.corpus.captions``, and what it makes of them.
_STAGES: dict[str, Stage] = {"curated": "select", "web": "crawl"}
_MADE_BY = {"select": "curated", "crawl": "crawled"}
# Held-out images are chosen from shards that hold so many times as many: no need to read a whole corpus.
_HELD_OUT_POOL = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The shards of one source; ``slice`` is the number of its [[data.corpus]]."""

    slice: int
    name: str
    kind: Kind
    shards: tuple[SnapshotShard, ...]
    given_weight: float | None = None

    @property
    def num_images(self) -> int:
        """The images that are trained on."""
        return sum(shard.samples for shard in self.shards)

    @property
    def weight(self) -> float:
        """Its share of the mix: as given, else its number of images."""
        return self.num_images if self.given_weight is None else self.given_weight

    def first_captions(self, config: DataConfig) -> int | None:
        """Return how many of an image's captions are drawn from; None: all, where people wrote them."""
        return None if self.kind == "human" else config.captions_per_image


@dataclass(frozen=True)
class Snapshot:
    """The shards of a run. ``digest`` is that of their bytes, samples and sources' settings, not of their location."""

    sources: tuple[Source, ...]
    digest: str

    @cached_property
    def shards(self) -> tuple[SnapshotShard, ...]:
        """All shards, source by source: numbered by ``SampleIndex.shard``."""
        return tuple(shard for source in self.sources for shard in source.shards)

    def to_json(self) -> bytes:
        """Return what a run saves beside its checkpoints, so that the list is kept when the corpora grow."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    @cached_property
    def num_images(self) -> int:
        """The images that are trained on."""
        return sum(source.num_images for source in self.sources)

    @cached_property
    def num_held_out(self) -> int:
        """The images that are held out."""
        return sum(len(shard.held_out) for shard in self.shards)


def snapshot_file(digest: str) -> str:
    """Return the name of a snapshot's file in the run's folder."""
    return f"snapshot-{digest[:16]}.json"


def parse_snapshot(data: bytes, config: DataConfig, where: str) -> Snapshot:
    """Return the snapshot of a file; its corpora are where the config says, as they may have been moved.

    Raises CapfiltError, naming the file (``where``), if it is not a snapshot of these corpora.
    """
    try:
        snapshot = TypeAdapter(Snapshot).validate_json(data, strict=True)
        return replace(snapshot, sources=tuple(_placed(source, config) for source in snapshot.sources))
    except ValueError as error:
        why = first_error(error) if isinstance(error, ValidationError) else printable(str(error))
        raise CapfiltError(f"{where} is not a snapshot of this run ({why}); restore it") from error


def _placed(source: Source, config: DataConfig) -> Source:
    """Return a source with its corpus where the config says. Raises ValueError for a file outside that corpus."""
    if not 0 <= source.slice < len(config.corpus):
        raise ValueError(
            f"{source.name!r} is of [[data.corpus]] number {source.slice + 1}, which does not exist"
        )
    for shard in source.shards:
        for file in filter(None, (shard.tar, shard.parquet)):
            if not is_confined(file.path):
                raise ValueError(f"{file.path[:200]!r} leads out of its corpus")
    corpus = config.corpus[source.slice].path
    return replace(source, shards=tuple(replace(shard, corpus=corpus) for shard in source.shards))


def take_snapshot(config: DataConfig) -> Snapshot:
    """Read what there is to train on from the corpora's records, or from folders of WebDataset shards.

    Raises:
        CapfiltError: a corpus has no curated shards, or their digest is not the pinned one; a source that the
            config names does not exist; more than half of the images are held out.
    """
    slices = [_slice(number, corpus) for number, corpus in enumerate(config.corpus)]
    sources = tuple(source for sources, _ in slices for source in sources)
    digests = [digest for _, digest in slices]
    snapshot = Snapshot(sources, digests[0] if len(digests) == 1 else digest_json(digests))
    return _without_held_out(snapshot, config.held_out) if config.held_out else snapshot


def _slice(number: int, config: CorpusSlice) -> tuple[list[Source], str]:
    """Return the sources of one ``[[data.corpus]]`` and the digest of its shards."""
    sources = _chosen(config, _committed(config) or _webdataset(config.path))
    digest = digest_json(
        {
            name: {
                "kind": source.kind,
                "weight": source.given_weight,
                "shards": [[shard.shard, shard.tar.sha256, shard.tar.rows] for shard in source.shards],
            }
            for name, source in sources.items()
        }
    )
    if config.snapshot and config.snapshot != digest:
        raise CapfiltError(
            f"data.corpus: {config.path} is not at the pinned snapshot: its shards have the digest {digest}, "
            f"[[data.corpus]] says {config.snapshot}; shards were added or rebuilt since. Take "
            f'snapshot = "{digest}" to train on what is there now'
        )
    return [
        replace(source, slice=number, given_weight=config.weights.get(name, source.given_weight))
        for name, source in sources.items()
    ], digest


def _chosen(config: CorpusSlice, sources: Mapping[str, Source]) -> dict[str, Source]:
    """Return the sources that the config names, or all, by name."""
    for key, names in (("sources", config.sources), ("weights", config.weights)):
        for name in names:
            if name not in sources:
                made = _MADE_BY[_STAGES[config.captions]]
                raise CapfiltError(
                    f"data.corpus.{key}: {config.path} has no source {name!r} with {made} shards; it has "
                    f"{', '.join(sorted(sources))}"
                )
    for name, weight in config.weights.items():
        if not 0 < weight < float("inf"):
            raise CapfiltError(
                f"data.corpus.weights: {name} = {weight:g}: a weight must be over 0; leave a source out "
                "with sources = [...]"
            )
    return {name: sources[name] for name in sorted(sources) if not config.sources or name in config.sources}


def _committed(config: CorpusSlice) -> dict[str, Source]:
    """Return a corpus's sources with curated, or crawled, images by name; none where the folder is not a corpus."""
    path, stage = config.path, _STAGES[config.captions]
    storage = Storage(path)
    records = Records(storage)
    require_known_format(path, records.list_formats())
    shards: dict[str, list[SnapshotShard]] = {}
    compacted = CompactedRecords(storage).shard_records
    committed = committed_shards(records, records.list_shards((stage,)), compacted)
    for (_, source, name), record in sorted(committed.items()):
        tar, parquet = record.outputs["tar"], record.outputs["parquet"]
        if is_outside_tar(tar.path):
            raise CapfiltError(
                f'data.corpus: captions = "web", and {source}/{name} of {path} is {tar.path}, which was imported: name '
                "the folder of such tars as data.corpus.path, and leave the source out with data.corpus.sources"
            )
        if tar.rows:
            ref = SnapshotShard(corpus=path, source=source, shard=name, tar=tar, parquet=parquet)
            shards.setdefault(source, []).append(ref)
    if not shards and committed:
        raise CapfiltError(
            f"data.corpus: no image is kept in the {len(committed):,} {_MADE_BY[stage]} shards of {path}; "
            "`capfilt stats` says why"
        )
    if not shards and storage.is_corpus():
        raise CapfiltError(
            f"data.corpus: {path} has no {_MADE_BY[stage]} shards; `capfilt plan` shows what is missing, `capfilt run` "
            "makes it"
        )
    # Kind and weight of each source, as the config of the latest run that names it has them.
    runs = records.runs() if shards else ()
    settings = {
        source["name"]: (source["kind"], source["weight"])
        for run in runs
        for source in run.config.get("source", ())
    }
    return {name: _source(name, refs, *settings.get(name, ())) for name, refs in shards.items()}


def _source(
    name: str, shards: Iterable[SnapshotShard], kind: Kind = "web", weight: float | None = None
) -> Source:
    return Source(slice=0, name=name, kind=kind, shards=tuple(shards), given_weight=weight)


def _webdataset(path: str) -> dict[str, Source]:
    """Return the shards of a folder that is not a corpus as one source with the folder's name."""
    storage = Storage(path)
    name = storage.name
    refs = [
        SnapshotShard(corpus=path, source=name, shard=shard, tar=tar)
        for shard, tar in webdataset_shards(storage).items()
    ]
    if not refs:
        raise CapfiltError(
            f"data.corpus: nothing to train on at {path}: neither a corpus (records/) nor tars whose samples have an "
            "image and a json or txt"
        )
    return {name: _source(name, refs)}


def _without_held_out(snapshot: Snapshot, held_out: int) -> Snapshot:
    if 2 * held_out > snapshot.num_images:
        raise CapfiltError(
            f"data.held_out: {held_out:,} of {snapshot.num_images:,} images are more than half; hold out fewer"
        )
    chosen = _choose_held_out(snapshot.shards, held_out)

    def without(source: Source) -> Source:
        shards = (replace(shard, held_out=chosen.get(shard, ())) for shard in source.shards)
        return replace(source, shards=tuple(shards))

    return replace(snapshot, sources=tuple(map(without, snapshot.sources)))


def _choose_held_out(shards: Iterable[SnapshotShard], images: int) -> dict[SnapshotShard, tuple[str, ...]]:
    """Choose the images whose uids have the smallest hashes, of a few shards; return the uids by shard.

    The shards are taken in the order of their names' hashes until they hold four times as many images as are wanted:
    so the choice depends neither on a run's seed nor on its ranks.
    """
    candidates: list[tuple[str, str, SnapshotShard]] = []
    for shard in sorted(shards, key=lambda shard: _hash(f"{shard.source}/{shard.shard}")):
        candidates += [(_hash(uid), uid, shard) for uid in _uids(shard)]
        if len(candidates) >= _HELD_OUT_POOL * images:
            break
    chosen: dict[SnapshotShard, list[str]] = {}
    for _, uid, shard in sorted(candidates, key=lambda candidate: candidate[:2])[:images]:
        chosen.setdefault(shard, []).append(uid)
    return {shard: tuple(sorted(uids)) for shard, uids in chosen.items()}


def _uids(shard: SnapshotShard) -> list[str]:
    """Return the uids of a shard's samples; a corpus's tar need not be fetched for that."""
    records = Records(Storage(shard.corpus))
    if shard.parquet is None:
        with open_shard(records, shard) as opened:
            return opened.uids
    table = committed_table(records, shard.parquet, ("uid", "status"))
    # Of a curated shard and of a crawled one.
    is_stored = pc.is_in(table["status"], pa.array(["kept", "ok"]))
    return table.filter(is_stored)["uid"].to_pylist()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
