"""One shard opened for training: a tar checked against its record, whose samples can be read by number in any order.

Only uids and offsets are held in memory, about 100 bytes a sample; images and captions are read on demand.

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
    """A shard to train on. ``parquet`` is None outside a corpus; ``held_out`` are uids that are not trained on."""

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
    """Where the image and the texts of each sample are in a tar.

    ``places_NM2``: offset and size of the image, the json and the txt of each sample; -1 where there is none.
    ``left_out``: number of samples that cannot be used, by reason.
    ``follows``: what comes after the last member; anything but ``end`` means that samples may be lost.
    """

    keys: list[str]
    places_NM2: np.ndarray
    left_out: dict[str, int]
    follows: Literal["end", "nothing", "damage", "more"]


Places = list[tuple[int, int] | None]


def index_tar(path: Path, *, adjacent: bool = False) -> TarIndex:
    """Find every sample that has an image and captions, in the order of the tar. Raises tarfile.ReadError.

    A key ends at the first dot of a member's name, as WebDataset has it; where that leaves no extension that is
    known (``img_2.0.jpg``), at the last. The members of a sample should be adjacent; those that are not are
    joined all the same. Hidden files, as macOS adds them (``._x.jpg``), are ignored.

    Args:
        adjacent: take only samples whose members are adjacent, as capfilt writes them; 0.1.0 indexed tars so.
    """
    files = PlainFiles(path)
    members = [info for info in files if adjacent or not _is_hidden(info.name)]
    samples: dict[str, Places] = {}
    partial: list[tuple[str, Places]] = []
    left_out = Counter[str]()
    for key, places in _groups(members):
        if key in samples:
            left_out["a key seen before"] += 1
        elif _missing(places):
            partial.append((key, places))
        else:
            samples[key] = places
    if not adjacent:
        gathered, repeated = _gathered(members, partial, samples.keys())
        left_out.update(repeated)
        samples |= {key: places for key, places in gathered if not _missing(places)}
        partial = [(key, places) for key, places in gathered if _missing(places)]
    left_out.update(_missing(places) for _, places in partial)
    in_order = sorted(samples, key=lambda key: min(place for place in samples[key] if place))
    rows = [[place or (_ABSENT, 0) for place in samples[key]] for key in in_order]
    return TarIndex(
        keys=[_printable_key(key) for key in in_order],
        places_NM2=np.array(rows, dtype=np.int64).reshape(-1, 3, 2),
        left_out=dict(+left_out),
        follows=files.what_follows(),
    )


def _is_hidden(name: str) -> bool:
    parts = name.split("/")
    return parts[-1].startswith(".") or "__MACOSX" in parts


def _missing(places: Places) -> str:
    """Return what a sample lacks; empty if nothing."""
    if places[_IMAGE] is None:
        return "no image"
    return "no captions" if places[_JSON] is None and places[_TXT] is None else ""


def _groups(members: Iterable[tarfile.TarInfo]) -> Iterator[tuple[str, Places]]:
    """Yield each key with the places of its members, for each run of adjacent members."""
    key = ""
    places: Places = [None, None, None]
    for info in members:
        own, extension = key_and_extension(info.name)
        if own != key:
            if key:
                yield key, places
            key, places = own, [None, None, None]
        kind = _MEMBERS.get(extension)
        if kind is not None:
            places[kind] = (info.offset_data, info.size)
    if key:
        yield key, places


def _gathered(
    members: Iterable[tarfile.TarInfo], partial: Iterable[tuple[str, Places]], whole: Container[str]
) -> tuple[list[tuple[str, Places]], Counter[str]]:
    """Join members that are not adjacent in the tar, or whose key ends at the last dot of their names.

    Returns them by key, and what is left out because its key, up to the first dot, is that of a sample of ``whole``.
    """
    dotted = [member for info in members if (member := _dotted(info)) is not None]
    first_keys = {key: first_key for first_key, key, _ in dotted}
    explained = set(first_keys.values())
    partial = [(key, places) for key, places in partial if any(places) or key not in explained]
    gathered: dict[str, Places] = {}
    repeated = Counter[str]()
    for key, places in [*partial, *((key, places) for _, key, places in dotted)]:
        into = gathered.setdefault(key, [None, None, None])
        if key in whole or any(old and new for old, new in zip(into, places, strict=True)):
            repeated["a key seen before"] += 1
        else:
            gathered[key] = [old or new for old, new in zip(into, places, strict=True)]
    # 00000.mask.png beside a whole sample 00000 is part of it; with a text it may have been meant as a sample.
    belonging = {key for key in gathered if first_keys.get(key) in whole}
    repeated[_BELONGS] += sum(not _missing(gathered[key]) for key in belonging)
    return [
        (key, places) for key, places in gathered.items() if key not in whole and key not in belonging
    ], repeated


def _dotted(info: tarfile.TarInfo) -> tuple[str, str, Places] | None:
    """Return both keys and the place of a member whose extension is known only from the last dot on, else None."""
    key, extension = key_and_extension(info.name)
    stem, _, last = info.name.rpartition(".")
    kind = None if extension in _MEMBERS else _MEMBERS.get(last.lower())
    if kind is None:
        return None
    places: Places = [None, None, None]
    places[kind] = (info.offset_data, info.size)
    return key, stem, places


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
        """Yield the samples that are held out."""
        return map(self._read, self._held_out.tolist())

    def _read(self, place: int) -> Sample:
        return Sample(self._uids_N[place].decode(), self._member(place, _IMAGE) or b"", self._captions(place))

    def _captions(self, place: int) -> list[str]:
        """Return the json if it is a list of texts, else the txt, else the captions of an object in the json."""
        content = None
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(self._member(place, _JSON) or b"null")
        if isinstance(content, list):
            return _texts(content)
        text = self._member(place, _TXT)
        if text is not None:
            return [text.decode(errors="replace")]
        if isinstance(content, dict):
            content = next((content[name] for name in _CAPTION_KEYS if content.get(name)), None)
        return _texts(content if isinstance(content, list) else [content])

    def _member(self, place: int, kind: int) -> bytes | None:
        offset, size = self._places_NM2[place, kind].tolist()
        return None if offset == _ABSENT else os.pread(self._descriptor, size, offset)


def _texts(values: list[Any]) -> list[str]:
    return [value for value in values if isinstance(value, str)]


@contextlib.contextmanager
def open_shard(records: Records, ref: ShardRef) -> Iterator[OpenShard]:
    """Open a shard after its bytes are checked; from S3 it is copied to a temporary file while it is open.

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
            )  # a run of 0.1.0 continues with the samples that it began with
    except tarfile.ReadError as error:
        raise CorruptShardError(f"{ref.tar.path} is not a readable tar ({error})") from error
    if len(index.keys) != ref.tar.rows:
        raise CorruptShardError(
            f"{ref.tar.path} holds {len(index.keys):,} samples with image and captions where its record says "
            f"{ref.tar.rows:,}"
        )
    return OpenShard(ref, index.places_NM2, _uids(records, ref, index.keys), descriptor)


def _uids(records: Records, ref: ShardRef, keys: Iterable[str]) -> list[str]:
    """Return the identities of samples by their keys: a corpus has them in its Parquet, other folders have none."""
    if ref.parquet is None:
        return [sample_uid(ref.source, f"{ref.shard}/{key}") for key in keys]
    table = committed_table(records, ref.parquet, ("key", "uid"))
    known = dict(zip(table["key"].to_pylist(), table["uid"].to_pylist(), strict=True))
    try:
        return [known[key] for key in keys]
    except KeyError as error:
        raise CorruptShardError(f"{ref.parquet.path} has no row for the sample {error} of its tar") from error
