"""Folders of WebDataset shards from other programs: each tar is indexed once, then identified by its bytes.

What the record of a curated shard contains (bytes, sha256, samples) is found by reading each tar, and stored in the
user's cache: one small file for each tar, valid while the tar's size and version are the same.
"""

import contextlib
import hashlib
import json
import logging
import tarfile
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

from pipeline.digests import sha256_file
from pipeline.storage.file_info import FileInfo
from pipeline.storage.scratch import cache_folder, free_scratch
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.names import is_hidden, printable
from schemas.records import OutputFile
from training.data.shard_index import index_tar

_log = logging.getLogger(__name__)

_READERS = 8
# Of an entry; to be raised when the rule for samples or the content of an entry changes.
_VERSION = 2
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}
_FOLLOWS = {
    "nothing": "have no end mark and may have been cut: samples may be missing",
    "more": "continue after their end mark, as concatenated tars do: only the first one is read",
}
_NAMED = 3


class _Entry(TypedDict):
    """What the cache holds of a tar."""

    sha256: str
    samples: int
    left_out: dict[str, int]
    follows: str


def webdataset_shards(storage: Storage) -> dict[str, OutputFile]:
    """Return every tar under a folder that holds samples, by its path without ``.tar``.

    Raises CapfiltError where there is no tar, or one cannot be read.
    """
    files = storage.list("")
    visible = (info for info in files if not is_hidden(info.path, by_folder=False))
    tars = [info for info in visible if info.path.endswith(".tar") and info.bytes]
    if compressed := [info.path for info in files if info.path.endswith(_COMPRESSED)]:
        example = printable(compressed[0])
        message = f"{storage.root}: {len(compressed):,} compressed tars cannot be read, such as {example}"
        if not tars:
            raise CapfiltError(f"{message}: decompress them (gunzip, unzstd) to plain .tar")
        _log.warning("%s and are left out", message)
    with ThreadPoolExecutor(_READERS) as readers:
        entries = list(readers.map(lambda info: _entry(storage, info), tars))
    left_out = sum((Counter(entry["left_out"]) for entry in entries), Counter())
    if left_out:
        reasons = ", ".join(f"{count:,} with {reason}" for reason, count in sorted(left_out.items()))
        _log.warning("%s: samples left out: %s", storage.root, reasons)
    for follows, what in _FOLLOWS.items():
        names = [info.path for info, entry in zip(tars, entries, strict=True) if entry["follows"] == follows]
        if names:
            more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
            named = ", ".join(map(printable, names[:_NAMED]))
            _log.warning("%s: tars that %s: %s%s", storage.root, what, named, more)
    return {
        info.path.removesuffix(".tar"): OutputFile(
            path=info.path, bytes=info.bytes, sha256=entry["sha256"], rows=entry["samples"]
        )
        for info, entry in zip(tars, entries, strict=True)
        if entry["samples"]
    }


def _entry(storage: Storage, info: FileInfo) -> _Entry:
    """Return the entry of a tar, from the cache or by reading the tar."""
    signature = [_VERSION, storage.url(info.path), info.bytes, info.version]
    cache = cache_folder() / "shards"
    name = f"{hashlib.sha256(json.dumps(signature).encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads((cache / name).read_bytes())
    if not storage.is_local and info.bytes > (free := free_scratch()):
        raise CapfiltError(
            f"{storage.url(info.path)} has {info.bytes / 1e9:,.1f} GB, and a remote tar is copied whole before its "
            f"samples are read: {tempfile.gettempdir()} has {free / 1e9:,.1f} GB free. Split it into tars of some "
            "thousand samples (webdataset.ShardWriter writes such), or let TMPDIR name a larger disk"
        )
    with storage.local_copy(info.path) as local:
        try:
            index = index_tar(local)
        except tarfile.ReadError as error:
            raise CapfiltError(
                f"{storage.url(info.path)} is not a readable tar ({_why(local, error)}); repair it or take it out "
                "of the folder"
            ) from error
        if index.follows == "damage":
            raise CapfiltError(
                f"{storage.url(info.path)} is damaged after its sample number {len(index.keys):,}: what follows "
                "is not the header of a member; repair it or take it out of the folder"
            )
        entry = _Entry(
            sha256=sha256_file(local), samples=len(index.keys), left_out=index.left_out, follows=index.follows
        )
    # If the cache cannot be written, the tar is read again next time.
    with contextlib.suppress(OSError):
        Storage(str(cache)).write(name, json.dumps(entry).encode())
    return entry


def _why(local: Path, error: Exception) -> str:
    with local.open("rb") as file:
        begin = file.read(8)
    kinds = [kind for magic, kind in _MAGIC.items() if begin.startswith(magic)]
    return f"it is compressed by {kinds[0]}: decompress it to a plain tar" if kinds else printable(str(error))
