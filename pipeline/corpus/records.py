"""The records on storage: reading, committing, retiring, quarantining. The record is the commit.

records/<stage>/<source>/<shard>.json                         committed, or a note that its record was retired
records/retired/<stage>/<source>/<shard>.<attempt>.json       recomputed since; kept for lineage
records/quarantine/<stage>/<source>/<shard>.json              failed every attempt
records/attempts/<stage>/<source>/<shard>/<run>.<number>      begun; removed after the commit
records/lost_attempts/<stage>/<source>/<shard>/<run>.<number>.json    did not commit; what it cost
records/marks/<mark>.json                                     a verdict on samples, or what takes some back
records/mark-searches/<mark>.<attempt>.json                   which later shards a mark concerns
records/intake/<source>/<batch>.json                          lists read into url shards
records/snapshots/<run_id>/snapshot-<digest>.json             what a training elsewhere reads of this corpus
records/at-work/crawl/<worker>                                 fresh while a worker works: see living_workers
records/format/<major>.<minor>.json                           a format that wrote here
records/runs/<run_id>.{start,end}.json, records/models/<digest>.json, records/checkpoints/<run_id>.<name>.json

A corpus may be somebody else's. What is read here has the declared types, is about the shard that its own file's
name says, and names files of the corpus alone; a tar outside it only where the source's lists imported that very tar.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from pipeline.corpus.lost_attempts import RunAttempts, ShardId, settle_attempts
from pipeline.corpus.record_files import (
    is_retired_note,
    parse_record,
    read_bounded,
    read_record,
    read_record_file,
    retired_note,
)
from pipeline.storage.file_info import FileInfo
from pipeline.storage.storage import Storage
from schemas.corpus_format import FORMAT, FORMAT_FOLDER
from schemas.errors import CapfiltError
from schemas.json_record import Json
from schemas.marks import MarkRecord, MarkSearchRecord
from schemas.names import is_outside_tar
from schemas.records import (
    CheckpointRecord,
    IntakeRecord,
    ModelRecord,
    QuarantineRecord,
    RunRecord,
    ShardRecord,
    SnapshotRecord,
    shard_record_path,
)
from schemas.stages import STAGES, Stage

R = TypeVar("R", bound=Json)


class Records:
    """The records of one corpus. Stateless: every call asks the storage. Pickles."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    # -- shards ----------------------------------------------------------------------------------------------

    def commit(self, record: ShardRecord) -> bool:
        """Create the shard's record if it has none; False: another commit came first."""
        data = record.to_json().encode()
        if self.storage.create(record.path, data):
            return True
        standing = read_record_file(self.storage, record.path)
        return is_retired_note(standing) and self.storage.swap(record.path, standing, data)

    def read(self, stage: Stage, source: str, shard: str) -> ShardRecord | None:
        """Return the committed record of a shard, or None."""
        path = shard_record_path(stage, source, shard)
        try:
            record = parse_record(ShardRecord, path, read_record(self.storage, path))
        except FileNotFoundError:
            return None
        self.require_imported([record])
        return record

    def shards(self, stages: Iterable[Stage] = STAGES) -> dict[ShardId, ShardRecord]:
        """Return every committed record of the stages, as ``read_shards`` does."""
        return self.read_shards(self.list_shards(stages))

    def list_shards(self, stages: Iterable[Stage] = STAGES) -> list[FileInfo]:
        """Return the files of every committed record of the stages."""
        return [info for stage in stages for info in self.storage.list(f"records/{stage}")]

    def read_shards(self, files: list[FileInfo]) -> dict[ShardId, ShardRecord]:
        """Return the records in listed files, without histograms: they are most of a record's size."""
        records = [replace(record, histograms={}) for record in self._read_all(ShardRecord, files)]
        self.require_imported(records)
        return {record.shard_id: record for record in records}

    def retired(self) -> list[ShardRecord]:
        """Return the records that a recomputation replaced."""
        return self._read_all(ShardRecord, self.storage.list("records/retired"))

    def retire(self, record: ShardRecord) -> None:
        """Move a committed record to records/retired, where readers do not look, before its shard is recomputed.

        A note takes its place, which the shard's next record replaces: nothing is deleted, so that an attempt that is
        slow here cannot remove a record that another one has committed meanwhile.
        """
        try:
            text = read_record(self.storage, record.path)
        except FileNotFoundError:
            return
        if parse_record(ShardRecord, record.path, text).attempt != record.attempt:
            return
        self.storage.create(record.retired_path, text)
        self.storage.swap(record.path, text, retired_note(record))

    def require_imported(self, records: Iterable[ShardRecord]) -> None:
        """Reject a tar outside the corpus that the source's lists did not import for that shard."""
        outside = {
            (record.source, record.shard): record.outputs["tar"].path
            for record in records
            if record.stage == "crawl" and is_outside_tar(record.outputs["tar"].path)
        }
        if not outside:
            return
        imported = {
            (batch.source, shard): tar for batch in self.intakes() for shard, tar in batch.adopted.items()
        }
        for (source, shard), tar in outside.items():
            if imported.get((source, shard)) != tar:
                raise CapfiltError(
                    f"{shard_record_path('crawl', source, shard)} names a tar outside the corpus that no intake "
                    f"imported: {tar}; nothing was read. Use only a corpus from a source that you trust"
                )

    # -- attempts and quarantine -----------------------------------------------------------------------------

    def attempts(self, stage: Stage, source: str, shard: str, run_id: str) -> RunAttempts:
        """Return the attempts of a run at a stage of a shard."""
        return RunAttempts(self.storage, stage, source, shard, run_id)

    def forget_settled(self, committed: Mapping[ShardId, ShardRecord], ended_run: str = "") -> None:
        """Delete the attempts and quarantines of shards that were committed since, as killed runs leave them.

        What attempts cost that did not commit stays, also those of a run that has just ended.
        """
        quarantined = self.quarantined()
        settle_attempts(self.storage, committed, quarantined, ended_run)
        for place, quarantine in quarantined.items():
            record = committed.get(place)
            if record is not None and quarantine.finished_at < record.finished_at:
                self.storage.delete(quarantine.path)

    def quarantine(self, record: QuarantineRecord) -> None:
        """Note that a shard failed every attempt."""
        self.storage.write(record.path, record.to_json().encode())

    def quarantined(self) -> dict[ShardId, QuarantineRecord]:
        """Return the shards that failed every attempt of their last run."""
        records = self._read_all(QuarantineRecord, self.storage.list("records/quarantine"))
        return {record.shard_id: record for record in records}

    # -- format ----------------------------------------------------------------------------------------------

    def list_formats(self) -> list[str]:
        """Return the files that say which formats wrote to the corpus."""
        return [info.path for info in self.storage.list(FORMAT_FOLDER)]

    # -- intake, runs, models, checkpoints -------------------------------------------------------------------

    def commit_intake(self, record: IntakeRecord) -> bool:
        """Create the batch's record if that number is free."""
        return self.storage.create(record.path, record.to_json().encode())

    def intakes(self, source: str | None = None) -> list[IntakeRecord]:
        """Return the batches, by source and number."""
        folder = "records/intake" if source is None else f"records/intake/{source}"
        return self._read_all(IntakeRecord, self.storage.list(folder))

    def url_shards(self) -> dict[tuple[str, str], ShardRecord]:
        """Return every url shard, by (source, shard), as a record of the stage ``urls``."""
        return url_shards_of(self.intakes())

    def write_run(self, record: RunRecord) -> None:
        """Write the start (outcome None) or the end of a run; with its start, the format of what it writes."""
        if record.outcome is None:
            self.storage.create(FORMAT.path, FORMAT.to_json(record.versions.get("capfilt", "")).encode())
        self.storage.write(record.path, record.to_json().encode())

    def has_begun(self, run_id: str) -> bool:
        """Tell whether the start of a run was written."""
        return self.storage.exists(f"records/runs/{run_id}.start.json")

    def runs(self) -> list[RunRecord]:
        """Return every run once, by its end where it has one, oldest first."""
        runs: dict[str, RunRecord] = {}
        for record in self._read_all(RunRecord, self.storage.list("records/runs")):
            if record.outcome is not None or record.run_id not in runs:
                runs[record.run_id] = record
        return [runs[run_id] for run_id in sorted(runs)]

    def register_model(self, record: ModelRecord) -> None:
        """Note a model's identity, once."""
        self.storage.create(record.path, record.to_json().encode())

    def models(self) -> list[ModelRecord]:
        """Return the models that runs used here."""
        return self._read_all(ModelRecord, self.storage.list("records/models"))

    def write_checkpoint(self, name: str, record: CheckpointRecord) -> None:
        """Note a complete checkpoint."""
        self.storage.write(f"records/checkpoints/{name}.json", record.to_json().encode())

    def write_snapshot(self, run_id: str, record: SnapshotRecord) -> None:
        """Note what a training reads whose folder is outside the corpus."""
        self.storage.write(f"records/snapshots/{run_id}/{record.name}", record.to_json().encode())

    # -- marks -----------------------------------------------------------------------------------------------

    def write_mark(self, record: MarkRecord | MarkSearchRecord) -> None:
        """Note a mark, or what a search found of one: its name is its own."""
        self.storage.create(record.path, record.to_json().encode())

    def marks(self) -> list[MarkRecord]:
        """Return the marks and what takes some of them back."""
        return self._read_all(MarkRecord, self.storage.list("records/marks"))

    def mark_searches(self) -> list[MarkSearchRecord]:
        """Return what later searches found of the marks."""
        return self._read_all(MarkSearchRecord, self.storage.list("records/mark-searches"))

    def _read_all(self, kind: type[R], files: list[FileInfo]) -> list[R]:
        """Read many small files at once; one that vanished meanwhile (retired) is left out.

        So is a temporary file: what a writer killed inside ``Storage.create`` left beside the name is not a record.
        """

        def read(info: FileInfo) -> R | None:
            try:
                return parse_record(kind, info.path, read_bounded(self.storage, info))
            except FileNotFoundError:
                return None

        records = self.storage.map(read, [info for info in files if info.path.endswith(".json")])
        return [record for record in records if record is not None]


def url_shards_of(batches: Iterable[IntakeRecord]) -> dict[tuple[str, str], ShardRecord]:
    """Return the url shards of batches as records, by source and shard."""
    records = [record for batch in batches for record in batch.shard_records()]
    return {(record.source, record.shard): record for record in records}
