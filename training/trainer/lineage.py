"""Writes a training's records into the corpora that it reads: the run, its models, its snapshot, each checkpoint."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from pipeline.corpus.records import Records
from pipeline.storage.storage import Storage
from schemas.json_record import utc_now
from schemas.pretrain import DataConfig
from schemas.records import CheckpointRecord, ModelRecord, RunOutcome, RunRecord, SnapshotRecord
from training.data.originals import with_originals


class LineageWriter:
    """The records of the corpora that a run reads, itself or as copies of their images; read-only ones have none.

    Args:
        output: ``run.output``. Copies are looked for in the corpora that a folder of the data, or this, lies in.
    """

    def __init__(self, data: DataConfig, output: str = "") -> None:
        paths = dict.fromkeys(filter(None, (*(corpus.path for corpus in data.corpus), output)))
        storages = [storage for path in paths if (storage := Storage(path)).takes_commits]
        corpora = [corpus for storage in storages if (corpus := storage.enclosing_corpus()) is not None]
        self.corpora = list({corpus.root: Records(corpus) for corpus in corpora}.values())

    def write_start(self, run: RunRecord, models: Iterable[ModelRecord], log: Callable[[str], None]) -> None:
        """Write the start of a run and its models. A corpus that cannot be written to is logged and left out."""
        for records in list(self.corpora):
            try:
                records.write_run(run)
                for model in models:
                    records.register_model(model)
            except OSError as error:
                self.corpora.remove(records)
                log(f"{records.storage.root} takes no records ({error}): the run will not be in its manifest")

    def write_snapshot(self, run_id: str, snapshot: SnapshotRecord) -> None:
        """Write what the run reads into the corpora: not where a file in ``snapshot.folder`` says the same already."""
        for records in self.corpora:
            named = with_originals(records, snapshot)
            folder = snapshot.folder.removeprefix(f"{records.storage.root}/")
            if named is not snapshot or folder == snapshot.folder:
                records.write_snapshot(run_id, replace(named, folder=folder))

    def write_checkpoint(self, record: CheckpointRecord, url: str) -> None:
        """Write a committed checkpoint at ``url``; the record stays when ``keep_last`` removes the files."""
        name = f"{record.run_id}.{url.rpartition('/')[2]}"
        for records in self.corpora:
            path = url.removeprefix(f"{records.storage.root}/")
            records.write_checkpoint(name, replace(record, path=path))

    def write_end(self, run_id: str, outcome: RunOutcome) -> list[Records]:
        """Write how a run ended, in the corpora that have its start, and return them; a refused run has none."""
        written = []
        for records in self.corpora:
            for started in records.runs():
                if started.run_id == run_id:
                    records.write_run(replace(started, outcome=outcome, finished_at=utc_now()))
                    written.append(records)
        return written
