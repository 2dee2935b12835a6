"""Files that fsspec opens besides: https, the Hugging Face hub and others. Lists and tars are read there."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, cast

from fsspec.spec import AbstractFileSystem

from pipeline.storage.file_info import FileInfo


class OtherFiles:
    """The files of one fsspec file system by their names in it. Raises OSError."""

    is_local = False
    takes_commits = False

    def __init__(self, filesystem: AbstractFileSystem) -> None:
        self._filesystem = filesystem

    def url(self, name: str) -> str:
        """Return the URL of a name."""
        return str(self._filesystem.unstrip_protocol(name))

    def exists(self, name: str) -> bool:
        """Tell whether a file or folder is there."""
        return bool(self._filesystem.exists(name))

    def is_folder(self, name: str) -> bool:
        """Tell whether a folder is there."""
        return bool(self._filesystem.isdir(name))

    def info(self, name: str) -> FileInfo:
        """Return size and version of one file."""
        return _info(self._filesystem.info(name))

    def find(self, name: str) -> list[FileInfo]:
        """Return all files below a folder."""
        self._filesystem.invalidate_cache()
        return [_info(info) for info in self._filesystem.find(name, detail=True).values()]

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """Return a file whole, or its first ``max_bytes`` and one."""
        end = {} if max_bytes is None else {"end": max_bytes + 1}
        return cast(bytes, self._filesystem.cat_file(name, **end))

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """Return ``size`` bytes from ``start`` on, fewer where the file ends."""
        return cast(bytes, self._filesystem.cat_file(name, start=start, end=start + size))

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading."""
        return cast(BinaryIO, self._filesystem.open(name, "rb"))

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file to local disk."""
        self._filesystem.get_file(name, str(target))

    def put(self, local: Path, name: str) -> None:
        """Upload a finished file."""
        self._filesystem.put_file(str(local), name)

    def write(self, name: str, data: bytes) -> None:
        """Upload bytes."""
        self._filesystem.pipe_file(name, data)

    def create(self, name: str, data: bytes) -> bool:
        """Refuse: nothing is known of how many writers would win."""
        raise NotImplementedError(f"{self.url(name)}: create-if-absent is not known to hold there")

    def swap(self, name: str, old: bytes, new: bytes) -> bool:
        """Refuse, as ``create`` does."""
        raise NotImplementedError(f"{self.url(name)}: a conditional put is not known to hold there")

    def delete(self, name: str) -> None:
        """Remove a file."""
        self._filesystem.rm_file(name)


def _info(info: dict[str, Any]) -> FileInfo:
    modified = (
        info.get("LastModified") or info.get("mtime") or info.get("updated") or info.get("created") or 0
    )
    if isinstance(modified, str):
        modified = datetime.fromisoformat(modified)
    if not isinstance(modified, datetime):
        modified = datetime.fromtimestamp(modified, UTC)
    version = str(info.get("ETag") or info.get("etag") or info.get("mtime") or modified.timestamp())
    return FileInfo(path=info["name"], bytes=info["size"], version=version.strip('"'), modified=modified)
