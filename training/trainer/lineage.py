"""What the corpora's manifests are told of a training: the run, each checkpoint and its snapshot."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from pipeline.corpus.records import Records
from pipeline.corpus.storage import Storage
from schemas.json_record import utc_now
from schemas.pretrain import DataConfig
from schemas.records import CheckpointRecord, ModelRecord, RunOutcome, RunRecord


class LineageWriter:
    """The manifests of the corpora that a run reads; others' shards have none, nor has what is only served (HTTP)."""

    def __init__(self, data: DataConfig) -> None:
        storages = [Storage(path) for path in dict.fromkeys(corpus.path for corpus in data.corpus)]
        self.corpora = [
            Records(storage) for storage in storages if storage.takes_commits and storage.is_corpus()
        ]

    def begin(self, run: RunRecord, models: Iterable[ModelRecord], tell: Callable[[str], None]) -> None:
        """Note the start of a run and its models. A corpus that may only be read is told, and gets no rows."""
        for records in list(self.corpora):
            try:
                records.write_run(run)
                for model in models:
                    records.register_model(model)
            except OSError as error:
                self.corpora.remove(records)
                tell(f"{records.storage.root} takes no rows ({error}): the run will not be in its manifest")

    def checkpoint(self, record: CheckpointRecord, url: str) -> None:
        """Note a committed checkpoint that lies at ``url``; the row stays when ``keep_last`` removes the files."""
        name = f"{record.run_id}.{url.rpartition('/')[2]}"
        for records in self.corpora:
            path = url.removeprefix(f"{records.storage.root}/")
            records.write_checkpoint(name, replace(record, path=path))

    def end(self, run_id: str, outcome: RunOutcome) -> list[Records]:
        """Note how a run ended, in the manifests that have its start, and return them; a refused run began in none."""
        noted = []
        for records in self.corpora:
            for started in records.runs():
                if started.run_id == run_id:
                    records.write_run(replace(started, outcome=outcome, finished_at=utc_now()))
                    noted.append(records)
        return noted
