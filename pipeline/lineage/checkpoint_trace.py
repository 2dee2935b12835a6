"""What a checkpoint was trained on: its shards, the runs and models that made them, the lists they come from."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.corpus.checkpoint_files import find_checkpoint
from pipeline.manifest.manifest import Manifest
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.json_record import Json, fields_of
from schemas.names import is_one_part
from schemas.records import ModelRecord, SnapshotRecord, SnapshotShard, SnapshotSource
from schemas.stages import STAGES

R = TypeVar("R", bound=Json)
Row = dict[str, Any]

_ORDER = ("urls", *STAGES)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Progress(Json):
    """What is read of a checkpoint's ``training.json``."""

    config: dict[str, Any]
    models: tuple[ModelRecord, ...]


def trace_checkpoint(path: str) -> Row:
    """Return the trace of a checkpoint, named by its record, its folder or its run's: then the newest good one.

    Keys: ``checkpoint``; ``config`` of its training; ``loaded``: the models it loaded or began from; ``sources``,
    each with corpus, weight, images and URLs; ``shards``, each with the tar that was read; ``stages``, which made
    them; ``runs`` and ``models`` of these. Others' shards, which no record commits, have neither stages nor URLs.

    Raises CapfiltError where there is no checkpoint, or what it was trained on cannot be read.
    """
    if Storage(path).is_corpus():
        raise CapfiltError(
            f"{path} is a corpus: name one of its uids or URLs behind it, or, alone, a run's folder or checkpoint, as "
            f"in {path}/checkpoints/stage1/NAME"
        )
    run, saved = find_checkpoint(path)
    storage, record = run.storage, json.loads(saved.to_json())
    progress = _read(storage, f"{saved.path}/training.json", _Progress)
    if not is_one_part(saved.snapshot):
        raise CapfiltError(f"{path}: its snapshot {saved.snapshot[:80]!r} is not a digest")
    sources = _sources(storage, f"snapshot-{saved.snapshot[:16]}.json", saved.run_id)
    stages: list[Row] = []
    runs: dict[str, Row] = {}
    models: dict[str, Row] = {}
    for corpus in dict.fromkeys(map(_corpus, sources)):
        of_corpus = [source for source in sources if _corpus(source) == corpus]
        lineage = _lineage(corpus, {shard.tar.sha256 for source in of_corpus for shard in source.shards})
        stages += [{"corpus": corpus, **row} for row in lineage["stages"]]
        runs |= {row["run_id"]: row for row in lineage["runs"]}
        models |= {row["digest"]: row for row in lineage["models"]}
    urls = Counter[tuple[str, str]]()
    for row in stages:
        if row["stage"] == "urls":
            urls[row["corpus"], row["source"]] += row["rows_in"]
    return {
        "checkpoint": {**record, "path": storage.url(saved.path)},
        "config": progress.config,
        "loaded": [fields_of(model) for model in progress.models],
        "sources": [_source(source, urls) for source in sources],
        "shards": [_shard(source, shard) for source in sources for shard in source.shards],
        "stages": stages,
        "runs": [runs[run_id] for run_id in sorted(runs)],
        "models": [models[digest] for digest in sorted(models, key=lambda digest: models[digest]["kind"])],
    }


def _read(storage: Storage, path: str, kind: type[R]) -> R:
    """Read what a training wrote beside its checkpoints."""
    try:
        return kind.from_json(storage.read(path))
    except (FileNotFoundError, NotADirectoryError):
        raise CapfiltError(
            f"{storage.url(path)} is missing: what the checkpoint was trained on is not known"
        ) from None
    except ValueError as error:
        raise CapfiltError(f"{storage.url(path)} cannot be read: {error}; restore it") from error


def _sources(storage: Storage, snapshot: str, run_id: str) -> tuple[SnapshotSource, ...]:
    """Return the sources of a run's snapshot; of a folder in a corpus, as the corpus's own record names them."""
    sources = _read(storage, snapshot, SnapshotRecord).sources
    for folder in dict.fromkeys((storage.root, *map(_corpus, sources))):
        corpus = Storage(folder).enclosing_corpus()
        record = f"records/snapshots/{run_id}/{snapshot}"
        if corpus is not None and corpus.exists(record):
            return _read(corpus, record, SnapshotRecord).sources
    return sources


def _corpus(source: SnapshotSource) -> str:
    """Return the corpus that all shards of a source are of."""
    return source.shards[0].corpus


def _source(source: SnapshotSource, urls: Mapping[tuple[str, str], int]) -> Row:
    images = sum(shard.samples for shard in source.shards)
    return {
        "corpus": _corpus(source),
        "source": source.name,
        "kind": source.kind,
        "weight": images if source.given_weight is None else source.given_weight,
        "shards": len(source.shards),
        "images": images,
        "held_out": sum(len(shard.held_out) for shard in source.shards),
        "urls": urls.get((_corpus(source), source.name)),
    }


def _shard(source: SnapshotSource, shard: SnapshotShard) -> Row:
    return {
        "corpus": _corpus(source),
        "source": source.name,
        "shard": shard.shard,
        "images": shard.samples,
        "tar": shard.tar.path,
        "sha256": shard.tar.sha256,
    }


def _lineage(corpus: str, wanted: Iterable[str]) -> dict[str, list[Row]]:
    """Return the records that made some files, and those that made their inputs, back to the lists.

    A shard may have been recomputed since: the record with the file's sha256 counts, retired or not.
    """
    storage = Storage(corpus)
    if not storage.is_corpus():
        return {"stages": [], "runs": [], "models": []}
    with Manifest(storage).open() as query:
        rows = query.rows(
            "SELECT stage, source, shard, state, run_id, models, rows_in, rows_out, inputs, sha256, finished_at, host, "
            "device FROM shards WHERE state <> 'quarantined'"
        )
        row_by_digest = {digest: row for row in rows for digest in (row["sha256"] or {}).values()}
        by_key: dict[tuple[str, str, str, str], Row] = {}
        todo = list(wanted)
        while todo:
            row = row_by_digest.get(todo.pop())
            if (
                row is not None
                and (key := (row["source"], row["shard"], row["stage"], row["run_id"])) not in by_key
            ):
                by_key[key] = row
                todo += (row["inputs"] or {}).values()
        stages = sorted(
            by_key.values(), key=lambda row: (row["source"], row["shard"], _ORDER.index(row["stage"]))
        )
        run_ids = sorted({row["run_id"] for row in stages})
        digests = sorted({digest for row in stages for digest in row["models"] or ()})
        runs = query.rows(
            "SELECT run_id, command, config_digest, outcome, started_at, finished_at FROM runs WHERE run_id = ANY($1)",
            (run_ids,),
        )
        models = query.rows("SELECT * FROM models WHERE digest = ANY($1)", (digests,))
    hidden = ("inputs", "sha256")
    stages = [{name: value for name, value in row.items() if name not in hidden} for row in stages]
    return {"stages": stages, "runs": runs, "models": models}
