"""The list of shards a run was trained on, saved beside its checkpoints so that it is kept when the corpora grow."""

import json
from dataclasses import asdict, replace

from pydantic import TypeAdapter, ValidationError

from schemas.errors import CapfiltError
from schemas.json_record import first_error
from schemas.names import is_confined, printable
from schemas.pretrain import DataConfig
from training.data.snapshot import Snapshot, Source

_SNAPSHOT = TypeAdapter(Snapshot)


def file_name(digest: str) -> str:
    """Return the name of a snapshot's file in the run's folder."""
    return f"snapshot-{digest[:16]}.json"


def encode(snapshot: Snapshot) -> bytes:
    """Return a snapshot as JSON: {"digest", "sources": [{"name", "shards": [{"shard", "tar", ...}]}]}."""
    return json.dumps(asdict(snapshot), sort_keys=True, separators=(",", ":")).encode()


def decode(data: bytes, config: DataConfig, where: str) -> Snapshot:
    """Return the snapshot of a file; its corpora are where the config says, as they may have been moved.

    Raises CapfiltError, naming the file (``where``), if it is not a snapshot of these corpora.
    """
    try:
        snapshot = _SNAPSHOT.validate_json(data, strict=True)
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
