"""Orphan files: files that no record refers to, such as those of killed workers. Found by age and by the records."""

import contextlib
import functools
import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from pipeline.corpus.corpus_state import CompactedShards, committed_shards, none_compacted
from pipeline.corpus.living_workers import AT_WORK_FOLDER
from pipeline.corpus.record_files import parse_record, read_record
from pipeline.corpus.records import Records
from pipeline.storage.file_info import FileInfo
from pipeline.storage.storage import Storage
from schemas.catalog.corpus_files import EMPTY_FOLDER
from schemas.records import ShardRecord, shard_record_path
from schemas.stages import STAGE_FOLDERS

_log = logging.getLogger(__name__)

_DELETERS = 32
_STAGES = {folder: stage for stage, folder in STAGE_FOLDERS.items()}


Kind = Literal["orphan", "retired", "temporary", "attempt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OrphanFile:
    """One file to remove."""

    path: str
    kind: Kind
    bytes: int
    modified: datetime


def find_orphans(
    records: Records,
    *,
    older_than: timedelta,
    retired: bool = False,
    compacted: CompactedShards = none_compacted,
) -> list[OrphanFile]:
    """Return the files that nothing needs and that are older than any commit under way can be.

    Args:
        older_than: an upload waits for its record at most as long as its shard takes; a day is plenty.
        retired: also the files of records that a recomputation replaced; the records themselves stay.
        compacted: see ``CorpusState``.
    """
    storage = records.storage
    before = datetime.now(UTC) - older_than
    # Files first, records second: whatever is committed in between is then known to be needed.
    files = [info for folder in STAGE_FOLDERS.values() for info in storage.list(folder)]
    others = [info for folder in ("records", "manifest", "checkpoints") for info in storage.list(folder)]
    needed = _outputs(committed_shards(records, records.list_shards(), compacted).values()) | {
        file.path for intake in records.intakes() for file in intake.shards.values()
    }
    replaced = _outputs(records.retired()) - needed
    orphans = []
    behind_links = _behind_links(storage, (*files, *others))
    if behind_links:
        _log.warning(
            "%s: %d links, or files behind links that lead out of it, are left alone",
            storage.root,
            len(behind_links),
        )
    for info in (*files, *others):
        if info.path in behind_links:
            continue
        kind = _kind(info, needed, replaced, is_data=info.path.split("/")[0] in STAGE_FOLDERS.values())
        if kind is not None and info.modified < before and (kind != "retired" or retired):
            orphans.append(OrphanFile(path=info.path, kind=kind, bytes=info.bytes, modified=info.modified))
    return orphans


def _behind_links(storage: Storage, files: Iterable[FileInfo]) -> set[str]:
    """Return links, and files that a linked folder makes seem to lie in the corpus: capfilt makes neither."""
    if not storage.is_local:
        return set()
    root = os.path.realpath(storage.root)
    inside = functools.cache(lambda folder: f"{os.path.realpath(f'{root}/{folder}')}/".startswith(f"{root}/"))
    return {
        info.path
        for info in files
        if not inside(info.path.rpartition("/")[0]) or Path(root, info.path).is_symlink()
    }


def remove(records: Records, orphans: Iterable[OrphanFile]) -> list[OrphanFile]:
    """Delete the files; return those that went.

    The records are asked once more, file by file: a listing that missed one would cost committed data.
    """

    def delete(file: OrphanFile) -> bool:
        if file.kind in ("orphan", "retired") and _is_needed(records, file):
            return False
        records.storage.delete(file.path)
        return True

    orphans = list(orphans)
    with ThreadPoolExecutor(_DELETERS) as deleters:
        return [file for file, gone in zip(orphans, deleters.map(delete, orphans), strict=True) if gone]


def _is_needed(records: Records, file: OrphanFile) -> bool:
    """Tell whether a record of the file's own shard names it: the committed one; of an orphan, a retired one too."""
    if file.path.count("/") != 2:
        return False  # no stage writes there
    folder, source, name = file.path.split("/")
    shard, *rest = name.split(".")
    if folder == STAGE_FOLDERS["urls"]:
        batches = (batch.shards for batch in records.intakes(source))
        return any(shard in shards and shards[shard].path == file.path for shards in batches)
    stage = _STAGES[folder]
    paths = [shard_record_path(stage, source, shard)]
    if file.kind == "orphan" and len(rest) > 1:
        paths.append(f"records/retired/{stage}/{source}/{shard}.{rest[0]}.json")
    elif file.kind == "orphan":  # a curated file: its name is the shard's alone, whatever the commit
        retired = records.storage.list(f"records/retired/{stage}/{source}")
        paths += [info.path for info in retired if info.path.split("/")[-1].startswith(f"{shard}.")]
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            record = parse_record(ShardRecord, path, read_record(records.storage, path))
            if file.path in _outputs([record]):
                return True
    return False


def _outputs(records: Iterable[ShardRecord]) -> set[str]:
    return {file.path for record in records for file in record.outputs.values()}


def _kind(info: FileInfo, needed: set[str], replaced: set[str], *, is_data: bool) -> Kind | None:
    name = info.path.split("/")[-1]
    if name.startswith(".") and name.endswith(".tmp"):
        return "temporary"
    if info.path.startswith(("records/attempts/", f"{AT_WORK_FOLDER}/")):
        return "attempt"
    if not is_data or info.path in needed or info.path.split("/")[1] == EMPTY_FOLDER:
        return None
    return "retired" if info.path in replaced else "orphan"
