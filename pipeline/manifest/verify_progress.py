"""Which shards are checked and sound, noted until all are: a verification that was stopped goes on from there.

On this machine, in the user's cache: verify changes nothing in a corpus, which may be read-only or somebody else's.
Shards with differences are not noted, but read again, since their files may have been put right meanwhile.

    verify/<corpus>/<digest of the shard's records>.npz      sizes, and the packed uids
"""

import contextlib
import shutil
import uuid
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from pipeline.corpus.uids import PackedUids
from pipeline.digests import digest_json
from pipeline.storage.scratch import cache_folder
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
    # The uids that the lists give the shard (retries not counted), and those whose image it stores.
    listed_N2: PackedUids = field(default_factory=lambda: _NO_UIDS)
    stored_N2: PackedUids = field(default_factory=lambda: _NO_UIDS)


class VerifyProgress:
    """The sound shards of one corpus. Thread-safe; in a cache that cannot be written none are noted."""

    def __init__(self, root: str) -> None:
        self._folder = cache_folder() / "verify" / digest_json(root)[:16]

    def found(self, records: Mapping[Stage, ShardRecord]) -> ShardFindings | None:
        """Return what was found of a shard under these very records, if it was sound."""
        try:
            with np.load(self._folder / _name(records), allow_pickle=False) as saved:
                files, size = saved["sizes"].tolist()
                return ShardFindings(files, size, [], saved["listed_N2"], saved["stored_N2"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def keep(self, records: Mapping[Stage, ShardRecord], findings: ShardFindings) -> None:
        """Note that a shard was checked, if it is sound."""
        if findings.discrepancies:
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary = self._folder / f".{uuid.uuid4().hex[:12]}.npz"
            np.savez(
                temporary,
                sizes=np.array([findings.files, findings.bytes]),
                listed_N2=findings.listed_N2,
                stored_N2=findings.stored_N2,
            )
            temporary.replace(self._folder / _name(records))

    def forget(self) -> None:
        """Remove what was noted: all shards are checked, or shall be checked anew."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _name(records: Mapping[Stage, ShardRecord]) -> str:
    """Return the name of a shard's file: another one once a record of it, or the file that it names, is another one."""
    commits = {
        stage: [record.path, record.attempt, record.input_digests()] for stage, record in records.items()
    }
    return f"{digest_json(commits)}.npz"
