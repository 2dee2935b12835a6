"""What a verification has found so far, in files: it goes on from there where it is stopped, and holds no uid.

In the user's cache on this machine: verify changes nothing in a corpus, which may be read-only or somebody else's.
32 bytes a sample, until the verification ends. Shards with differences are read again, since their files may have
been put right meanwhile.

    verify/<corpus and selection>/<digest of the shard's records>.json           sizes; a sound shard has it
    verify/<corpus and selection>/<digest of the shard's records>.<kind>.npy     its uids, sorted
"""

import contextlib
import fcntl
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.digests import digest_json
from pipeline.manifest.verify.selection import ShardSelection
from pipeline.shards.uids import PackedUids
from pipeline.storage.scratch import cache_folder, temporary_folder
from schemas.records import ShardRecord
from schemas.stages import Stage

_NO_UIDS = np.empty((0, 2), np.uint64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Discrepancy:
    """One thing that is not as committed: where, and what."""

    path: str
    what: str


@dataclass(slots=True)
class ShardFindings:
    """What the files of one shard, all stages, hold."""

    files: int = 0
    bytes: int = 0
    discrepancies: list[Discrepancy] = field(default_factory=list)
    # By kind: ``listed`` are those that the lists give the shard (retries not counted), ``stored`` those whose image
    # it stores.
    uids: dict[str, PackedUids] = field(default_factory=dict)


class VerifyProgress:
    """The shards of one corpus that are done, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def sizes(self, records: Mapping[Stage, ShardRecord]) -> tuple[int, int] | None:
        """Return files and bytes of a shard that was read under these very records, and was sound."""
        try:
            files, size = json.loads((self._folder / f"{shard_name(records)}.json").read_text())
            return files, size
        except (OSError, ValueError, TypeError):
            return None

    def keep(self, records: Mapping[Stage, ShardRecord], findings: ShardFindings) -> None:
        """Note what a shard holds."""
        name = shard_name(records)
        for kind in ("listed", "stored"):
            uids_N2 = findings.uids.get(kind, _NO_UIDS)
            order = np.lexsort((uids_N2[:, 1], uids_N2[:, 0]))
            # Each word in a row of its own: the first ones are searched in place.
            np.save(self._folder / f"{name}.{kind}.npy", np.ascontiguousarray(uids_N2[order].T))
        if findings.discrepancies:
            return
        # In one step, and last: what a process that is killed here has written is not taken for a whole shard.
        temporary = self._folder / f".{uuid.uuid4().hex[:12]}"
        temporary.write_text(json.dumps([findings.files, findings.bytes]))
        temporary.replace(self._folder / f"{name}.json")

    def uids_2N(self, name: str, kind: str) -> PackedUids:
        """Return the uids of a shard, sorted, by the name of its records; they are read as they are looked at."""
        path = self._folder / f"{name}.{kind}.npy"
        return np.load(path, mmap_mode="r", allow_pickle=False)


@contextlib.contextmanager
def verify_progress(
    root: str, selection: ShardSelection, *, afresh: bool = False
) -> Iterator[VerifyProgress]:
    """Yield what is done of some shards of a corpus; once the block has ended without an error, it is forgotten.

    In a cache that cannot be written, or where another process verifies the same shards, it starts with nothing and
    leaves nothing.

    Args:
        afresh: forget it before, too.
    """
    folder = cache_folder() / "verify" / digest_json([root, repr(selection)])[:16]
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(folder.with_suffix(".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield VerifyProgress(stack.enter_context(temporary_folder()))
            return
        if afresh:
            shutil.rmtree(folder)
            folder.mkdir()
        yield VerifyProgress(folder)
        shutil.rmtree(folder, ignore_errors=True)


def shard_name(records: Mapping[Stage, ShardRecord]) -> str:
    """Return the name of a shard's files: another one once one of its records, or a file that it names, is."""
    commits = {
        stage: [record.path, record.attempt, record.input_digests()] for stage, record in records.items()
    }
    return digest_json(commits)
