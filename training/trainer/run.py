"""One rank's training run from its config: data, models and checkpoint are read and checked, then the loop runs."""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any

from pipeline.corpus.checkpoint_files import run_folder
from pipeline.corpus.fingerprint import output_fields
from pipeline.digests import digest_json
from pipeline.storage.errors import storage_error_message
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from schemas.records import CheckpointRecord, RunRecord, SnapshotRecord
from training.blip2.stage2 import Stage2
from training.build import build_stage
from training.checkpoint import Checkpoints, State, read_on_ranks, recorded_config
from training.data.held_out import held_out_samples
from training.data.loader import Batch, TrainingData
from training.data.snapshot import Snapshot, parse_snapshot, snapshot_file, take_snapshot
from training.distributed import World
from training.evaluate.validation import validate
from training.lease import Lease, wait_until_free
from training.trainer.base_models import (
    base_models,
    begin_training,
    read_initial_weights,
    require_same_models,
)
from training.trainer.lineage import LineageWriter
from training.trainer.loop import Loop
from training.trainer.metrics import JsonLines, TensorBoard, Wandb, require_libraries
from training.trainer.steps.optim import fill_preset
from training.trainer.summary import Summary

Log = Callable[[str], None]

# Keys that say where models and results are; models are compared by digest (``require_same_models``).
_LOCATIONS = (
    "run.output",
    "run.init_from",
    "qformer.weights",
    "qformer.tokenizer",
    "language.model",
    "language.revision",
    "blip.vision.init",
    "blip.text.init",
    "blip.text.tokenizer",
)


def pretrain(
    config: PretrainConfig, world: World, run: RunRecord, *, stop_asked: Callable[[], bool], log: Log
) -> Summary:
    """Train on this rank, from the newest good checkpoint of ``run.name`` if there is one.

    Nothing is written before all ranks have checked data, weights and checkpoint.

    Args:
        run: the command's record; rank 0 writes it with the filled config.

    Raises:
        CapfiltError: the input is at fault.
        TrainingStopped: see ``Loop.run``.
    """
    if config.run.stage == 2 and not config.run.init_from:
        raise CapfiltError(
            "run.init_from: not set; stage 2 begins from a stage 1: name its run, or a LAVIS .pth"
        )
    key = config.probe_key
    if key and config.blip is not None:
        raise CapfiltError(f"{key}: there is no probe of BLIP's models; leave it out")
    if key and not config.data.held_out:
        raise CapfiltError(f"{key}: there are no images for the probe; set data.held_out")
    require_libraries(config.metrics)
    log = log if world.rank == 0 else lambda text: None
    storage = Storage(run_folder(config))
    storage.require_place("run.output")
    # Before models are read, which may take minutes; it is taken when outputs are opened.
    world.broadcast_object(lambda: wait_until_free(storage, run.run_id, log=log))
    log(f"{config.run.name}: reading the data's records, the last checkpoint and the weights")
    deadline = _deadline(config, run)

    def stops() -> bool:
        return stop_asked() or time.time() >= deadline

    loop, snapshot, batches = world.all_or_raise(lambda: _prepare(config, world, run, stops, log))
    if loop.step == loop.schedule.steps:
        return loop.run(iter(()))
    with ExitStack() as stack:
        world.broadcast_object(lambda: _open_outputs(loop, snapshot, run, stack))
        return loop.run(batches)


def _deadline(config: PretrainConfig, run: RunRecord) -> float:
    """Return the Unix time at which the command has lasted ``run.max_hours``, which it may after a rank was lost."""
    hours = config.run.max_hours
    return math.inf if hours is None else datetime.fromisoformat(run.started_at).timestamp() + 3600 * hours


def _prepare(
    config: PretrainConfig, world: World, run: RunRecord, stop_asked: Callable[[], bool], log: Log
) -> tuple[Loop, Snapshot, Iterator[Batch]]:
    """Return the loop ready to run, the snapshot it trains on, and its batches; write nothing."""
    checkpoints = Checkpoints(run_folder(config))
    newest = world.broadcast_object(lambda: checkpoints.newest_good(log))
    state = read_on_ranks(checkpoints, newest, world)
    # Read by rank 0 alone: shards may be added while the ranks start.
    snapshot = world.broadcast_object(lambda: _snapshot(config, checkpoints.storage, state))
    config = fill_preset(config, snapshot.num_images)
    if state is not None:
        require_same_config(recorded_config(state.progress.config, checkpoints.storage.root), config)
        models = world.broadcast_object(lambda: require_same_models(config, state.progress.models))
    else:
        initial = world.all_or_raise(lambda: read_initial_weights(config) if world.rank == 0 else [])
        models = world.broadcast_object(lambda: base_models(config, initial))
    consumed = state.progress.samples if state else 0
    data = world.all_or_raise(lambda: TrainingData(config, snapshot, world.rank, world.size, consumed))
    stage = build_stage(config, world, world.device)
    loop = Loop(
        config=config,
        world=world,
        stage=stage,
        checkpoints=checkpoints,
        run_id=run.run_id,
        snapshot=snapshot.digest,
        models=models,
        stop_asked=stop_asked,
        log=log,
    )
    if newest is not None and state is not None:
        loop.resume(state, newest)
        log(f"resuming after step {loop.step:,} of {config.optim.steps:,}")
    else:
        begin_training(stage, initial, world)
    if loop.step == loop.schedule.steps:
        return loop, snapshot, iter(())
    # On one rank, unless the language model is sharded: then its forward pass needs all of them.
    is_sharded = isinstance(stage, Stage2) and stage.language.is_sharded
    if config.probe_key and (world.rank == 0 or is_sharded):
        held_out = held_out_samples(config, snapshot, config.probe.images)
        loop.probe = lambda: validate(stage, held_out, config)
    batches = iter(data)
    # The first batch is read before anything is written, so that a shard that differs from its record is found first.
    return loop, snapshot, itertools.chain([next(batches)], batches)


def require_same_config(before: PretrainConfig, after: PretrainConfig) -> None:
    """Raise CapfiltError, naming the keys, if a resumed run would be trained differently than it began."""
    if changed := changed_learning_keys(before, after):
        raise CapfiltError(
            f"run.name {after.run.name!r} began with another config ({'; '.join(changed)}); restore it, or set "
            "run.name to begin another run"
        )


def changed_learning_keys(before: PretrainConfig, after: PretrainConfig) -> list[str]:
    """Return the keys by which a run would be trained differently than it began, such as ``optim.steps: 4 -> 5``.

    Keys declared with ``tuning()`` may differ, and so may locations: the digests of the snapshot and of the models say
    whether data and models are the same.
    """
    old, new = _learning_keys(before), _learning_keys(after)
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in new | old if old.get(key) != new.get(key)
    ]


def _learning_keys(config: PretrainConfig) -> dict[str, Any]:
    """Return the keys that decide what a run learns, as ``section.key``, without the locations of data and models."""
    values: dict[str, Any] = {}
    for name in PretrainConfig.model_fields:
        section = getattr(config, name)
        values |= _dotted(name, output_fields(section) if section else {})
    for key in _LOCATIONS:
        values.pop(key, None)
    values["data.corpus"] = [
        {key: value for key, value in corpus.items() if key not in ("path", "snapshot")}
        for corpus in values["data.corpus"]
    ]
    # An open_clip architecture's name and its pretrained tag say more than the weights' digest does: both stay.
    if config.vision.model.startswith(("local-dir:", "hf-hub:")):
        values["vision.model"] = "folder"
    elif "/" in config.vision.pretrained:
        values["vision.pretrained"] = "file"
    return values


def _dotted(path: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in fields.items():
        values |= _dotted(f"{path}.{key}", value) if isinstance(value, dict) else {f"{path}.{key}": value}
    return values


def _snapshot(config: PretrainConfig, folder: Storage, state: State | None) -> Snapshot:
    """Return the shards to train on: of a resumed run those that it began with."""
    if state is None:
        return take_snapshot(config.data)
    digest = state.progress.snapshot
    name = snapshot_file(digest)
    try:
        snapshot = parse_snapshot(folder.read(name), config.data, folder.url(name))
    except FileNotFoundError:
        raise CapfiltError(
            f"{folder.url(name)} is missing: without it the run cannot be resumed on its data"
        ) from None
    if snapshot.digest != digest:
        raise CapfiltError(f"{folder.url(name)} is the snapshot of another run; restore it")
    return snapshot


@contextmanager
def _refusing_output(storage: Storage) -> Iterator[None]:
    """Turn an error of the storage, such as a full or a read-only disk, into a CapfiltError."""
    try:
        yield
    except OSError as error:
        why = storage_error_message(error) or str(error)
        raise CapfiltError(f"run.output: cannot write to {storage.root} ({why})") from error


def _open_outputs(loop: Loop, snapshot: Snapshot, run: RunRecord, stack: ExitStack) -> None:
    """Open what rank 0 alone writes: metrics, the run's files, the records in the corpora."""
    config, storage = loop.config, loop.checkpoints.storage
    resolved = config.model_dump(mode="json")
    with _refusing_output(storage):
        lease = Lease.take(storage, run.run_id, above=loop.last_lease, log=loop.log)
        stack.callback(lease.release)
        loop.checkpoints.lease = lease
        lines = JsonLines(storage, loop.step, lease)
        stack.callback(lines.close)
        loop.checkpoints.remove_unfinished()
        storage.write("config.json", json.dumps(resolved, indent=1).encode())
        storage.write(snapshot_file(snapshot.digest), snapshot.to_json())
    local = storage.root if storage.is_local else f"runs/{config.run.name}"
    loop.sinks = [lines]
    if config.metrics.tensorboard:
        loop.sinks.append(TensorBoard(local))
    if project := config.metrics.wandb_project:
        # The same key when the run is resumed.
        loop.sinks.append(Wandb(project, config.run.name, digest_json(storage.root)[:16], resolved, local))
    for sink in loop.sinks[1:]:
        stack.callback(sink.close)
    lineage = LineageWriter(config.data, config.run.output)
    lineage.write_start(
        replace(run, config=resolved, config_digest=digest_json(resolved)), loop.models, loop.log
    )
    lineage.write_snapshot(
        run.run_id, replace(SnapshotRecord.from_json(snapshot.to_json()), folder=storage.root)
    )

    def record_checkpoint(record: CheckpointRecord) -> None:
        lines.flush()
        lineage.write_checkpoint(record, storage.url(record.path))

    loop.record_checkpoint = record_checkpoint
