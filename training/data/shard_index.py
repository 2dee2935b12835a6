"""One shard opened for training: a tar checked against its record, whose samples can be read by number in any order.

Only uids and offsets are held in memory, about 100 bytes a sample; images and captions are read on demand.

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
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.records import Records
from pipeline.shards.shard_reader import committed_table
from pipeline.shards.tar_samples import IMAGE, JSON, TEXT, find_tar_samples, missing, printable_key
from pipeline.shards.uids import sample_uid
from schemas.errors import CorruptShardError
from schemas.records import SnapshotShard
from schemas.stages import STAGE_FOLDERS
from training.data.node_files import node_file

_ABSENT = -1
# In the place of a size: the member's header, which says it, is at the offset.
_IN_HEADER = -2
_PLACES = ("offset", "image_bytes")
# Where an object has its captions: img2dataset's and their like; LAION's.
_CAPTION_KEYS = ("captions", "caption", "text", "TEXT")


class StoredSample(NamedTuple):
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


def index_tar(path: Path, *, adjacent: bool = False) -> TarIndex:
    """Find every sample that has an image and captions, in the order of the tar. Raises tarfile.ReadError.

    Args:
        adjacent: as in ``find_tar_samples``.
    """
    samples = find_tar_samples(path, adjacent=adjacent)
    left_out = samples.left_out + Counter(missing(places) for _, places in samples.partial)
    in_order = sorted(samples.whole, key=lambda key: min(place for place in samples.whole[key] if place))
    rows = [[place or (_ABSENT, 0) for place in samples.whole[key]] for key in in_order]
    return TarIndex(
        keys=[printable_key(key) for key in in_order],
        places_NM2=np.array(rows, dtype=np.int64).reshape(-1, 3, 2),
        left_out=dict(left_out),
        follows=samples.follows,
    )


class OpenShard:
    """A shard's samples. Reading is thread-safe; numbers count the samples that are trained on, from 0."""

    def __init__(self, ref: SnapshotShard, places_NM2: np.ndarray, uids: list[str], descriptor: int) -> None:
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

    def sample(self, number: int) -> StoredSample:
        """Return a training sample."""
        return self._read(int(self._trained[number]))

    def held_out(self) -> Iterator[StoredSample]:
        """Yield the samples that are held out."""
        return map(self._read, self._held_out.tolist())

    def _read(self, place: int) -> StoredSample:
        return StoredSample(
            self._uids_N[place].decode(), self._member(place, IMAGE) or b"", self._captions(place)
        )

    def _captions(self, place: int) -> list[str]:
        """Return the json if it is a list of texts, else the txt, else the captions of an object in the json."""
        content = None
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(self._member(place, JSON) or b"null")
        if isinstance(content, list):
            return _texts(content)
        text = self._member(place, TEXT)
        if text is not None:
            return [text.decode(errors="replace")]
        if isinstance(content, dict):
            content = next((content[name] for name in _CAPTION_KEYS if content.get(name)), None)
        return _texts(content if isinstance(content, list) else [content])

    def _member(self, place: int, kind: int) -> bytes | None:
        offset, size = self._places_NM2[place, kind].tolist()
        if offset == _ABSENT:
            return None
        if size == _IN_HEADER:
            offset, size = self._after_header(offset)
        return os.pread(self._descriptor, size, offset)

    def _after_header(self, offset: int) -> tuple[int, int]:
        """Return offset and size of the member whose header is at ``offset``."""
        header = os.pread(self._descriptor, tarfile.BLOCKSIZE, offset)
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise CorruptShardError(
                f"{self.ref.tar.path} has no member at byte {offset:,}, where its Parquet says that an image ends"
            ) from error
        return offset + tarfile.BLOCKSIZE, member.size


def _texts(values: list[Any]) -> list[str]:
    return [value for value in values if isinstance(value, str)]


@contextlib.contextmanager
def open_shard(records: Records, ref: SnapshotShard) -> Iterator[OpenShard]:
    """Open a shard after its bytes are checked; from S3 it is copied to a temporary file while it is open.

    Raises:
        CorruptShardError: it is not what its record says.
    """
    with node_file(records, ref.tar) as path:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            listed = _listed(records, ref, descriptor)
            yield _indexed(records, ref, path, descriptor) if listed is None else listed
        finally:
            os.close(descriptor)


def _listed(records: Records, ref: SnapshotShard, descriptor: int) -> OpenShard | None:
    """Return a curated shard whose Parquet says where each image is; None where it does not, as before its column came.

    ``select`` writes each image's json behind it. A crawl writes the text there: its tars are indexed.
    """
    if ref.parquet is None or not ref.tar.path.startswith(f"{STAGE_FOLDERS['select']}/"):
        return None
    with node_file(records, ref.parquet) as path, pq.ParquetFile(path) as parquet:
        if not set(_PLACES) <= set(parquet.schema_arrow.names):
            return None
        table = parquet.read(["uid", *_PLACES, "status"])
    kept = table.filter(pc.equal(table["status"], "kept")).sort_by("offset")
    if any(kept[name].null_count for name in _PLACES):
        return None
    _require_rows(ref, len(kept))
    image_N2 = np.stack([kept[name].to_numpy() for name in _PLACES], axis=-1)
    places_NM2 = np.full((len(kept), 3, 2), (_ABSENT, 0), dtype=np.int64)
    places_NM2[:, IMAGE] = image_N2
    # A member's content is padded to whole blocks; the next header follows.
    blocks_N = -(-image_N2.sum(axis=-1) // tarfile.BLOCKSIZE)
    places_NM2[:, JSON] = np.stack(
        [blocks_N * tarfile.BLOCKSIZE, np.full_like(blocks_N, _IN_HEADER)], axis=-1
    )
    return OpenShard(ref, places_NM2, kept["uid"].to_pylist(), descriptor)


def _indexed(records: Records, ref: SnapshotShard, path: Path, descriptor: int) -> OpenShard:
    """Return a shard whose tar is walked, header by header."""
    try:
        index = index_tar(path, adjacent=ref.parquet is not None)
        if ref.parquet is None and len(index.keys) != ref.tar.rows:
            # A run of 0.1.0 continues with the samples that it began with.
            index = index_tar(path, adjacent=True)
    except tarfile.ReadError as error:
        raise CorruptShardError(f"{ref.tar.path} is not a readable tar ({error})") from error
    _require_rows(ref, len(index.keys))
    return OpenShard(ref, index.places_NM2, _uids(records, ref, index.keys), descriptor)


def _require_rows(ref: SnapshotShard, samples: int) -> None:
    if samples != ref.tar.rows:
        raise CorruptShardError(
            f"{ref.tar.path} holds {samples:,} samples with image and captions where its record says "
            f"{ref.tar.rows:,}"
        )


def _uids(records: Records, ref: SnapshotShard, keys: Iterable[str]) -> list[str]:
    """Return the identities of samples by their keys: a corpus has them in its Parquet, other folders have none."""
    if ref.parquet is None:
        return [sample_uid(ref.source, f"{ref.shard}/{key}") for key in keys]
    table = committed_table(records, ref.parquet, ("key", "uid"))
    known = dict(zip(table["key"].to_pylist(), table["uid"].to_pylist(), strict=True))
    try:
        return [known[key] for key in keys]
    except KeyError as error:
        raise CorruptShardError(f"{ref.parquet.path} has no row for the sample {error} of its tar") from error
