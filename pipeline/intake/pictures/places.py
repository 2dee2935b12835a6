"""Where a picture lies: its URL, made from the names of the input folder and the file, and back.

``webdataset:pets/a/000.tar#cat 1`` is the sample ``cat 1`` of the file ``a/000.tar`` in the input folder ``pets``. The
folder's own path is not part of it: a data set that is moved, to a bucket too, keeps its URLs and so its uids.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote_from_bytes, unquote_to_bytes

from fsspec.utils import glob_translate

from pipeline.storage.file_info import FileInfo
from pipeline.storage.filesystem import filesystem_of
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.names import is_hidden, shown

# What an entry of a list begins with if it is a URL and not a path.
SCHEME = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*:")
_MAGIC = re.compile(r"[*?\[]")
# Left as they are, so that a URL can be read: everything printable but what has a meaning in it.
_PLAIN = bytes(set(range(0x20, 0x7F)) - set(b'%#"<>')).decode()
_NOT_ASCII = re.compile(r"[^\0-\x7f]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a picture is: a file, by its input ``folder`` and its path ``relative`` to it, and the ``item`` in it."""

    folder: str
    relative: str
    item: str = ""

    def url(self, form: str) -> str:
        """Return the picture's URL."""
        place = f"{form}:{_quoted(self.folder)}/{_quoted(self.relative)}"
        return f"{place}#{_quoted(self.item)}" if self.item else place


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile(Place):
    """A file of a source, with its size and version; the path of ``info`` is relative too."""

    info: FileInfo

    def version(self, form: str) -> FileInfo:
        """Return size and version under a name that does not change where the folder is moved."""
        return self.info._replace(path=self.url(form))


def parse_place(url: str) -> Place:
    """Take a picture's URL apart. Raises ValueError where its path leads out of the input folder."""
    quoted, _, item = url.partition(":")[2].partition("#")
    path = _unquoted(quoted)
    folder, _, relative = path.partition("/")
    if not folder or "\0" in path or {"", ".", ".."} & set(relative.split("/")):
        raise ValueError(f"{url} does not name a file inside a folder")
    return Place(folder=folder, relative=relative, item=_unquoted(item))


class InputFolders:
    """The folders that the ``input`` of a source names, by their last name.

    An input is a folder, a file (whose folder it is then) or a glob (the part before its first wildcard).

    Args:
        inputs: absolute paths or URLs.
        key: the config's key, for messages.

    Raises:
        CapfiltError: two folders have the same name, or a file system cannot be used.
    """

    def __init__(self, inputs: Sequence[str], key: str) -> None:
        self._key = key
        self._names: dict[str, str] = {}
        self._folders: dict[str, str] = {}
        self._listed: dict[str, list[InputFile]] = {}
        for pattern in inputs:
            folder = self._folder_of(pattern)
            name = self._names[pattern] = folder.rstrip("/").rpartition("/")[2]
            if not name:
                raise CapfiltError(f"{key}: {pattern} has no folder with a name; put the files into one")
            if self._folders.setdefault(name, folder) != folder:
                raise CapfiltError(
                    f"{key}: {self._folders[name]} and {folder} are both called {name!r}, and a picture is named after "
                    "its folder; rename one, or make two sources"
                )

    def is_folder(self, pattern: str) -> bool:
        """Tell whether an input is a folder, whole."""
        fs, path = filesystem_of(pattern)
        return bool(path.rstrip("/") == fs._strip_protocol(self._folders[self._names[pattern]]))

    def url_of(self, place: Place) -> str:
        """Return the path or URL of a place's file. Raises KeyError: the source has no such folder."""
        return f"{self._folders[place.folder]}/{place.relative}"

    def files(self, pattern: str) -> list[InputFile]:
        """Return the files of one input, sorted by path: all below a folder, or those that the glob matches.

        Raises CapfiltError where there is nothing.
        """
        files = self.files_around(pattern)
        if not self.is_folder(pattern):
            fs, path = filesystem_of(pattern)
            base = fs._strip_protocol(self._folders[self._names[pattern]])
            matches = re.compile(glob_translate(path)).fullmatch
            files = [file for file in files if matches(f"{base}/{file.relative}")]
        if not files:
            raise CapfiltError(f"{self._key}: no file in {pattern}")
        return files

    def files_around(self, pattern: str) -> list[InputFile]:
        """Return all files below the folder of one input but hidden ones, sorted by path; listed once."""
        name = self._names[pattern]
        if name not in self._listed:
            try:
                infos = Storage(self._folders[name]).list("")
            except (OSError, ValueError) as error:
                raise CapfiltError(f"{self._key}: {pattern} cannot be listed: {error}") from error
            self._listed[name] = [
                InputFile(folder=name, relative=info.path, info=info)
                for info in infos
                if not is_hidden(info.path)
            ]
        return self._listed[name]

    def _folder_of(self, pattern: str) -> str:
        try:
            fs, path = filesystem_of(pattern)
            if _MAGIC.search(path):
                path = path[: _MAGIC.search(path).start()].rpartition("/")[0]  # type: ignore[union-attr]
            elif not fs.isdir(path):
                if not fs.exists(path):
                    raise CapfiltError(f"{self._key}: {shown(pattern)} is not there")
                path = path.rpartition("/")[0]
        except (OSError, ValueError, ImportError) as error:
            raise CapfiltError(f"{self._key}: {pattern} cannot be listed: {error}") from error
        return str(fs.unstrip_protocol(path)) if "://" in pattern else path


def _quoted(text: str) -> str:
    """Escape what would not survive in a URL that people read: %, #, quotes, control characters, bytes not UTF-8."""
    return "".join(
        part if _NOT_ASCII.fullmatch(part) and _is_text(part) else quote_from_bytes(os.fsencode(part), _PLAIN)
        for part in re.split(r"([^\0-\x7f]+)", text)
    )


def _is_text(part: str) -> bool:
    return part.isprintable() and not any("\ud800" <= letter <= "\udfff" for letter in part)


def _unquoted(text: str) -> str:
    return os.fsdecode(unquote_to_bytes(text))
