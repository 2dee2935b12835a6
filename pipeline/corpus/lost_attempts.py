"""Attempts at a shard: noted where they begin, and kept, with what they cost, where they did not commit it.

The note of an attempt says when it began and what its worker held. An attempt that fails in its worker is kept by that
worker. One that was killed cannot say when: whoever finds its note later keeps it, up to that moment or to the end of
its run, which is the most that it can have taken.
"""

import contextlib
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from pipeline.storage.file_info import FileInfo
from pipeline.storage.storage import Storage
from schemas.json_record import utc_now
from schemas.records import (
    AttemptNote,
    LostAttemptRecord,
    QuarantineRecord,
    RunRecord,
    ShardRecord,
    ShardTask,
    WorkerShare,
    lost_attempt_path,
)
from schemas.stages import Stage

ShardId = tuple[Stage, str, str]

_FOLDER = "records/attempts"
_MOST_NOTE_BYTES = 4096


def attempt_path(stage: Stage, source: str, shard: str, run_id: str, number: int) -> str:
    """Return where the note of an attempt is."""
    return f"{_FOLDER}/{stage}/{source}/{shard}/{run_id}.{number}"


def new_note(share: WorkerShare, node: str) -> bytes:
    """Return the note of an attempt that begins now."""
    note = AttemptNote(
        id=uuid.uuid4().hex, started_at=utc_now(), host=socket.gethostname(), share=share, node=node
    )
    return note.to_json().encode()


def node_of_note(storage: Storage, path: str) -> str:
    """Return where an attempt ran; empty where its note does not say."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return AttemptNote.from_json(storage.read(path, _MOST_NOTE_BYTES)).node
    return ""


def failed_attempt(task: ShardTask, number: int, seconds: float, error: str) -> LostAttemptRecord:
    """Return the record of this worker's attempt, which ends now with an error after some seconds of it."""
    began = datetime.now(UTC) - timedelta(seconds=seconds)
    return LostAttemptRecord(
        stage=task.stage,
        source=task.source,
        shard=task.shard,
        run_id=task.run_id,
        number=number,
        cause="failed",
        error=error,
        started_at=began.isoformat(timespec="microseconds"),
        ended_at=utc_now(),
        seconds=round(seconds, 4),
        host=socket.gethostname(),
        **_held(task.share),
    )


def _held(share: WorkerShare) -> dict[str, Any]:
    return {"cpus": share.cpus, "gpus": share.gpus, "node_type": share.node_type or None}


def keep_lost(storage: Storage, record: LostAttemptRecord) -> None:
    """Write the record of a lost attempt, unless somebody has; a storage that refuses it loses a figure, no data."""
    with contextlib.suppress(OSError):
        storage.create(record.path, record.to_json().encode())


def last_error(storage: Storage, stage: Stage, source: str, shard: str, run_id: str, begun: int) -> str:
    """Return the error of the last attempt of a run that failed, up to a number; empty where all were killed."""
    for number in range(begun, 0, -1):
        path = lost_attempt_path(stage, source, shard, run_id, number)
        with contextlib.suppress(OSError, ValueError):
            if error := LostAttemptRecord.from_json(storage.read(path)).error:
                return error
    return ""


def settle_attempts(
    storage: Storage,
    committed: Mapping[ShardId, ShardRecord],
    quarantined: Mapping[ShardId, QuarantineRecord],
    ended_run: str,
) -> None:
    """Delete the notes of attempts at committed shards; keep as lost those of other runs, and of runs that ended.

    Of the run that committed or quarantined a shard, its worker has kept the lost ones.
    """
    ends: dict[str, str | None] = {}
    for info, (place, run_id) in _notes(storage):
        record = committed.get(place)
        is_settled = record is not None and info.modified < datetime.fromisoformat(record.finished_at)
        ended_by = {made.run_id for made in (record, quarantined.get(place)) if made}
        if run_id not in ended_by:
            if run_id not in ends:
                ends[run_id] = utc_now() if run_id == ended_run else _end_of_run(storage, run_id)
            if end := ends[run_id] or (record.finished_at if record and is_settled else None):
                _keep_killed(storage, info.path, end)
        if is_settled:
            storage.delete(info.path)


def _notes(storage: Storage) -> Iterator[tuple[FileInfo, tuple[ShardId, str]]]:
    """Yield the notes, and of which shard and run each is, by the names of its path."""
    for info in storage.list(_FOLDER):
        _, _, stage, source, shard, name = info.path.split("/")
        yield info, ((cast(Stage, stage), source, shard), name.rpartition(".")[0])


def _end_of_run(storage: Storage, run_id: str) -> str | None:
    """Return when a run ended, as it says itself; None where it does not."""
    with contextlib.suppress(OSError, ValueError):
        return RunRecord.from_json(storage.read(f"records/runs/{run_id}.end.json")).finished_at
    return None


def keep_killed_before(
    storage: Storage, stage: Stage, source: str, shard: str, run_id: str, numbers: Iterable[int]
) -> list[LostAttemptRecord]:
    """Keep attempts that ended without saying so, some time before now; return the records of those that none had."""
    paths = [attempt_path(stage, source, shard, run_id, number) for number in numbers]
    return [record for path in paths if (record := _keep_killed(storage, path, utc_now()))]


def _keep_killed(storage: Storage, path: str, ended_at: str) -> LostAttemptRecord | None:
    """Keep the attempt of a note, once; of one that does not say when it began, nothing."""
    with contextlib.suppress(OSError, ValueError):
        note = AttemptNote.from_json(storage.read(path, _MOST_NOTE_BYTES))
        began, ended = (datetime.fromisoformat(time) for time in (note.started_at, ended_at))
        _, _, stage, source, shard, name = path.split("/")
        run_id, _, number = name.rpartition(".")
        record = LostAttemptRecord(
            stage=cast(Stage, stage),
            source=source,
            shard=shard,
            run_id=run_id,
            number=int(number),
            cause="killed",
            started_at=note.started_at,
            ended_at=ended_at,
            seconds=max(0.0, round((ended - began).total_seconds(), 4)),
            host=note.host,
            **_held(note.share),
        )
        return record if storage.create(record.path, record.to_json().encode()) else None
    return None
