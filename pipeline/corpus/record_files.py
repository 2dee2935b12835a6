"""A record's file, read with care: a corpus may be somebody else's, its files damaged, huge, or no files at all."""

import errno
from typing import TypeVar

from pipeline.regular_files import NotRegularFileError
from pipeline.storage.file_info import FileInfo
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError, first_line
from schemas.json_record import Json
from schemas.marks import MarkRecord, MarkSearchRecord
from schemas.records import (
    CheckpointRecord,
    IntakeRecord,
    LostAttemptRecord,
    ModelRecord,
    QuarantineRecord,
    RunRecord,
    ShardRecord,
    SnapshotRecord,
)

R = TypeVar("R", bound=Json)

# An intake's record has some 300 bytes a shard: this is 200,000 shards, two billion images.
_MAX_BYTES = 64 * 2**20
_RETIRED = b"retired "


def parse_record(kind: type[R], path: str, text: bytes) -> R:
    """Return the record in the file ``path`` of a corpus.

    Raises CapfiltError, naming the file, where it is not a record, or not the one of its name.
    """
    try:
        record = kind.from_json(text)
        if not _has_name_of(record, path):
            raise ValueError("it is the record of something else than its name says")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CapfiltError(
            f"{path} is not a record ({first_line(error)}): restore it, or delete it so that its shard is made anew"
        ) from error
    return record


def read_bounded(storage: Storage, info: FileInfo) -> bytes:
    """Return a listed record's text. Raises CapfiltError where it is larger than any record."""
    if info.bytes > _MAX_BYTES:
        raise CapfiltError(
            f"{info.path} is not a record: it has {info.bytes:,} bytes; restore it, or delete it"
        )
    return read_record(storage, info.path)


def read_record(storage: Storage, path: str) -> bytes:
    """Return a record's text. Raises FileNotFoundError, also where a note stands for a record that was retired.

    Raises CapfiltError where the file is not a record.
    """
    text = read_record_file(storage, path)
    if is_retired_note(text):
        raise FileNotFoundError(errno.ENOENT, "its record was retired", path)
    return text


def retired_note(record: ShardRecord) -> bytes:
    """Return what stands in the place of a retired record until its shard is committed anew."""
    return _RETIRED + record.attempt.encode()


def is_retired_note(text: bytes) -> bool:
    """Tell whether a file is such a note."""
    return text.startswith(_RETIRED)


def read_record_file(storage: Storage, path: str) -> bytes:
    """Return the text of a record's file, or the note in its place. Raises as ``read_record`` does."""
    try:
        text = storage.read(path, _MAX_BYTES)
    except NotRegularFileError as error:
        raise CapfiltError(f"{path} is not a record: {error.strerror}; restore it, or delete it") from error
    if len(text) > _MAX_BYTES:
        raise CapfiltError(
            f"{path} is not a record: it has more than {_MAX_BYTES:,} bytes; restore it, or delete it"
        )
    return text


def _has_name_of(record: Json, path: str) -> bool:
    """Tell whether a record's file has the name that it was written under."""
    match record:
        case ShardRecord():
            return path in (record.path, record.retired_path)
        case SnapshotRecord():  # in a run's folder, wherever that is
            return path.endswith(f"/{record.name}")
        case CheckpointRecord():  # its own ``path`` is the checkpoint's
            return path.startswith(f"records/checkpoints/{record.run_id}.")
        case (
            QuarantineRecord()
            | LostAttemptRecord()
            | IntakeRecord()
            | RunRecord()
            | ModelRecord()
            | MarkRecord()
            | MarkSearchRecord()
        ):
            return path == record.path
    raise AssertionError(type(record))
