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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.committed import committed_file, committed_table
from pipeline.fingerprint import sample_uid
from pipeline.records import Records
from pipeline.shards import IMAGE_EXTENSIONS, key_and_extension
from schemas.errors import CorruptShardError
from schemas.records import OutputFile

_IMAGE, _JSON, _TXT = range(3)
_MEMBERS = {**dict.fromkeys(IMAGE_EXTENSIONS, _IMAGE), "json": _JSON, "txt": _TXT}
_ABSENT = -1


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
    """

    keys: list[str]
    places_NM2: np.ndarray
    left_out: dict[str, int]


def index_tar(path: Path) -> TarIndex:
    """Find every sample that has an image and captions. Raises tarfile.ReadError."""
    keys, places, left_out = {}, [], Counter()
    for key, found in _samples(path):
        if key in keys:
            left_out["a key seen before"] += 1
        elif found[_IMAGE] is None:
            left_out["no image"] += 1
        elif found[_JSON] is None and found[_TXT] is None:
            left_out["no captions"] += 1
        else:
            keys[key] = None
            places.append([place or (_ABSENT, 0) for place in found])
    places_NM2 = np.array(places, dtype=np.int64).reshape(-1, 3, 2)
    return TarIndex(keys=list(keys), places_NM2=places_NM2, left_out=dict(left_out))


def _samples(path: Path) -> Iterator[tuple[str, list[tuple[int, int] | None]]]:
    """Yield each key of a tar with the places of its members; those of one key are adjacent, as WebDataset asks."""
    key, found = "", [None, None, None]
    with tarfile.open(path, "r:") as tar:
        for info in tar:
            if not info.isfile():
                continue
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
        return self._read(self._trained[number])

    def held_out(self) -> Iterator[Sample]:
        """Yield the samples that are set aside."""
        return map(self._read, self._held_out)

    def _read(self, place: int) -> Sample:
        return Sample(self._uids_N[place].decode(), self._member(place, _IMAGE) or b"", self._captions(place))

    def _captions(self, place: int) -> list[str]:
        """Return the json where it is a list of texts, else the txt; img2dataset's json is no list."""
        with contextlib.suppress(ValueError):
            captions = json.loads(self._member(place, _JSON) or b"null")
            if isinstance(captions, list):
                return [caption for caption in captions if isinstance(caption, str)]
        text = self._member(place, _TXT)
        return [] if text is None else [text.decode(errors="replace")]

    def _member(self, place: int, kind: int) -> bytes | None:
        offset, size = self._places_NM2[place, kind].tolist()
        return None if offset == _ABSENT else os.pread(self._descriptor, size, offset)


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
        index = index_tar(path)
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
