"""Folders of tars that were copied out of a corpus: which of its shards, and which images of these, a training reads.

Only what is certain counts. A tar with the bytes of a committed one is that one; of any other tar, a sample is the
image whose uid, source and shard its json names, as crawled tars have them.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pyarrow.compute as pc

from pipeline.corpus.records import Records, ShardId
from pipeline.shards.shard_reader import committed_table
from pipeline.shards.tar_samples import JSON
from pipeline.shards.uids import sample_uid
from pipeline.storage.storage import Storage
from schemas.records import ShardRecord, SnapshotRecord, SnapshotShard, SnapshotSource
from training.data.shard_index import index_tar

# What the crawl writes of a sample has some 400 bytes.
_MAX_JSON_BYTES = 2**20

# The key of a sample in its tar, the shard of the corpus that it is of, and its uid there.
_Sample = tuple[str, ShardId, str]


def with_originals(records: Records, snapshot: SnapshotRecord) -> SnapshotRecord:
    """Return a snapshot that names the shards of a corpus in the place of their copies in other folders.

    A shard that stands for copies has the corpus's own tar, and in ``held_out`` every image of it that is in none of
    the copies. Where no sample of another folder is known to be of the corpus, the snapshot is returned as it is.
    """
    folders = [source for source in snapshot.sources if not Storage(source.shards[0].corpus).is_corpus()]
    committed = records.shards(("crawl", "select")) if folders else {}
    originals = {id(folder): _originals(records, committed, folder) for folder in folders}
    if not any(originals.values()):
        return snapshot
    sources = [named for source in snapshot.sources for named in originals.get(id(source)) or (source,)]
    return replace(snapshot, sources=tuple(sources))


def _originals(
    records: Records, committed: Mapping[ShardId, ShardRecord], folder: SnapshotSource
) -> list[SnapshotSource]:
    """Return the sources of the corpus that a folder's samples are of, with their shards."""
    by_tar = {record.outputs["tar"].sha256: record for record in committed.values()}
    trained: dict[ShardId, set[str]] = {}
    for copy in folder.shards:
        same = by_tar.get(copy.tar.sha256)
        held_out = set(copy.held_out)
        for key, shard, uid in _samples_of(records, same) if same else _named_samples(copy):
            # A folder's own held-out images are named by their keys, as ``open_shard`` does.
            is_held_out = bool(held_out) and sample_uid(copy.source, f"{copy.shard}/{key}") in held_out
            if shard in committed and not is_held_out:
                trained.setdefault(shard, set()).add(uid)
    shards: dict[str, list[SnapshotShard]] = {}
    for shard, uids in sorted(trained.items()):
        record = committed[shard]
        images = {uid for _, _, uid in _samples_of(records, record)}
        if images & uids:
            original = SnapshotShard(
                corpus=records.storage.root,
                source=record.source,
                shard=record.shard,
                tar=record.outputs["tar"],
                parquet=record.outputs["parquet"],
                held_out=tuple(sorted(images - uids)),
            )
            shards.setdefault(record.source, []).append(original)
    return [replace(folder, name=source, shards=tuple(found)) for source, found in shards.items()]


def _samples_of(records: Records, record: ShardRecord) -> Iterator[_Sample]:
    """Yield the samples in a committed tar."""
    table = committed_table(records, record.outputs["parquet"], ("key", "uid", "status"))
    stored = table.filter(pc.equal(table["status"], "kept" if record.stage == "select" else "ok"))
    for key, uid in zip(stored["key"].to_pylist(), stored["uid"].to_pylist(), strict=True):
        yield key, record.shard_id, uid


def _named_samples(copy: SnapshotShard) -> Iterator[_Sample]:
    """Yield those samples of a tar whose json names a uid, source and shard."""
    with Storage(copy.corpus).local_copy(copy.tar.path) as path, path.open("rb") as tar:
        index = index_tar(path)
        for key, (offset, size) in zip(index.keys, index.places_NM2[:, JSON].tolist(), strict=True):
            if 0 < size <= _MAX_JSON_BYTES:
                tar.seek(offset)
                named = _object(tar.read(size))
                yield key, ("crawl", str(named.get("source")), str(named.get("shard"))), str(named.get("uid"))


def _object(text: bytes) -> dict[str, Any]:
    """Return a JSON object; an empty one for any other text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
