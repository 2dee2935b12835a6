"""One shard opened for training: a tar checked against its record, its samples readable by number, in any order.

Only uids and places in the tar are held in memory, about 100 bytes a sample; images and captions are read when
asked for.

N: samples of a shard; M: members of a sample (image, json, txt).
"""

import contextlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from pipeline.corpus.fingerprint import sample_uid
from pipeline.corpus.records import Records
from pipeline.corpus.shard_files import IMAGE_EXTENSIONS, PlainFiles, key_and_extension
from pipeline.corpus.shard_reader import committed_file, committed_table
from schemas.errors import CorruptShardError
from schemas.records import OutputFile

_IMAGE, _JSON, _TXT = range(3)
_MEMBERS = {**dict.fromkeys(IMAGE_EXTENSIONS, _IMAGE), "json": _JSON, "txt": _TXT}
_ABSENT = -1
_BELONGS = "the key of another (a key ends at the first dot of a name)"
# Where an object has its captions: img2dataset's and their like; LAION's.
_CAPTION_KEYS = ("captions", "caption", "text", "TEXT")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRef:
    """A shard to train on. ``parquet`` is None for others' shards; ``held_out`` are uids that are not trained on."""

    corpus: str
    source: str
    shard: str
    tar: OutputFile
    parquet: OutputFile | None = None
    held_out: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        """The samples that are trained on."""
        return self.tar.rows - len(self.held_out)


class Sample(NamedTuple):
    """A sample as it is stored; ``captions`` best first."""

    uid: str
    image: bytes
    captions: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class TarIndex:
    """Where the image and the texts of each sample lie in a tar.

    ``places_NM2``: offset and size of the image, the json and the txt of each sample; -1 where there is none.
    ``left_out``: samples that cannot be used, by what is wrong with them.
    ``follows``: what stands behind the last member; anything but ``end`` says that samples may be lost.
    """

    keys: list[str]
    places_NM2: np.ndarray
    left_out: dict[str, int]
    follows: Literal["end", "nothing", "damage", "more"]


Places = list[tuple[int, int] | None]


def index_tar(path: Path, *, adjacent: bool = False) -> TarIndex:
    """Find every sample that has an image and captions, in the order of the tar. Raises tarfile.ReadError.

    A key ends at the first dot of a member's name, as WebDataset has it; where that leaves no extension that is
    known (``img_2.0.jpg``), at the last. The members of a sample should be beside one another; those that are not are
    put together all the same. Hidden files, as macOS adds them (``._x.jpg``), are passed over.

    Args:
        adjacent: take only samples whose members are beside one another, as capfilt writes them; the indexes of
            0.1.0 were made so.
    """
    files = PlainFiles(path)
    members = [info for info in files if adjacent or not _is_hidden(info.name)]
    samples: dict[str, Places] = {}
    partial: list[tuple[str, Places]] = []
    left_out = Counter[str]()
    for key, found in _groups(members):
        if key in samples:
            left_out["a key seen before"] += 1
        elif _missing(found):
            partial.append((key, found))
        else:
            samples[key] = found
    if not adjacent:
        gathered, again = _gathered(members, partial, samples.keys())
        left_out.update(again)
        samples |= {key: found for key, found in gathered if not _missing(found)}
        partial = [(key, found) for key, found in gathered if _missing(found)]
    left_out.update(_missing(found) for _, found in partial)
    in_order = sorted(samples, key=lambda key: min(place for place in samples[key] if place))
    places = [[place or (_ABSENT, 0) for place in samples[key]] for key in in_order]
    return TarIndex(
        keys=[_printable_key(key) for key in in_order],
        places_NM2=np.array(places, dtype=np.int64).reshape(-1, 3, 2),
        left_out=dict(+left_out),
        follows=files.what_follows(),
    )


def _is_hidden(name: str) -> bool:
    parts = name.split("/")
    return parts[-1].startswith(".") or "__MACOSX" in parts


def _missing(found: Places) -> str:
    """Return what a sample lacks; empty: nothing."""
    if found[_IMAGE] is None:
        return "no image"
    return "no captions" if found[_JSON] is None and found[_TXT] is None else ""


def _groups(members: Iterable[tarfile.TarInfo]) -> Iterator[tuple[str, Places]]:
    """Yield each key with the places of its members, as long as they are beside one another."""
    key = ""
    found: Places = [None, None, None]
    for info in members:
        own, extension = key_and_extension(info.name)
        if own != key:
            if key:
                yield key, found
            key, found = own, [None, None, None]
        kind = _MEMBERS.get(extension)
        if kind is not None:
            found[kind] = (info.offset_data, info.size)
    if key:
        yield key, found


def _gathered(
    members: Iterable[tarfile.TarInfo], partial: Iterable[tuple[str, Places]], whole: Container[str]
) -> tuple[list[tuple[str, Places]], Counter[str]]:
    """Put together members that are apart in the tar, or whose key ends at the last dot of their names.

    Returns them by key, and what is left out because its key, up to the first dot, is that of a sample of ``whole``.
    """
    dotted = [member for info in members if (member := _dotted(info)) is not None]
    first_keys = {key: first_key for first_key, key, _ in dotted}
    explained = set(first_keys.values())
    partial = [(key, found) for key, found in partial if any(found) or key not in explained]
    gathered: dict[str, Places] = {}
    again = Counter[str]()
    for key, found in [*partial, *((key, found) for _, key, found in dotted)]:
        into = gathered.setdefault(key, [None, None, None])
        if key in whole or any(old and new for old, new in zip(into, found, strict=True)):
            again["a key seen before"] += 1
        else:
            gathered[key] = [old or new for old, new in zip(into, found, strict=True)]
    # 00000.mask.png beside a whole sample 00000 belongs to it; with a text it may have been meant as a sample.
    belonging = {key for key in gathered if first_keys.get(key) in whole}
    again[_BELONGS] += sum(not _missing(gathered[key]) for key in belonging)
    return [
        (key, found) for key, found in gathered.items() if key not in whole and key not in belonging
    ], again


def _dotted(info: tarfile.TarInfo) -> tuple[str, str, Places] | None:
    """Return both keys and the place of a member whose extension is known only from the last dot on, else None."""
    key, extension = key_and_extension(info.name)
    stem, _, last = info.name.rpartition(".")
    kind = None if extension in _MEMBERS else _MEMBERS.get(last.lower())
    if kind is None:
        return None
    found: Places = [None, None, None]
    found[kind] = (info.offset_data, info.size)
    return key, stem, found


def _printable_key(key: str) -> str:
    """Return a key as text: bytes of its name that are not UTF-8 become escapes."""
    return key.encode(errors="surrogateescape").decode(errors="backslashreplace")


class OpenShard:
    """A shard's samples. Reading is thread-safe; numbers count the samples that are trained on, from 0."""

    def __init__(self, ref: ShardRef, places_NM2: np.ndarray, uids: list[str], descriptor: int) -> None:
        self.ref = ref
        self._places_NM2 = places_NM2
        self._uids_N = np.array([uid.encode() for uid in uids])
        self._descriptor = descriptor
        held_out_N = np.isin(self._uids_N, [uid.encode() for uid in ref.held_out])
        self._trained, self._held_out = np.flatnonzero(~held_out_N), np.flatnonzero(held_out_N)

    def __len__(self) -> int:
        return len(self._trained)

    @property
    def uids(self) -> list[str]:
        """The identities of all samples, in the order of the tar."""
        return [uid.decode() for uid in self._uids_N.tolist()]

    def sample(self, number: int) -> Sample:
        """Return a training sample."""
        return self._read(int(self._trained[number]))

    def held_out(self) -> Iterator[Sample]:
        """Yield the samples that are set aside."""
        return map(self._read, self._held_out.tolist())

    def _read(self, place: int) -> Sample:
        return Sample(self._uids_N[place].decode(), self._member(place, _IMAGE) or b"", self._captions(place))

    def _captions(self, place: int) -> list[str]:
        """Return the json where it is a list of texts, else the txt, else what an object in the json says."""
        told = None
        with contextlib.suppress(ValueError, RecursionError):
            told = json.loads(self._member(place, _JSON) or b"null")
        if isinstance(told, list):
            return _texts(told)
        text = self._member(place, _TXT)
        if text is not None:
            return [text.decode(errors="replace")]
        if isinstance(told, dict):
            told = next((told[name] for name in _CAPTION_KEYS if told.get(name)), None)
        return _texts(told if isinstance(told, list) else [told])

    def _member(self, place: int, kind: int) -> bytes | None:
        offset, size = self._places_NM2[place, kind].tolist()
        return None if offset == _ABSENT else os.pread(self._descriptor, size, offset)


def _texts(values: list[Any]) -> list[str]:
    return [value for value in values if isinstance(value, str)]


@contextlib.contextmanager
def open_shard(records: Records, ref: ShardRef) -> Iterator[OpenShard]:
    """Open a shard whose bytes are checked first; from S3 it is copied to a temporary file, while it is open.

    Raises:
        CorruptShardError: it is not what its record says.
    """
    with committed_file(records, ref.tar) as path:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield _indexed(records, ref, path, descriptor)
        finally:
            os.close(descriptor)


def _indexed(records: Records, ref: ShardRef, path: Path, descriptor: int) -> OpenShard:
    try:
        index = index_tar(path, adjacent=ref.parquet is not None)
        if ref.parquet is None and len(index.keys) != ref.tar.rows:
            index = index_tar(
                path, adjacent=True
            )  # a run of 0.1.0 goes on with the samples that it began with
    except tarfile.ReadError as error:
        raise CorruptShardError(f"{ref.tar.path} is no readable tar ({error})") from error
    if len(index.keys) != ref.tar.rows:
        raise CorruptShardError(
            f"{ref.tar.path} holds {len(index.keys):,} samples with image and captions where its record says "
            f"{ref.tar.rows:,}"
        )
    return OpenShard(ref, index.places_NM2, _uids(records, ref, index.keys), descriptor)


def _uids(records: Records, ref: ShardRef, keys: Iterable[str]) -> list[str]:
    """Return the identities of samples by their keys: a corpus has them in its Parquet, others' shards have none."""
    if ref.parquet is None:
        return [sample_uid(ref.source, f"{ref.shard}/{key}") for key in keys]
    table = committed_table(records, ref.parquet, ("key", "uid"))
    known = dict(zip(table["key"].to_pylist(), table["uid"].to_pylist(), strict=True))
    try:
        return [known[key] for key in keys]
    except KeyError as error:
        raise CorruptShardError(f"{ref.parquet.path} has no row for the sample {error} of its tar") from error
