"""Files that no record refers to: what killed attempts left, found by age and by the records."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from pipeline.records import Records
from pipeline.storage import FileInfo
from schemas.catalog import EMPTY_FOLDER
from schemas.records import STAGE_FOLDERS, ShardRecord

_DELETERS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """One file to remove."""

    path: str
    kind: Literal["orphan", "retired", "temporary", "attempt"]
    bytes: int
    modified: datetime


def find_garbage(records: Records, *, older_than: timedelta, retired: bool = False) -> list[Garbage]:
    """Return the files that nothing needs and that are older than any attempt in flight can be.

    Args:
        older_than: an upload waits for its record at most as long as one attempt takes; a day is plenty.
        retired: also the files of records that a recomputation replaced; the records themselves stay.
    """
    storage = records.storage
    before = datetime.now(UTC) - older_than
    # Files first, records second: whatever is committed in between is then known to be needed.
    files = [info for folder in STAGE_FOLDERS.values() for info in storage.list(folder)]
    others = [info for folder in ("records", "manifest", "checkpoints") for info in storage.list(folder)]
    needed = _outputs(records.shards()) | {
        file.path for intake in records.intakes() for file in intake.shards.values()
    }
    replaced = {file.path for record in records.retired() for file in record.outputs.values()} - needed
    garbage = []
    for info in (*files, *others):
        kind = _kind(info, needed, replaced, is_data=info.path.split("/")[0] in STAGE_FOLDERS.values())
        if kind is not None and info.modified < before and (kind != "retired" or retired):
            garbage.append(Garbage(path=info.path, kind=kind, bytes=info.bytes, modified=info.modified))
    return garbage


def remove(records: Records, garbage: Iterable[Garbage]) -> int:
    """Delete the files; return their bytes."""
    garbage = list(garbage)
    with ThreadPoolExecutor(_DELETERS) as deleters:
        list(deleters.map(lambda file: records.storage.delete(file.path), garbage))
    return sum(file.bytes for file in garbage)


def _outputs(shards: dict[object, ShardRecord]) -> set[str]:
    return {file.path for record in shards.values() for file in record.outputs.values()}


def _kind(info: FileInfo, needed: set[str], replaced: set[str], *, is_data: bool) -> str | None:
    name = info.path.split("/")[-1]
    if name.startswith(".") and name.endswith(".tmp"):
        return "temporary"
    if info.path.startswith("records/attempts/"):
        return "attempt"
    if not is_data or info.path in needed or info.path.split("/")[1] == EMPTY_FOLDER:
        return None
    return "retired" if info.path in replaced else "orphan"
