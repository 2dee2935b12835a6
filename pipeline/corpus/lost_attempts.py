"""Attempts at a shard: noted where they begin, and kept, with what they cost, where they did not commit it.

The note of an attempt says when it began and what its worker held. An attempt that fails in its worker is kept by that
worker. One that was killed cannot say when: whoever finds its note later keeps it, up to that moment or to the end of
its run, which is the most that it can have taken.
"""

import contextlib
import itertools
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from pipeline.storage.file_info import FileInfo
from pipeline.storage.storage import Storage
from schemas.json_record import utc_now
from schemas.records import (
    NO_SHARE,
    AttemptNote,
    LostAttemptRecord,
    QuarantineRecord,
    RunRecord,
    ShardRecord,
    WorkerShare,
    lost_attempt_path,
)
from schemas.stages import Stage

ShardId = tuple[Stage, str, str]

_FOLDER = "records/attempts"
_MOST_NOTE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class RunAttempts:
    """The attempts of one run at one stage of one shard, numbered from 1 on.

    ``begun``, where it is asked for: up to this number, as ``begin`` gave it.
    """

    storage: Storage
    stage: Stage
    source: str
    shard: str
    run_id: str

    def begin(self, *, is_retry: bool, share: WorkerShare = NO_SHARE, node: str = "") -> int:
        """Note that an attempt begins; return its number.

        Args:
            is_retry: an attempt before it is known to have begun. Where that is not known and turns out to be so,
                nothing is noted, and the answer is 0.
            share: what the worker holds of its node.
            node: where it runs: a name that no other node ever has.
        """
        for number in itertools.count(1):
            # Its own bytes, so that exactly one attempt has the number.
            note = AttemptNote(
                id=uuid.uuid4().hex, started_at=utc_now(), host=socket.gethostname(), share=share, node=node
            )
            if self.storage.create(self._note_path(number), note.to_json().encode()):
                return number
            if not is_retry:
                return 0
        raise AssertionError

    def nodes(self, begun: int) -> list[str]:
        """Return where they ran; empty where a note does not say."""
        return [self._node(number) for number in range(1, begun + 1)]

    def _node(self, number: int) -> str:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return self._note(number).node
        return ""

    def end(self, begun: int) -> None:
        """Forget them."""
        for number in range(1, begun + 1):
            self.storage.delete(self._note_path(number))

    def keep_failed(self, number: int, seconds: float, error: str, share: WorkerShare) -> LostAttemptRecord:
        """Keep this worker's attempt, which ends now with an error after some seconds of it; return its record.

        A storage that refuses the record loses a figure, no data.
        """
        began = datetime.now(UTC) - timedelta(seconds=seconds)
        record = self._lost(
            number,
            share,
            cause="failed",
            started_at=began.isoformat(timespec="microseconds"),
            ended_at=utc_now(),
            seconds=round(seconds, 4),
            host=socket.gethostname(),
            error=error,
        )
        with contextlib.suppress(OSError):
            self.storage.create(record.path, record.to_json().encode())
        return record

    def keep_killed(self, numbers: Iterable[int]) -> list[LostAttemptRecord]:
        """Keep some that ended without saying so, some time before now; return the records of those that none had."""
        return [record for number in numbers if (record := self.keep_killed_by(number, utc_now()))]

    def keep_killed_by(self, number: int, ended_at: str) -> LostAttemptRecord | None:
        """Keep one that was killed before a time, once; where its note does not say when it began, nothing."""
        with contextlib.suppress(OSError, ValueError):
            note = self._note(number)
            began, ended = (datetime.fromisoformat(time) for time in (note.started_at, ended_at))
            record = self._lost(
                number,
                note.share,
                cause="killed",
                started_at=note.started_at,
                ended_at=ended_at,
                seconds=max(0.0, round((ended - began).total_seconds(), 4)),
                host=note.host,
            )
            return record if self.storage.create(record.path, record.to_json().encode()) else None
        return None

    def last_error(self, begun: int) -> str:
        """Return the error of the last one that failed; empty where all were killed."""
        for number in range(begun, 0, -1):
            path = lost_attempt_path(self.stage, self.source, self.shard, self.run_id, number)
            with contextlib.suppress(OSError, ValueError):
                if error := LostAttemptRecord.from_json(self.storage.read(path)).error:
                    return error
        return ""

    def _note_path(self, number: int) -> str:
        return f"{_FOLDER}/{self.stage}/{self.source}/{self.shard}/{self.run_id}.{number}"

    def _note(self, number: int) -> AttemptNote:
        return AttemptNote.from_json(self.storage.read(self._note_path(number), _MOST_NOTE_BYTES))

    def _lost(self, number: int, share: WorkerShare, **fields: Any) -> LostAttemptRecord:
        return LostAttemptRecord(
            stage=self.stage,
            source=self.source,
            shard=self.shard,
            run_id=self.run_id,
            number=number,
            cpus=share.cpus,
            gpus=share.gpus,
            node_type=share.node_type or None,
            **fields,
        )


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
    for info, attempts, number in noted_attempts(storage):
        place, run_id = (attempts.stage, attempts.source, attempts.shard), attempts.run_id
        record = committed.get(place)
        is_settled = record is not None and info.modified < datetime.fromisoformat(record.finished_at)
        ended_by = {made.run_id for made in (record, quarantined.get(place)) if made}
        if run_id not in ended_by:
            if run_id not in ends:
                ends[run_id] = utc_now() if run_id == ended_run else _end_of_run(storage, run_id)
            end = ends[run_id] or (record.finished_at if record and is_settled else None)
            if end and number.isdecimal():
                attempts.keep_killed_by(int(number), end)
        if is_settled:
            storage.delete(info.path)


def noted_attempts(storage: Storage) -> Iterator[tuple[FileInfo, RunAttempts, str]]:
    """Yield the notes, and which attempt of which run each is of, by its path: of a file cut short, not by number."""
    for info in storage.list(_FOLDER):
        *_, stage, source, shard, name = info.path.split("/")
        run_id, _, number = name.rpartition(".")
        yield info, RunAttempts(storage, cast(Stage, stage), source, shard, run_id), number


def _end_of_run(storage: Storage, run_id: str) -> str | None:
    """Return when a run ended, as it says itself; None where it does not."""
    with contextlib.suppress(OSError, ValueError):
        return RunRecord.from_json(storage.read(f"records/runs/{run_id}.end.json")).finished_at
    return None
