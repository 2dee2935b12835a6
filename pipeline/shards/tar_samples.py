"""The samples of a WebDataset tar, whoever made it: which members belong to one another, and where they lie.

M: members of a sample that are read (image, json, text).
"""

import tarfile
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Literal

from pipeline.shards.shard_files import IMAGE_EXTENSIONS, PlainFiles, key_and_extension
from schemas.names import is_hidden

IMAGE, JSON, TEXT = range(3)
# What the extensions of members mean.
MEMBERS: Mapping[str, int] = {**dict.fromkeys(IMAGE_EXTENSIONS, IMAGE), "json": JSON, "txt": TEXT}
_BELONGS = "the key of another (a key ends at the first dot of a name)"
_REPEATED = "a key seen before"

# (offset, size) of the image, the json and the text of a sample.
Places = list[tuple[int, int] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TarSamples:
    """What a tar holds.

    ``whole``: samples with an image and a text or json, by key. ``partial``: those that lack one of them.
    ``left_out``: number of further samples, by reason. ``follows``: what comes after the last member; anything but
    ``end`` means that samples may be lost.
    """

    whole: dict[str, Places]
    partial: list[tuple[str, Places]]
    left_out: Counter[str]
    follows: Literal["end", "nothing", "damage", "more"]


def find_tar_samples(
    path: Path, *, adjacent: bool = False, extensions: Mapping[str, int] = MEMBERS
) -> TarSamples:
    """Find the samples of a tar. Raises tarfile.ReadError.

    A key ends at the first dot of a member's name, as WebDataset has it; where that leaves no extension that is
    known (``img_2.0.jpg``), at the last. The members of a sample should be adjacent; those that are not are
    joined all the same. Hidden files, as macOS adds them (``._x.jpg``), are ignored.

    Args:
        adjacent: take only samples whose members are adjacent, as capfilt writes them; 0.1.0 indexed tars so.
        extensions: IMAGE, JSON or TEXT by extension in lower case; other members are ignored.
    """
    files = PlainFiles(path)
    members = [info for info in files if adjacent or not is_hidden(info.name, by_folder=False)]
    whole: dict[str, Places] = {}
    partial: list[tuple[str, Places]] = []
    left_out = Counter[str]()
    for key, places in _groups(members, extensions):
        if key in whole:
            left_out[_REPEATED] += 1
        elif missing(places):
            partial.append((key, places))
        else:
            whole[key] = places
    if not adjacent:
        gathered, repeated = _gathered(members, partial, whole.keys(), extensions)
        left_out.update(repeated)
        whole |= {key: places for key, places in gathered if not missing(places)}
        partial = [(key, places) for key, places in gathered if missing(places)]
    return TarSamples(whole=whole, partial=partial, left_out=+left_out, follows=files.what_follows())


def missing(places: Places) -> str:
    """Return what a sample lacks; empty if nothing."""
    if places[IMAGE] is None:
        return "no image"
    return "no captions" if places[JSON] is None and places[TEXT] is None else ""


def printable_key(key: str) -> str:
    """Return a key as text: bytes of its name that are not UTF-8 become escapes."""
    return key.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _groups(
    members: Iterable[tarfile.TarInfo], extensions: Mapping[str, int]
) -> Iterator[tuple[str, Places]]:
    """Yield each key with the places of its members, for each run of adjacent members."""
    named = ((*key_and_extension(info.name), info) for info in members)
    for key, run in groupby(named, key=itemgetter(0)):
        places: Places = [None, None, None]
        for _, extension, info in run:
            if extension in extensions:
                places[extensions[extension]] = (info.offset_data, info.size)
        if key:
            yield key, places


def _gathered(
    members: Iterable[tarfile.TarInfo],
    partial: Iterable[tuple[str, Places]],
    whole: Container[str],
    extensions: Mapping[str, int],
) -> tuple[list[tuple[str, Places]], Counter[str]]:
    """Join members that are not adjacent in the tar, or whose key ends at the last dot of their names.

    Returns them by key, and what is left out because its key, up to the first dot, is that of a sample of ``whole``.
    """
    dotted = [member for info in members if (member := _dotted(info, extensions)) is not None]
    first_keys = {key: first_key for first_key, key, _ in dotted}
    explained = set(first_keys.values())
    partial = [(key, places) for key, places in partial if any(places) or key not in explained]
    gathered: dict[str, Places] = {}
    repeated = Counter[str]()
    for key, places in [*partial, *((key, places) for _, key, places in dotted)]:
        into = gathered.setdefault(key, [None, None, None])
        if key in whole or any(old and new for old, new in zip(into, places, strict=True)):
            repeated[_REPEATED] += 1
        else:
            gathered[key] = [old or new for old, new in zip(into, places, strict=True)]
    # 00000.mask.png beside a whole sample 00000 is part of it; with a text it may have been meant as a sample.
    belonging = {key for key in gathered if first_keys.get(key) in whole}
    repeated[_BELONGS] += sum(not missing(gathered[key]) for key in belonging)
    return [
        (key, places) for key, places in gathered.items() if key not in whole and key not in belonging
    ], repeated


def _dotted(info: tarfile.TarInfo, extensions: Mapping[str, int]) -> tuple[str, str, Places] | None:
    """Return both keys and the place of a member whose extension is known only from the last dot on, else None."""
    key, extension = key_and_extension(info.name)
    stem, _, last = info.name.rpartition(".")
    kind = None if extension in extensions else extensions.get(last.lower())
    if kind is None:
        return None
    places: Places = [None, None, None]
    places[kind] = (info.offset_data, info.size)
    return key, stem, places
