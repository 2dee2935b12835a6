"""Checkpoints of a run: written under a unique name, committed by a small record last, checked when they are read.

<run folder>/step-00001000.<attempt>/           safetensors (model, optimiser), their index, training.json
<run folder>/step-00001000.<attempt>.json       the record: it commits the folder, and has each file's sha256

Nothing is overwritten: a step that is trained again, because its checkpoint was damaged, gets another attempt.
``torch.distributed.checkpoint`` writes safetensors, so that reading a checkpoint runs no code. What is trained is the
same on every rank (DDP), so rank 0 writes alone: a rank that dies leaves no partial checkpoint, and any number of ranks
may resume from it.
"""

import contextlib
import shutil
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed.checkpoint as dcp
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from pipeline.corpus.checkpoint_files import (
    CHECKPOINT_FOLDER,
    DamagedCheckpointError,
    SavedCheckpoints,
    find_checkpoint,
)
from pipeline.digests import sha256_file
from pipeline.storage.scratch import temporary_folder
from schemas.errors import CapfiltError, first_line
from schemas.json_record import Count, FileName, Json, first_error, utc_now
from schemas.pretrain import PretrainConfig, stage_folder
from schemas.records import CheckpointRecord, ModelRecord
from training.distributed import World
from training.lease import Lease

_PROGRESS = "training.json"
# The parts of a state, with which the names of its tensors begin.
_PARTS = ("model", "optimizer", "auxiliary")

# torch warns that only one process saves, which is intended.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingProgress(Json):
    """The progress of a run: with the seed in its config, all that sampling, crops and dropout depend on.

    ``skipped_steps``: of the last steps, those whose loss or gradient was not finite. ``lease``: the number
    of the lease that its writer held.
    """

    step: Count
    samples: Count
    snapshot: FileName
    config: Mapping[str, Any]
    world_size: Count
    models: tuple[ModelRecord, ...] = ()
    skipped_steps: tuple[Count, ...] = ()
    lease: Count = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The content of a checkpoint."""

    progress: TrainingProgress
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    auxiliary: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, progress: TrainingProgress, tensors: Mapping[str, Tensor]) -> Self:
        """Return the state with these ``tensors``. Raises KeyError where one is of no part of it."""
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        return cls(progress=progress, **parts)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors, each by its name behind that of its part."""
        return {f"{part}.{name}": tensor for part in _PARTS for name, tensor in getattr(self, part).items()}


class Checkpoints(SavedCheckpoints):
    """The checkpoints in one run's folder, on local disk or S3.

    One process saves at a time: ``save`` may return as soon as the state is copied, while a thread writes it;
    ``wait`` (or the next ``save``) then raises the thread's error.

    Attributes:
        lease: of the run's folder, while this process trains the run.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self.lease: Lease | None = None

    def read(self, record: CheckpointRecord) -> State:
        """Return a checkpoint's state, on the CPU. Raises DamagedCheckpointError."""
        with self.checked_files(record) as folder:
            try:
                return _read_state(folder, record)
            # What safetensors and torch raise for files that match their record but are not safetensors.
            except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
                raise DamagedCheckpointError(
                    f"{self.storage.url(record.path)} is not a checkpoint that can be read: {first_line(error)}"
                ) from error

    # -- writing ---------------------------------------------------------------------------------------------

    def save(
        self,
        state: State,
        *,
        run_id: str,
        metrics: Mapping[str, float],
        asynchronous: bool,
        keep_last: int,
        keep_every: int = 0,
        keep_best: str = "",
        committed: Callable[[CheckpointRecord], None],
    ) -> None:
        """Write a state and commit it by its record; then remove the checkpoints that ``kept_paths`` does not name.

        Args:
            run_id, metrics: for the record.
            asynchronous: return once the state is copied; else when it is committed.
            keep_last, keep_every, keep_best: which checkpoints stay.
            committed: called with the record, before older checkpoints are removed.

        Raises:
            OSError: the storage did not take it (full disk): what was written of it is removed, and the
                checkpoints before it stand.
            LostLeaseError: another process trains the run now; nothing was published or deleted.
        """
        self.wait()
        progress = state.progress
        name = f"step-{progress.step:08d}.{uuid.uuid4().hex[:12]}"
        scratch = contextlib.ExitStack()
        tensors = _copied_tensors(state)

        def finish() -> None:
            try:
                folder = self._make_folder(name, scratch)
                _write_state(tensors, progress, folder)
                record = CheckpointRecord(
                    path=name,
                    stage=stage_folder(progress.config["run"]["stage"]),
                    run_id=run_id,
                    step=progress.step,
                    samples=progress.samples,
                    snapshot=progress.snapshot,
                    sha256={path.name: sha256_file(path) for path in sorted(folder.iterdir())},
                    metrics=metrics,
                    created_at=utc_now(),
                    models=tuple(model.digest for model in progress.models),
                )
                self._commit(folder, record)
            except (Exception, CheckpointException) as error:
                scratch.close()
                self._remove(name)
                raise _os_error(error) from error
            scratch.close()
            committed(record)
            self._require_lease()
            self._remove_others(keep_last, keep_every, keep_best)

        self._pending = self._writer.submit(finish)
        if not asynchronous:
            self.wait()

    def wait(self, *, block: bool = True) -> None:
        """Raise the error of the last ``save``, once it is done; with ``block`` false, only if it is done already."""
        if self._pending is not None and (block or self._pending.done()):
            pending, self._pending = self._pending, None
            pending.result()

    def remove_unfinished(self) -> None:
        """Remove the files of killed writers: those under a checkpoint's name without a record."""
        names = {record.path for record in self.committed()}
        for folder in self._folders() - names:
            if CHECKPOINT_FOLDER.fullmatch(folder):
                self._remove(folder)

    def _folders(self) -> set[str]:
        if self.storage.is_local:
            # Not by their files: a process killed before its first or after its last one leaves an empty folder.
            root = Path(self.storage.root)
            return {path.name for path in root.iterdir() if path.is_dir()} if root.exists() else set()
        return {info.path.partition("/")[0] for info in self.storage.list("") if "/" in info.path}

    def _make_folder(self, name: str, scratch: contextlib.ExitStack) -> Path:
        """Return the folder to write to: on local disk the final one, since no record names it yet."""
        if not self.storage.is_local:
            return scratch.enter_context(temporary_folder())
        folder = Path(self.storage.url(name))
        folder.mkdir(parents=True)
        return folder

    def _commit(self, folder: Path, record: CheckpointRecord) -> None:
        if not self.storage.is_local:
            for file in record.sha256:
                self.storage.put(folder / file, f"{record.path}/{file}")
        self._require_lease()
        created = self.storage.create(f"{record.path}.json", record.to_json().encode())
        assert created, f"{record.path} was there already"

    def _require_lease(self) -> None:
        if self.lease is not None:
            self.lease.require()

    def _remove_others(self, keep_last: int, keep_every: int, keep_best: str) -> None:
        records = self.committed()
        kept = kept_paths(records, keep_last, keep_every, keep_best)
        for record in records:
            if record.path not in kept:
                # The record is deleted first: a reader must never find one whose files are gone.
                self.storage.delete(f"{record.path}.json")
                self._remove(record.path)

    def _remove(self, name: str) -> None:
        assert CHECKPOINT_FOLDER.fullmatch(name), f"{name} is not a checkpoint's folder"
        if self.storage.is_local:
            shutil.rmtree(self.storage.url(name), ignore_errors=True)
            return
        for info in self.storage.list(name):
            self.storage.delete(info.path)


def kept_paths(
    records: Sequence[CheckpointRecord], keep_last: int, keep_every: int = 0, keep_best: str = ""
) -> set[str]:
    """Return which checkpoints stay.

    Args:
        records: of all checkpoints of a run, oldest first.
        keep_last: so many of the newest.
        keep_every: those of every so many steps; 0: none.
        keep_best: the one that has the highest value of this metric in its record, the newest of equals; empty: none.
    """
    kept = [*records[-keep_last:]]
    if keep_every:
        kept += [record for record in records if record.step % keep_every == 0]
    if measured := [record for record in records if keep_best in record.metrics]:
        kept.append(max(reversed(measured), key=lambda record: record.metrics[keep_best]))
    return {record.path for record in kept}


def read_on_ranks(checkpoints: Checkpoints, record: CheckpointRecord | None, world: World) -> State | None:
    """Return a checkpoint's state on the CPU of every rank; rank 0 alone reads it. None where there is no record.

    Raises DamagedCheckpointError on rank 0, CapfiltError on the others.
    """
    if record is None or world.size == 1:
        return checkpoints.read(record) if record else None
    state = world.all_or_raise(lambda: checkpoints.read(record) if world.rank == 0 else None)
    progress = world.broadcast_object(lambda: state.progress if state else None)
    assert progress is not None, "rank 0 has read it"
    of_first = world.broadcast_tensors(state.tensors if state else {})
    return State.of(progress, {name: tensor.cpu() for name, tensor in of_first})


def read_model(path: str) -> tuple[CheckpointRecord, State]:
    """Return a checkpoint by its record's path (``.../step-00001000.<attempt>.json``), its folder's or its run's.

    Of a run, the newest good one. Raises CapfiltError where there is none, or its files differ from its record.
    """
    run, record = find_checkpoint(path)
    return record, Checkpoints(run.storage.root).read(record)


def recorded_config(values: Any, where: str) -> PretrainConfig:
    """Return the config that comes with trained weights. Raises CapfiltError where this version cannot read it."""
    try:
        return PretrainConfig.model_validate(values)
    except ValidationError as error:
        raise CapfiltError(
            f"{where}: its config is of another version ({first_error(error)}); name a recipe with -c"
        ) from error


def _copied_tensors(state: State) -> dict[str, Tensor]:
    """Return every tensor of a state, copied to the CPU: training continues while these are written."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in state.tensors.items()
    }


def _write_state(tensors: Mapping[str, Tensor], progress: TrainingProgress, folder: Path) -> None:
    (folder / _PROGRESS).write_text(progress.to_json())
    # The model is in a file of its own: stage 2, exports and evaluation then read a third of the bytes.
    files = {name: 1 if name.startswith("model.") else 2 for name in tensors}
    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files)
    dcp.save(dict(tensors), storage_writer=writer, no_dist=True)


def _read_state(folder: Path, record: CheckpointRecord) -> State:
    """Read the files that the record names, and no other."""
    tensors: dict[str, Tensor] = {}
    if _PROGRESS not in record.sha256:
        raise ValueError(f"its record has no {_PROGRESS}")
    for name in sorted(record.sha256):
        if not name.endswith(".safetensors"):
            continue
        with safe_open(folder / name, framework="pt") as file:
            # A copy: the tensor itself is memory mapped from the file, which may be deleted before it.
            tensors |= {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a mapping)
    try:
        progress = TrainingProgress.from_json((folder / _PROGRESS).read_bytes())
    except ValueError as error:
        raise ValueError(f"{_PROGRESS}: {error}") from error
    return State.of(progress, tensors)


def _os_error(error: BaseException) -> BaseException:
    """Return the storage's error (a full disk), which torch wraps; else the error itself."""
    causes = (
        [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    )
    return next((cause for cause in causes if isinstance(cause, OSError)), error)
