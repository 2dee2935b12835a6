"""The checkpoints in a run's folder as files: their records, and what these commit, checked; nothing is loaded.

<run folder>/step-00001000.<attempt>/           the files
<run folder>/step-00001000.<attempt>.json       the record: it commits the folder, and has each file's sha256

A run's folder may come from somebody else: a record counts only if it is that of the folder beside it and names files
in that folder; no other file of it is read.
"""

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.corpus.record_files import read_bounded
from pipeline.digests import sha256_file
from pipeline.regular_files import NotRegularFileError
from pipeline.storage.file_info import FileInfo
from pipeline.storage.scratch import temporary_folder
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.names import is_one_part
from schemas.pretrain import PretrainConfig, stage_folder
from schemas.records import CheckpointRecord

CHECKPOINT_FOLDER = re.compile(r"step-\d{8,}\.[0-9a-f]{12}")


class DamagedCheckpointError(CapfiltError):
    """Report a checkpoint whose files are not those of its record."""


class SavedCheckpoints:
    """The checkpoints in one run's folder, on local disk or S3, for reading."""

    def __init__(self, folder: str) -> None:
        self.storage = Storage(folder)

    def committed(self) -> list[CheckpointRecord]:
        """Return the records of the checkpoints that are there, oldest first."""
        records = [_record(self.storage, info) for info in self.storage.list("") if _is_record(info.path)]
        return sorted(records, key=lambda record: (record.step, record.created_at))

    def newest_good(self, log: Callable[[str], None]) -> CheckpointRecord | None:
        """Return the newest checkpoint whose files are those of its record; each damaged one is logged and passed over.

        Raises CapfiltError where there are checkpoints and all are damaged: training anew under the same name
        would hide that.
        """
        records = self.committed()
        for record in reversed(records):
            try:
                with self.checked_files(record):
                    return record
            except DamagedCheckpointError as error:
                log(f"{error}; taking the one before")
        if records:
            raise CapfiltError(
                f"{self.storage.root}: each of its {len(records)} checkpoints is damaged; begin anew under another "
                "run.name"
            )
        return None

    @contextlib.contextmanager
    def checked_files(self, record: CheckpointRecord) -> Iterator[Path]:
        """Yield a local folder with the checkpoint's files, each compared with the record.

        Raises DamagedCheckpointError.
        """
        is_local = self.storage.is_local
        own_folder = contextlib.nullcontext(Path(self.storage.url(record.path)))
        with own_folder if is_local else temporary_folder() as folder:
            for name, digest in record.sha256.items():
                path = f"{record.path}/{name}"
                try:
                    if not is_local:
                        with self.storage.local_copy(path) as copy:
                            shutil.move(copy, folder / name)
                    actual = sha256_file(folder / name)
                except NotRegularFileError as error:
                    raise DamagedCheckpointError(f"{self.storage.url(path)}: {error.strerror}") from None
                except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                    raise DamagedCheckpointError(f"{self.storage.url(path)} is missing") from None
                if actual != digest:
                    raise DamagedCheckpointError(
                        f"{self.storage.url(path)} has another sha256 than its record"
                    )
            yield folder


def run_folder(config: PretrainConfig) -> str:
    """Return the folder or URL of a run's checkpoints and metrics."""
    root = config.run.output
    if not root:
        corpus = Storage(config.data.corpus[0].path)
        if not corpus.is_corpus():
            if not corpus.is_there():
                raise CapfiltError(
                    f"data.corpus: {corpus.root} is not there; set data.corpus.path to a corpus"
                )
            raise CapfiltError(
                f"run.output: not set, and the first of data.corpus ({corpus.root}) is not a corpus that "
                "checkpoints could be stored in; set run.output"
            )
        root = f"{corpus.root}/checkpoints"
    return f"{root}/{stage_folder(config.run.stage)}/{config.run.name}"


def newest_step(config: PretrainConfig) -> int:
    """Return the step of a run's newest checkpoint; 0 before the first."""
    records = SavedCheckpoints(run_folder(config)).committed()
    return records[-1].step if records else 0


def find_checkpoint(path: str) -> tuple[SavedCheckpoints, CheckpointRecord]:
    """Return a checkpoint by its record's path (``.../step-00001000.<attempt>.json``), its folder's or its run's.

    Of a run, the newest good one. Raises CapfiltError where there is none.
    """
    name = path.rstrip("/").removesuffix(".json")
    folder, _, last = name.rpartition("/")
    if not CHECKPOINT_FOLDER.fullmatch(last):
        run = SavedCheckpoints(name)
        newest = run.newest_good(lambda _: None)
        checkpoints = [newest] if newest else []
    else:
        run = SavedCheckpoints(folder or ".")
        checkpoints = [record for record in run.committed() if record.path == last]
    if not checkpoints:
        raise CapfiltError(
            f"{path}: no checkpoint there; name a run's folder, or one of its step-... records"
        )
    return run, checkpoints[0]


def _is_record(path: str) -> bool:
    return path.endswith(".json") and CHECKPOINT_FOLDER.fullmatch(path.removesuffix(".json")) is not None


def _record(storage: Storage, info: FileInfo) -> CheckpointRecord:
    """Read a checkpoint's record. Raises CapfiltError where it is not the record of the folder beside it."""
    text = read_bounded(storage, info)
    try:
        record = CheckpointRecord.from_json(text)
        if f"{record.path}.json" != info.path:
            raise ValueError(f"path: {record.path[:200]!r} is not the folder beside it")
        for name in record.sha256:
            if not is_one_part(name):
                raise ValueError(f"sha256: {name[:200]!r} is not a file of its folder")
    except ValueError as error:
        raise CapfiltError(
            f"{storage.url(info.path)} is not a checkpoint's record ({error}); nothing was read: restore it, or "
            "delete it and its folder"
        ) from error
    return record
