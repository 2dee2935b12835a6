"""What the corpora's manifests are told of a training: the run, its models, each checkpoint and its snapshot."""

from collections.abc import Sequence
from dataclasses import replace

from pipeline.records import Records
from pipeline.storage import Storage
from schemas.pretrain import DataConfig
from schemas.records import CheckpointRecord, ModelRecord, RunRecord


class Ledger:
    """The manifests of the corpora that a run reads; a folder of others' shards has none."""

    def __init__(self, data: DataConfig) -> None:
        storages = [Storage(path) for path in dict.fromkeys(corpus.path for corpus in data.corpus)]
        self.corpora = [Records(storage) for storage in storages if is_corpus(storage)]

    def begin(self, run: RunRecord, models: Sequence[ModelRecord] = ()) -> None:
        """Note the start of a run, and what it loads."""
        for records in self.corpora:
            records.write_run(run)
            for model in models:
                records.register_model(model)

    def checkpoint(self, record: CheckpointRecord, url: str) -> None:
        """Note a committed checkpoint that lies at ``url``; the row stays when ``keep_last`` removes the files."""
        name = f"{record.run_id}.{url.rpartition('/')[2]}"
        for records in self.corpora:
            path = url.removeprefix(f"{records.storage.root}/")
            records.write_checkpoint(name, replace(record, path=path))

    def started(self, run_id: str) -> RunRecord | None:
        """Return the start of a run, None where it was refused before it began."""
        for records in self.corpora:
            found = [run for run in records.runs() if run.run_id == run_id]
            if found:
                return found[0]
        return None

    def end(self, run: RunRecord) -> None:
        """Note how a run ended."""
        for records in self.corpora:
            records.write_run(run)


def is_corpus(storage: Storage) -> bool:
    """Tell whether a folder is a corpus of ours: it has records."""
    return storage.fs.exists(f"{storage.base}/records")
