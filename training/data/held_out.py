"""Images set aside for the probe: which ones, and their samples."""

import hashlib
from collections.abc import Iterable

import pyarrow.compute as pc

from pipeline.corpus.records import Records
from pipeline.corpus.shard_reader import committed_table
from pipeline.corpus.storage import Storage
from training.data.shard_index import ShardRef, open_shard

# Taken from shards that hold so many times as many images: a probe need not read a whole corpus.
_OF = 4


def choose_held_out(shards: Iterable[ShardRef], images: int) -> dict[ShardRef, tuple[str, ...]]:
    """Choose the images whose uids have the smallest hashes, of a few shards; return the uids by shard.

    The few are, of all shards in the order of their names' hashes, the first that hold four times as many
    images: so the choice depends neither on a run's seed nor on its ranks.
    """
    candidates: list[tuple[str, str, ShardRef]] = []
    for shard in sorted(shards, key=lambda shard: _hash(f"{shard.source}/{shard.shard}")):
        candidates += [(_hash(uid), uid, shard) for uid in _uids(shard)]
        if len(candidates) >= _OF * images:
            break
    chosen: dict[ShardRef, list[str]] = {}
    for _, uid, shard in sorted(candidates, key=lambda candidate: candidate[:2])[:images]:
        chosen.setdefault(shard, []).append(uid)
    return {shard: tuple(sorted(uids)) for shard, uids in chosen.items()}


def _uids(shard: ShardRef) -> list[str]:
    """Return the uids of a shard's samples; a corpus's tar need not be fetched for that."""
    records = Records(Storage(shard.corpus))
    if shard.parquet is None:
        with open_shard(records, shard) as opened:
            return opened.uids
    table = committed_table(records, shard.parquet, ("uid", "status"))
    return table.filter(pc.equal(table["status"], "kept"))["uid"].to_pylist()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
