"""The stream of training batches of one rank: read, checked, decoded and cropped ahead of the step.

What a step sees depends on the snapshot and the seed alone (``sampler``), not on the number of ranks and threads or
how far ahead they read. The whole state is the number of samples consumed.

Memory of a rank: the batches in flight (3 * size_px**2 bytes an image, three batches or a few images a thread),
one decoded image a thread, and about 100 bytes for each sample of the open shards: those of the current
``shuffle_shards`` of each source and ``read_ahead`` more. From S3 these lie in temporary files, which the ranks of a
node share.

B: images of one rank's batch; C, H, W: channels, rows, columns.
"""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.images.decode import ImageError
from pipeline.prefetch import prefetch_map
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from training.data.rand_augment import rand_augment
from training.data.sampler import SampleIndex, Sampler
from training.data.shard_cache import ShardCache, require_scratch
from training.data.shard_index import OpenShard, StoredSample
from training.data.snapshot import Snapshot
from training.data.transforms import NoCaptionError, decode, random_crop, sample_random, usable_captions
from training.distributed import rank_rows

_log = logging.getLogger(__name__)

# Images that a thread makes at a time: fewer cost more for handing over, more leave threads idle at a batch's end.
_CHUNK = 8
_CHUNKS_AHEAD_PER_THREAD = 4
# How many steps ahead shards are looked for; at the recipes' batch sizes a group of shards lasts fewer steps.
_PLANNED_STEPS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One rank's part of a step.

    Attributes:
        pixels_BCHW: uint8, cropped and mirrored; normalised on the device.
        captions: one a sample, cleaned by ``blip_caption``.
        uids: the samples' identities.
        image_hashes: of the stored bytes of each image; of equal images the same.
        kept_captions: all of each sample, cleaned, of which one is in ``captions``.
        position: samples that all ranks have consumed once this batch is trained on: the loader's whole state.
    """

    pixels_BCHW: Tensor
    captions: list[str]
    uids: list[str]
    image_hashes: list[int]
    kept_captions: list[list[str]]
    position: int


class _Chunk(NamedTuple):
    """Some rows of a batch that one thread fills; ``indices`` are those of the whole batch."""

    batch: Batch
    indices: Sequence[SampleIndex]
    rows: range


class TrainingData:
    """The batches of one rank, from any position on.

    Global step k takes the samples ``[k * batch_size, (k + 1) * batch_size)`` of the sampler, and rank r the r-th
    contiguous part of them (``rank_rows``).

    A sample that cannot be used (its image does not decode, or its captions have no word) is replaced by the next
    usable one of its shard; each is logged once.

    Args:
        consumed: ``position`` of the last batch trained on.

    Raises:
        CapfiltError: there are more ranks than images, or ``consumed`` is not a whole number of batches.
    """

    def __init__(
        self,
        config: PretrainConfig,
        snapshot: Snapshot,
        rank: int = 0,
        world_size: int = 1,
        consumed: int = 0,
    ) -> None:
        batch_size = config.optim.batch_size
        if consumed % batch_size:
            raise CapfiltError(
                f"optim.batch_size: {consumed:,} samples consumed are not a whole number of batches of {batch_size}; "
                "resume with the batch size that the run began with"
            )
        self.consumed = consumed
        self.snapshot = snapshot
        self._config = config.data
        self._seed = config.run.seed
        self._batch_size = batch_size
        self._rows = rank_rows(batch_size, rank, world_size)
        self._sampler = Sampler(snapshot, config.run.seed, config.data.shuffle_shards)
        self._first_captions = [
            source.first_captions(config.data) for source in snapshot.sources for _ in source.shards
        ]
        self._unusable: set[str] = set()

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches without end.

        Raises:
            CorruptShardError: a shard is not what its record says.
            CapfiltError: the scratch space cannot hold the shards that are open at once.
        """
        threads = self._config.workers
        chunks_per_batch = -(-(self._rows.stop - self._rows.start) // _CHUNK)
        chunks_ahead = max(2 * chunks_per_batch, _CHUNKS_AHEAD_PER_THREAD * threads)
        require_scratch(self.snapshot, self._config.shuffle_shards, self._config.read_ahead)
        with ShardCache(self.snapshot) as cache:
            filled = prefetch_map(partial(self._fill, cache), self._chunks(cache), chunks_ahead, threads)
            # Closed before the cache, whose shards its threads read.
            with closing(filled):
                for chunk in filled:
                    if chunk.rows.stop == len(chunk.indices):
                        cache.release(chunk.indices)
                        yield chunk.batch

    def _chunks(self, cache: ShardCache) -> Iterator[_Chunk]:
        """Yield the parts of each batch, while ``read_ahead`` later shards are being opened."""
        planned: deque[tuple[int, list[SampleIndex]]] = deque()
        # For each shard that is opened ahead: the first step that reads it.
        first_uses: deque[int] = deque()
        for step in count(self.consumed // self._batch_size):
            # This rank's contiguous part of the step's samples.
            start = step * self._batch_size
            indices = self._sampler.indices(start, start + self._batch_size)[self._rows]
            planned.append((step, indices))
            first_uses.extend([step] * cache.prefetch(indices))
            while planned:
                next_step = planned[0][0]
                while first_uses and first_uses[0] <= next_step:
                    first_uses.popleft()
                if len(first_uses) < self._config.read_ahead and len(planned) < _PLANNED_STEPS:
                    break
                yield from self._chunks_of_step(*planned.popleft())

    def _chunks_of_step(self, step: int, indices: Sequence[SampleIndex]) -> Iterator[_Chunk]:
        size_px = self._config.image_size_px
        batch = Batch(
            pixels_BCHW=torch.empty((len(indices), 3, size_px, size_px), dtype=torch.uint8),
            captions=[""] * len(indices),
            uids=[""] * len(indices),
            image_hashes=[0] * len(indices),
            kept_captions=[[]] * len(indices),
            position=(step + 1) * self._batch_size,
        )
        for start in range(0, len(indices), _CHUNK):
            yield _Chunk(batch, indices, range(start, min(start + _CHUNK, len(indices))))

    def _fill(self, cache: ShardCache, chunk: _Chunk) -> _Chunk:
        """Fill some rows of a batch."""
        batch = chunk.batch
        for row in chunk.rows:
            index = chunk.indices[row]
            sample, pixels_CHW, captions = self._usable(cache.get(index.shard), index)
            numbers = sample_random(self._seed, sample.uid, index.epoch)
            batch.uids[row] = sample.uid
            batch.image_hashes[row] = _hash(sample.image)
            batch.kept_captions[row] = usable_captions(sample.captions, None, self._config.max_words)
            batch.captions[row] = captions[int(numbers.random() * len(captions))]
            crop_CHW = random_crop(
                pixels_CHW,
                numbers,
                size_px=self._config.image_size_px,
                min_scale=self._config.min_scale,
                flip=self._config.flip,
            )
            augmented = rand_augment(crop_CHW, numbers) if self._config.rand_augment else crop_CHW
            batch.pixels_BCHW[row] = augmented
        return chunk

    def _usable(self, shard: OpenShard, index: SampleIndex) -> tuple[StoredSample, Tensor, list[str]]:
        """Return a sample with its pixels and captions, or the next one of the shard that can be used."""
        for number in range(index.sample, index.sample + len(shard)):
            sample = shard.sample(number % len(shard))
            try:
                captions = usable_captions(
                    sample.captions, self._first_captions[index.shard], self._config.max_words
                )
                return sample, decode(sample.image), captions
            except (ImageError, NoCaptionError) as error:
                if sample.uid not in self._unusable:
                    self._unusable.add(sample.uid)
                    _log.warning("%s: sample %s is not used: %s", shard.ref.tar.path, sample.uid, error)
        raise CapfiltError(
            f"{shard.ref.tar.path} of {shard.ref.corpus}: no sample has both an image that decodes and a caption of "
            "words; take the shard out, or leave its source out with data.corpus.sources"
        )


def _hash(image: bytes) -> int:
    """Return 63 bits of an image's bytes."""
    return int.from_bytes(blake2b(image, digest_size=8).digest()) >> 1
