"""What is done of a bootstrapping, seen from its corpora, checkpoints and exports.

A corpus or training that was begun with another config is refused, and so is a corpus of which nothing is left to
train on: what comes after would learn from something else than the config says.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

from pipeline.corpus.checkpoint_files import SavedCheckpoints
from pipeline.corpus.corpus_state import CorpusState
from pipeline.corpus.records import Records
from pipeline.digests import digest_json
from pipeline.manifest.manifest import Manifest
from pipeline.models.files.model_files import exported_from
from pipeline.models.weights import captioner_weights, filter_weights
from pipeline.runs.plan import changed_keys
from pipeline.runs.survey import Totals
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig
from schemas.errors import CapfiltError
from schemas.pretrain import DataConfig, PretrainConfig
from schemas.records import ShardRecord, SnapshotShard
from schemas.stages import STAGES
from schemas.statuses import TRANSIENT
from training.data.snapshot import parse_snapshot, snapshot_file, take_snapshot
from training.trainer.run import changed_learning_keys


def is_whole(config: CapfiltConfig, stage: Literal["crawl", "select"], key: str) -> bool:
    """Tell whether every url shard of every source has the record of a stage.

    Args:
        key: of the config, that says where the corpus is; for messages.

    Raises:
        CapfiltError: the corpus was begun with another config, or has no image of one kind of its sources.
    """
    storage = Storage(config.corpus.path)
    if not storage.is_corpus():
        return False
    records, state = Records(storage), _state(storage)
    stages = STAGES[: STAGES.index(stage) + 1]
    committed = {shard: record for shard, record in state.committed.items() if shard[0] in stages}
    runs = {run.run_id: run for run in records.runs()}
    names = {source.name for source in config.source}
    if changes := changed_keys(config, runs, committed):
        raise _begun_otherwise(storage.root, changes, key)
    if stage == "select":
        _require_same_models(config, [record for place, record in committed.items() if place[1] in names])
    listed = {place for place in state.urls if place[0] in names}
    done = {(source, shard): record for (name, source, shard), record in committed.items() if name == stage}
    if {source for source, _ in listed} != names or not listed <= done.keys():
        return False
    for kind, of_kind in _by_kind(config, done).items():
        _require_images(of_kind, kind, config)
    return True


def _require_same_models(config: CapfiltConfig, records: Collection[ShardRecord]) -> None:
    """Raise CapfiltError where captions or match probabilities are of another model than the one that is there now."""
    assert config.filter is not None, "checked when the configs were read"
    for stage, model, weights in (
        ("caption", config.caption.model, lambda: captioner_weights(config.caption)),
        ("filter", config.filter.model, lambda: filter_weights(config.filter)),
    ):
        made_of = {digest for record in records if record.stage == stage for digest in record.models}
        # A model that is away is exported again, byte for byte as it was.
        if made_of and Path(model).is_dir() and made_of != {weights().digest}:
            raise _made_of_another(config.corpus.path, f"was made with another model than {model}")


def _state(storage: Storage) -> CorpusState:
    """Return the state of a corpus from the manifest's parts: nothing is asked for each record."""
    return CorpusState(Records(storage), compacted=Manifest(storage).compacted.shard_records)


def _by_kind(
    config: CapfiltConfig, records: Mapping[tuple[str, str], ShardRecord]
) -> dict[str, list[ShardRecord]]:
    """Return the records of each kind of source; their keys begin with the source."""
    kinds = {source.name: source.kind for source in config.source}
    found: dict[str, list[ShardRecord]] = {kind: [] for kind in kinds.values()}
    for (source, _), record in records.items():
        if source in kinds:
            found[kinds[source]].append(record)
    return found


def _require_images(records: list[ShardRecord], kind: str, config: CapfiltConfig) -> None:
    """Raise CapfiltError where no image is left of all sources of a kind."""
    if any(record.rows_out for record in records):
        return
    totals = Totals.of(records)
    reasons: Counter[str] = totals.dropped or totals.lost
    because = f", mostly for the reason {reasons.most_common(1)[0][0]}" if reasons else ""
    path = config.corpus.path
    shown = f'sql {path} "SELECT * FROM dropped LIMIT 10"' if totals.dropped else f"failures {path}"
    raise CapfiltError(
        f"{path}: none of {sum(record.rows_in for record in records):,} images of the sources of kind {kind!r} is "
        f"left{because}, so that there is nothing to learn from them; `capfilt {shown}` has examples. To go on with "
        "another config, remove what was made with this one, or set another bootstrap.path"
    )


def require_fetched(config: CapfiltConfig, file: str, least: float) -> None:
    """Raise CapfiltError where too few URLs of a kind of source gave an image, as in an outage of the network.

    Args:
        file: of the config, for the command that fetches them again.
        least: ``bootstrap.min_fetched``.
    """
    committed = _state(Storage(config.corpus.path)).committed
    crawled = {
        (source, shard): record for (stage, source, shard), record in committed.items() if stage == "crawl"
    }
    for kind, of_kind in _by_kind(config, crawled).items():
        totals = Totals.of(of_kind)
        if totals.images >= least * totals.urls:
            continue
        reason = totals.lost.most_common(1)[0][0]
        path, mend = config.corpus.path, f"`capfilt failures {config.corpus.path}` has examples"
        if reason in TRANSIENT:
            mend = f"`capfilt crawl -c {file} --retry transient` fetches again what may succeed now"
        raise CapfiltError(
            f"{path}: {totals.images:,} of {totals.urls:,} URLs or files of the sources of kind {kind!r} gave an "
            f"image, and bootstrap.min_fetched = {least:g}; most others failed for the reason {reason}; {mend}"
        )


def is_trained(config: PretrainConfig, folder: str, begins_with: str = "") -> bool:
    """Tell whether a run has its last checkpoint.

    Args:
        begins_with: folder of the run whose last checkpoint it begins with; empty where it is none of these.

    Raises:
        CapfiltError: it began with another config or model, or on shards that are not there any more.
    """
    storage = Storage(folder)
    if not storage.exists("config.json"):
        return False
    begun = PretrainConfig.model_validate_json(storage.read("config.json"))
    # What a preset filled at the start, this config has not said.
    filled = {
        name: value for name, value in begun.optim.model_dump().items() if getattr(config.optim, name) is None
    }
    now = config.model_copy(update={"optim": config.optim.model_copy(update=filled)})
    if changes := changed_learning_keys(begun, now):
        raise _begun_otherwise(folder, changes, "bootstrap.path")
    saved = SavedCheckpoints(folder).committed()
    if not saved:
        return False
    _require_same_shards(config.data, storage, saved[-1].snapshot)
    first = SavedCheckpoints(begins_with).committed() if begins_with else []
    if first and digest_json(dict(first[-1].sha256)) not in saved[-1].models:
        raise _made_of_another(folder, f"began with another checkpoint than the last one of {begins_with}")
    return saved[-1].step == begun.optim.steps


def _require_same_shards(data: DataConfig, folder: Storage, digest: str) -> None:
    """Raise CapfiltError where a training read shards that its corpora do not have any more; they may have grown."""
    name = snapshot_file(digest)
    read = parse_snapshot(folder.read(name), data, folder.url(name)).shards
    are_there = all(Storage(part.path).is_corpus() for part in data.corpus)
    there = take_snapshot(data).shards if are_there else ()
    lost = {_content(shard) for shard in read} - {_content(shard) for shard in there}
    if lost:
        paths = " and ".join(dict.fromkeys(part.path for part in data.corpus))
        raise _made_of_another(
            folder.root,
            f"was trained on {len(read)} shards, {len(lost)} of which {paths} does not have any more",
        )


def _content(shard: SnapshotShard) -> tuple[str, str, str]:
    return shard.source, shard.shard, shard.tar.sha256


def _made_of_another(place: str, why: str) -> CapfiltError:
    return CapfiltError(f"{place} {why}; remove it, so that it is made anew, or set another bootstrap.path")


def _begun_otherwise(place: str, changes: list[str], key: str) -> CapfiltError:
    return CapfiltError(
        f"{place} was begun with another config ({'; '.join(changes)}); restore it, or set another {key}"
    )


def is_exported(run_folder: str, folder: Path) -> bool:
    """Tell whether a folder is the export of a run's last checkpoint."""
    checkpoint, last = exported_from(folder), last_checkpoint(run_folder)
    # By name, which no other checkpoint has: the folders may have been moved.
    return checkpoint is not None and last is not None and _name(checkpoint) == _name(last)


def _name(checkpoint: str) -> str:
    return checkpoint.rpartition("/")[2]


def last_checkpoint(run_folder: str) -> str | None:
    """Return the path of a run's last checkpoint."""
    saved = SavedCheckpoints(run_folder)
    records = saved.committed()
    return saved.storage.url(records[-1].path) if records else None
