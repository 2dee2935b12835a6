"""Folders of WebDataset shards that others made: looked through once, then known by their bytes.

What a record says of a curated shard (bytes, sha256, samples) is found by reading each tar whole, and kept in
the user's cache: one small file a tar, good for as long as the tar's size and version are the same.
"""

import contextlib
import hashlib
import json
import logging
import os
import tarfile
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.storage import FileInfo, Storage, sha256_file
from schemas.errors import CapfiltError
from schemas.records import OutputFile
from training.index import index_tar

_log = logging.getLogger(__name__)

_READERS = 8
# Of an entry; raise it when other members of a tar count as samples.
_VERSION = 1


def foreign_shards(storage: Storage) -> dict[str, OutputFile]:
    """Return every tar under a folder that holds samples, by its path without ``.tar``.

    Raises CapfiltError where there is no tar, or one cannot be read.
    """
    tars = [info for info in storage.list("") if info.path.endswith(".tar") and info.bytes]
    with ThreadPoolExecutor(_READERS) as readers:
        entries = list(readers.map(lambda info: _entry(storage, info), tars))
    left_out = sum((Counter(entry["left_out"]) for entry in entries), Counter())
    if left_out:
        reasons = ", ".join(f"{count:,} with {reason}" for reason, count in sorted(left_out.items()))
        _log.warning("%s: samples left out: %s", storage.root, reasons)
    return {
        info.path.removesuffix(".tar"): OutputFile(
            path=info.path, bytes=info.bytes, sha256=entry["sha256"], rows=entry["samples"]
        )
        for info, entry in zip(tars, entries, strict=True)
        if entry["samples"]
    }


def _entry(storage: Storage, info: FileInfo) -> dict:
    """Return what is known of a tar, reading it only if it is not known yet."""
    signature = [_VERSION, storage.url(info.path), info.bytes, info.version]
    path = _cache_folder() / f"{hashlib.sha256(json.dumps(signature).encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_bytes())
    with storage.local_copy(info.path) as local:
        try:
            index = index_tar(local)
        except tarfile.ReadError as error:
            raise CapfiltError(
                f"{storage.url(info.path)} is no readable tar ({error}); mend it or take it out of the folder"
            ) from error
        entry = {"sha256": sha256_file(local), "samples": len(index.keys), "left_out": index.left_out}
    _keep(path, json.dumps(entry).encode())
    return entry


def _keep(path: Path, data: bytes) -> None:
    """Write in one step; where the cache cannot be written, the tar is read again next time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{uuid.uuid4().hex[:8]}.tmp")
        temporary.write_bytes(data)
        temporary.replace(path)


def _cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "capfilt" / "shards"
