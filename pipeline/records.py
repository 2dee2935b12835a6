"""The records on storage: reading, committing, retiring, quarantining. The record is the commit.

records/<stage>/<source>/<shard>.json                         committed
records/retired/<stage>/<source>/<shard>.<attempt>.json       recomputed since; kept for lineage
records/quarantine/<stage>/<source>/<shard>.json              failed every attempt
records/attempts/<stage>/<source>/<shard>/<attempt>.json      begun; removed at commit
records/intake/<source>/<batch>.json                          lists read into url shards
records/runs/<run_id>.{start,end}.json, records/models/<digest>.json, records/checkpoints/<name>.json
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, TypeVar

from pipeline.storage import Storage
from schemas.records import (
    STAGES,
    CheckpointRecord,
    IntakeRecord,
    Json,
    ModelRecord,
    QuarantineRecord,
    RunRecord,
    ShardRecord,
    Stage,
)

ShardId = tuple[Stage, str, str]
R = TypeVar("R", bound=Json)

_READERS = 32


def now() -> str:
    """Return the time as records hold it: ISO 8601, UTC, microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


class Records:
    """The records of one corpus. Stateless: every call asks the storage. Pickles."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    # -- shards ----------------------------------------------------------------------------------------------

    def commit(self, record: ShardRecord) -> bool:
        """Create the shard's record if it has none; False: another attempt won."""
        return self.storage.create(_shard_path(record), record.to_json().encode())

    def read(self, stage: Stage, source: str, shard: str) -> ShardRecord | None:
        """Return the committed record of a shard, or None."""
        try:
            return ShardRecord.from_json(self.storage.read(f"records/{stage}/{source}/{shard}.json"))
        except FileNotFoundError:
            return None

    def shards(self, stages: Iterable[Stage] = STAGES) -> dict[ShardId, ShardRecord]:
        """Return every committed record of the stages, without histograms: they are most of a record's size."""
        paths = [info.path for stage in stages for info in self.storage.list(f"records/{stage}")]
        records = self._read_all(_LightRecord, paths)
        return {(record.stage, record.source, record.shard): record for record in records}

    def retired(self) -> list[ShardRecord]:
        """Return the records that a recomputation replaced."""
        return self._read_all(ShardRecord, [info.path for info in self.storage.list("records/retired")])

    def retire(self, record: ShardRecord) -> None:
        """Take a committed record out of the readers' sight, keeping a copy, before its shard is made anew."""
        committed = self.read(record.stage, record.source, record.shard)
        if committed is None or committed.attempt != record.attempt:
            return
        path = f"records/retired/{record.stage}/{record.source}/{record.shard}.{record.attempt}.json"
        self.storage.create(path, committed.to_json().encode())
        self.storage.delete(_shard_path(record))

    # -- attempts and quarantine -----------------------------------------------------------------------------

    def begin_attempt(self, stage: Stage, source: str, shard: str, attempt: str, run_id: str) -> int:
        """Note that an attempt begins; return how many of this run have begun, this one included."""
        self.storage.create(f"{_attempts_folder(stage, source, shard)}/{run_id}.{attempt}", b"")
        return self.attempts_begun(stage, source, shard, run_id)

    def attempts_begun(self, stage: Stage, source: str, shard: str, run_id: str) -> int:
        """Return how many attempts of this run have begun and not committed."""
        begun = self.storage.list(_attempts_folder(stage, source, shard))
        return sum(info.path.split("/")[-1].startswith(f"{run_id}.") for info in begun)

    def end_attempts(self, stage: Stage, source: str, shard: str) -> None:
        """Forget the shard's attempts and its quarantine: it is committed."""
        for info in self.storage.list(_attempts_folder(stage, source, shard)):
            self.storage.delete(info.path)
        self.storage.delete(f"records/quarantine/{stage}/{source}/{shard}.json")

    def quarantine(self, record: QuarantineRecord) -> None:
        """Note that a shard failed every attempt."""
        path = f"records/quarantine/{record.stage}/{record.source}/{record.shard}.json"
        self.storage.write(path, record.to_json().encode())

    def quarantined(self) -> dict[ShardId, QuarantineRecord]:
        """Return the shards that failed every attempt of their last run."""
        paths = [info.path for info in self.storage.list("records/quarantine")]
        records = self._read_all(QuarantineRecord, paths)
        return {(record.stage, record.source, record.shard): record for record in records}

    # -- intake, runs, models, checkpoints -------------------------------------------------------------------

    def commit_intake(self, record: IntakeRecord) -> bool:
        """Create the batch's record if that number is free."""
        path = f"records/intake/{record.source}/{record.batch:05d}.json"
        return self.storage.create(path, record.to_json().encode())

    def intakes(self, source: str | None = None) -> list[IntakeRecord]:
        """Return the batches, by source and number."""
        folder = "records/intake" if source is None else f"records/intake/{source}"
        return self._read_all(IntakeRecord, [info.path for info in self.storage.list(folder)])

    def write_run(self, record: RunRecord) -> None:
        """Write the start (outcome None) or the end of a run."""
        part = "start" if record.outcome is None else "end"
        self.storage.write(f"records/runs/{record.run_id}.{part}.json", record.to_json().encode())

    def has_begun(self, run_id: str) -> bool:
        """Tell whether the start of a run was written."""
        return self.storage.exists(f"records/runs/{run_id}.start.json")

    def runs(self) -> list[RunRecord]:
        """Return every run once, by its end where it has one, oldest first."""
        paths = [info.path for info in self.storage.list("records/runs")]
        runs: dict[str, RunRecord] = {}
        for record in self._read_all(RunRecord, paths):
            if record.outcome is not None or record.run_id not in runs:
                runs[record.run_id] = record
        return [runs[run_id] for run_id in sorted(runs)]

    def register_model(self, record: ModelRecord) -> None:
        """Note a model's identity, once."""
        self.storage.create(f"records/models/{record.digest}.json", record.to_json().encode())

    def models(self) -> list[ModelRecord]:
        """Return the models that runs used here."""
        return self._read_all(ModelRecord, [info.path for info in self.storage.list("records/models")])

    def write_checkpoint(self, name: str, record: CheckpointRecord) -> None:
        """Note a complete checkpoint."""
        self.storage.write(f"records/checkpoints/{name}.json", record.to_json().encode())

    def checkpoints(self) -> list[CheckpointRecord]:
        """Return the checkpoints trained on this corpus."""
        return self._read_all(
            CheckpointRecord, [info.path for info in self.storage.list("records/checkpoints")]
        )

    def _read_all(self, kind: type[R], paths: list[str]) -> list[R]:
        """Read many small files at once; one that vanished meanwhile (retired) is left out.

        So is a temporary file: what a writer killed inside ``Storage.create`` left beside the name is no record.
        """
        paths = [path for path in paths if path.endswith(".json")]

        def read(path: str) -> R | None:
            try:
                return kind.from_json(self.storage.read(path))
            except FileNotFoundError:
                return None

        with ThreadPoolExecutor(_READERS) as readers:
            return [record for record in readers.map(read, paths) if record is not None]


class _LightRecord(ShardRecord):
    """A shard's record read without its histograms."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ShardRecord:
        return ShardRecord.from_dict({**values, "histograms": {}})


def _shard_path(record: ShardRecord) -> str:
    return f"records/{record.stage}/{record.source}/{record.shard}.json"


def _attempts_folder(stage: Stage, source: str, shard: str) -> str:
    return f"records/attempts/{stage}/{source}/{shard}"
