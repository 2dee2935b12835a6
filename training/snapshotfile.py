"""A snapshot as a file beside a run's checkpoints: which shards the run ate, kept when the corpora grow."""

import json
from dataclasses import asdict
from typing import Any

from schemas.pretrain import DataConfig
from schemas.records import OutputFile
from training.index import ShardRef
from training.snapshot import Snapshot, Source


def file_name(digest: str) -> str:
    """Return the name of a snapshot's file in the run's folder."""
    return f"snapshot-{digest[:16]}.json"


def encode(snapshot: Snapshot) -> bytes:
    """Return a snapshot as JSON: {"digest", "sources": [{"name", "shards": [{"shard", "tar", ...}]}]}."""
    return json.dumps(asdict(snapshot), sort_keys=True, separators=(",", ":")).encode()


def decode(data: bytes, config: DataConfig) -> Snapshot:
    """Return the snapshot of a file; its corpora lie where the config says, should they have been moved."""
    values = json.loads(data)
    sources = tuple(_source(source, config.corpus[source["slice"]].path) for source in values["sources"])
    return Snapshot(sources, values["digest"])


def _source(values: dict[str, Any], corpus: str) -> Source:
    return Source(**{**values, "shards": tuple(_shard(shard, corpus) for shard in values["shards"])})


def _shard(values: dict[str, Any], corpus: str) -> ShardRef:
    parquet = OutputFile.from_dict(values["parquet"]) if values["parquet"] else None
    files = {"tar": OutputFile.from_dict(values["tar"]), "parquet": parquet}
    return ShardRef(**{**values, **files, "corpus": corpus, "held_out": tuple(values["held_out"])})
