"""File systems for the libraries that want fsspec's interface: DuckDB, Arrow, and the globs that users write."""

from datetime import datetime
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from pipeline.storage.file_info import FileInfo
from pipeline.storage.objects.files import ObjectFiles, split_name
from pipeline.storage.objects.stores import SCHEMES


def filesystem_of(url: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a path or URL, and the name that it has there.

    Raises ValueError or ImportError where nothing opens such a URL.
    """
    scheme, is_url, name = url.partition("://")
    if is_url and scheme in SCHEMES:
        return ObjectFileSystem(SCHEMES[scheme]), name.rstrip("/")
    if not is_url:  # fsspec would cut a path at ``::``, which parts the URLs of a chain
        return LocalFileSystem(), LocalFileSystem._strip_protocol(url)
    filesystem, name = fsspec.core.url_to_fs(url)
    return filesystem, name


def is_local(filesystem: AbstractFileSystem) -> bool:
    """Tell whether a file system is this machine's."""
    return isinstance(filesystem, LocalFileSystem)


class ObjectFileSystem(AbstractFileSystem):
    """Buckets as folders, for reading. Names are ``bucket/key``; nothing is cached."""

    cachable = False

    def __init__(self, scheme: str, files: ObjectFiles | None = None) -> None:
        """Open every bucket of a scheme, or one alone."""
        self.protocol = scheme
        self._files = files
        super().__init__()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.partition("://")[2].rstrip("/") if "://" in path else path.rstrip("/")

    def unstrip_protocol(self, name: str) -> str:
        """Return the URL of a name."""
        return f"{self.protocol}://{self._strip_protocol(name)}"

    def _locate(self, path: str) -> tuple[ObjectFiles, str]:
        container, key = split_name(self._strip_protocol(path))
        return self._files or ObjectFiles(self.protocol, container), key

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return name, size and type. Raises FileNotFoundError."""
        name = self._strip_protocol(path)
        files, key = self._locate(path)
        try:
            if key:
                return _described(files.info(key), name)
        except FileNotFoundError:
            if not files.is_folder(key):
                raise
        return _folder(name)

    # fsspec's own take every error for "no": a bucket without credentials would be an absent file.
    def exists(self, path: str, **_: Any) -> bool:
        """Tell whether an object or a folder is there."""
        return self.isfile(path) or self.isdir(path)

    def isfile(self, path: str) -> bool:
        """Tell whether an object is there."""
        files, key = self._locate(path)
        return files.exists(key)

    def isdir(self, path: str) -> bool:
        """Tell whether there are objects below a name."""
        files, key = self._locate(path)
        return files.is_folder(key)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """Return what lies right below a folder. Raises FileNotFoundError."""
        files, key = self._locate(path)
        folders, objects = files.list_folder(key)
        listed = [_folder(f"{files.container}/{folder}") for folder in folders]
        listed += [_described(info, f"{files.container}/{info.path}") for info in objects]
        if not listed:
            listed = [self.info(path)]
        return listed if detail else [entry["name"] for entry in listed]

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **_: Any
    ) -> Any:
        """Return everything below a folder: in one listing, unless only some levels of it are wanted."""
        if maxdepth is not None:
            return super().find(path, maxdepth, withdirs, detail)
        files, key = self._locate(path)
        found = {f"{files.container}/{info.path}": info for info in files.find(key)}
        entries = {name: _described(info, name) for name, info in found.items()}
        if withdirs:
            entries |= {folder: _folder(folder) for name in found for folder in _parents(name, key)}
        return dict(sorted(entries.items())) if detail else sorted(entries)

    def modified(self, path: str) -> datetime:
        """Return when an object was written."""
        return cast(datetime, self.info(path)["LastModified"])

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """Return an object's bytes, or some of them."""
        files, key = self._locate(path)
        if start is None and end is None:
            return files.read(key)
        start = start or 0
        return files.read_range(key, start, (files.info(key).bytes if end is None else end) - start)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> BinaryIO:
        if mode != "rb":
            raise ValueError(f"{path} is opened for reading alone")
        files, key = self._locate(path)
        return files.open(key)


def _described(info: FileInfo, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "size": info.bytes,
        "type": "file",
        "ETag": info.version,
        "LastModified": info.modified,
    }


def _folder(name: str) -> dict[str, Any]:
    return {"name": name.rstrip("/"), "size": 0, "type": "directory"}


def _parents(name: str, key: str) -> list[str]:
    """Return the folders between a key and an object below it, the key itself among them."""
    parts = name.split("/")[:-1]
    first = 1 + len(key.split("/")) if key else 1
    return ["/".join(parts[:count]) for count in range(first, len(parts) + 1)]
