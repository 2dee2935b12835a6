"""What a path, glob or URL is that somebody wants a corpus of: a list, images, tars, or a folder of one of these.

Looks at names and at the beginnings of files; reads no list through and decodes no image.
"""

import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from fsspec.spec import AbstractFileSystem

from pipeline.intake.lists.files import LIST_SUFFIXES, PACKED_SUFFIXES
from pipeline.intake.lists.preview import ListPreview, preview_list
from pipeline.intake.pictures.folder import METADATA_FILES, PICTURE_EXTENSIONS
from pipeline.intake.pictures.tars import COMPRESSED_TARS
from pipeline.storage.filesystem import filesystem_of, is_local
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError, did_you_mean, first_line
from schemas.names import is_hidden

Kind = Literal["list", "imagefolder", "webdataset", "huggingface", "img2dataset"]

KIND_NAMES: dict[Kind, str] = {
    "list": "a list of URLs",
    "imagefolder": "images",
    "webdataset": "tars of a WebDataset",
    "huggingface": "a dataset with images in it",
    "img2dataset": "shards of img2dataset",
}
# In a folder they may as well be captions, licences and settings.
_WEAK_LIST_SUFFIXES = (".txt", ".json")
_LIST_SUFFIXES = LIST_SUFFIXES.keys() - set(_WEAK_LIST_SUFFIXES)
# Beyond so many files a folder is described by those that were seen.
_MOST_FILES = 1_000_000
_SUFFIXES_NAMED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class RecognisedInput:
    """One argument, recognised.

    Attributes:
        inputs: what the config's ``input`` holds: absolute paths, globs or URLs.
        files: those of the kind, absolute paths or URLs.
        suffixes: how often each ending occurs, of images among these, else among all files.
        captions: how many images have a text beside them.
        metadata: the metadata file of a folder of images.
        preview: the beginning of the first list or Parquet file.
    """

    kind: Kind
    inputs: tuple[str, ...]
    files: tuple[str, ...]
    suffixes: Counter[str]
    captions: int = 0
    metadata: str = ""
    preview: ListPreview | None = None


def recognise(argument: str, storage: Storage) -> RecognisedInput:
    """Return what an argument is. Raises CapfiltError: not there, empty, unreadable, or of two kinds."""
    is_url = "://" in argument
    place = argument if is_url else os.path.normpath(Path(argument).expanduser().absolute())
    try:
        fs, path = filesystem_of(place)
        is_folder, is_file = fs.isdir(path), fs.isfile(path)
        if is_folder:
            names = _files_below(fs, path)
        else:
            names = [path] if is_file else sorted(match for match in fs.glob(path) if fs.isfile(match))
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise CapfiltError(f"{argument}: cannot be read: {first_line(error)}") from error
    if not names and not is_folder:
        raise CapfiltError(f"{argument}: no such file or folder{_nearest(argument, fs, path)}")
    files = [fs.unstrip_protocol(name) if is_url else name for name in names]
    if is_folder and any("/records/crawl/" in name for name in files):
        raise CapfiltError(
            f"{argument}: is a corpus already; `capfilt status {argument}` shows what it holds"
        )
    return _recognise_files(argument, place, files, is_folder, storage)


def _files_below(fs: AbstractFileSystem, path: str) -> list[str]:
    """Return the files of a folder and those below, hidden ones left out."""
    if not is_local(fs):
        return [
            name for name in fs.find(path)[:_MOST_FILES] if not is_hidden(name.removeprefix(path).lstrip("/"))
        ]
    files: list[str] = []

    def raise_error(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(path, onerror=raise_error):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        files += [f"{folder}/{name}" for name in sorted(names) if not is_hidden(name)]
        if len(files) > _MOST_FILES:
            break
    return files


def _recognise_files(
    argument: str, place: str, files: Sequence[str], is_folder: bool, storage: Storage
) -> RecognisedInput:
    recognised = RecognisedInput(
        kind="list", inputs=(place,), files=(), suffixes=Counter(map(_suffix, files))
    )
    images = [name for name in files if _suffix(name).removeprefix(".") in PICTURE_EXTENSIONS]
    tars = [name for name in files if name.lower().endswith((".tar", *COMPRESSED_TARS))]
    arrow = [name for name in files if _suffix(name) == ".arrow"]
    present = {"images": images, "tars": tars, "Arrow files": arrow}
    if sum(map(bool, present.values())) > 1:
        counts = " and ".join(f"{name} ({len(members):,})" for name, members in present.items() if members)
        raise CapfiltError(
            f"{argument}: holds {counts}; name one kind: its folder, or a glob such as '*.tar'"
        )
    if tars:
        return _recognise_tars(recognised, tars, set(files) if is_folder else set())
    if images:
        metadata = next((name for name in files if name.rpartition("/")[2] in METADATA_FILES), "")
        texts = {name for name in files if _suffix(name) == ".txt"}
        beside = sum(f"{name.rpartition('.')[0]}.txt" in texts for name in images)
        return replace(
            recognised,
            kind="imagefolder",
            files=tuple(images),
            suffixes=Counter(map(_suffix, images)),
            captions=beside,
            metadata=metadata,
        )
    if arrow:
        return replace(recognised, kind="huggingface", files=tuple(arrow))
    lists = [name for name in files if _is_list(name, _LIST_SUFFIXES)]
    lists = lists or [name for name in files if _is_list(name, _WEAK_LIST_SUFFIXES)]
    if not lists and len(files) == 1 and not is_folder:
        lists = list(files)  # its reader says what is wrong with it
    if not lists:
        raise CapfiltError(f"{argument}: {_nothing(recognised.suffixes)}")
    return _recognise_lists(argument, recognised, lists, is_folder, storage)


def _recognise_tars(
    recognised: RecognisedInput, tars: Sequence[str], beside: Collection[str]
) -> RecognisedInput:
    """Return tars as img2dataset's shards where each has its Parquet ``beside``, else as a WebDataset."""
    if all(f"{name.removesuffix('.tar')}.parquet" in beside for name in tars):
        folders = tuple(dict.fromkeys(name.rpartition("/")[0] for name in tars))
        return replace(recognised, kind="img2dataset", inputs=folders, files=tuple(tars))
    return replace(recognised, kind="webdataset", files=tuple(tars))


def _recognise_lists(
    argument: str, recognised: RecognisedInput, lists: Sequence[str], is_folder: bool, storage: Storage
) -> RecognisedInput:
    place = recognised.inputs[0].rstrip("/")
    endings = dict.fromkeys(_list_suffix(name) for name in lists)
    formats = {_unpacked(ending) for ending in endings}
    if len(formats) > 1:
        kinds = " and ".join(sorted(formats))
        raise CapfiltError(
            f"{argument}: holds lists of several formats ({kinds}); name one: '{place}/*{min(formats)}'"
        )
    preview = preview_list(storage, lists[0])
    recognised = replace(recognised, files=tuple(lists), preview=preview)
    if preview.image_names:
        return replace(recognised, kind="huggingface")
    if not is_folder:
        return recognised
    deep = "" if all(name.rpartition("/")[0] == place for name in lists) else "**/"
    return replace(recognised, inputs=tuple(f"{place}/{deep}*{ending}" for ending in endings))


def described_suffixes(suffixes: Counter[str]) -> str:
    """Return the commonest endings with how often each occurs: ``.jpg 180, .png 20``."""
    named = [f"{suffix or 'no ending'} {count:,}" for suffix, count in suffixes.most_common(_SUFFIXES_NAMED)]
    return ", ".join(named) + (", ..." if len(suffixes) > _SUFFIXES_NAMED else "")


def _nothing(suffixes: Counter[str]) -> str:
    wanted = "no image, tar, Parquet file or list of URLs in it"
    return f"{wanted} ({described_suffixes(suffixes)})" if suffixes else f"the folder is empty: {wanted}"


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _unpacked(name: str) -> str:
    lower = name.lower()
    return next((lower.removesuffix(packed) for packed in PACKED_SUFFIXES if lower.endswith(packed)), lower)


def _is_list(name: str, suffixes: Collection[str]) -> bool:
    return _suffix(_unpacked(name)) in suffixes


def _list_suffix(name: str) -> str:
    """Return a list's ending as it is written, with that of its compression: ``.CSV.gz``."""
    path = PurePosixPath(name)
    return "".join(path.suffixes[-2:]) if path.suffix.lower() in PACKED_SUFFIXES else path.suffix


def _nearest(argument: str, fs: AbstractFileSystem, path: str) -> str:
    if not is_local(fs):
        return ""
    folder, _, name = path.rpartition("/")
    try:
        near = [entry.name for entry in Path(folder or "/").iterdir()]
    except OSError:
        return ""
    return did_you_mean(name, near)
