"""The stream of training batches of one rank: read, checked, decoded and cropped ahead of the step.

What a step sees depends on the snapshot and the seed alone (``order``); how many ranks and threads make it, and
how far ahead, does not matter. The whole state is the number of samples consumed.

Memory of a rank: the batches in flight (3 * size_px**2 bytes an image, three batches or a few images a thread),
one decoded image a thread, and about 100 bytes for each sample of the open shards: those of the current
``shuffle_shards`` of each source and ``read_ahead`` more. From S3 these lie in temporary files.

B: images of one rank's batch; C, H, W: channels, rows, columns.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.corpus.records import Records
from pipeline.corpus.storage import Storage
from pipeline.images.decode import ImageError
from schemas.errors import CapfiltError
from schemas.pretrain import DataConfig, PretrainConfig
from training.data.captions import NoCaptionError, usable_captions
from training.data.sampler import Draw, Order
from training.data.shard_cache import Shelf
from training.data.shard_index import OpenShard, Sample, open_shard
from training.data.snapshot import Snapshot, Source
from training.data.transforms import decode, random_crop, resize, sample_random

_log = logging.getLogger(__name__)

# Images that a thread makes at a time: fewer spend more on handing over, more leave threads idle at a batch's end.
_CHUNK = 8
_CHUNKS_AHEAD_PER_THREAD = 4
# How far ahead shards are looked for: a group of them lasts fewer steps at the batch sizes of the recipes.
_PLANNED_STEPS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One rank's share of a step.

    Attributes:
        pixels_BCHW: uint8, cropped and mirrored; normalised on the device.
        captions: one a sample, cleaned by ``blip_caption``.
        uids: the samples' identities.
        position: samples that all ranks have consumed once this batch is trained on: the loader's whole state.
    """

    pixels_BCHW: Tensor
    captions: list[str]
    uids: list[str]
    position: int


class TrainingData:
    """The batches of one rank, from any position on.

    Global step k takes the samples ``[k * batch_size, (k + 1) * batch_size)`` of the order, and rank r the r-th
    contiguous share of them.

    A sample that cannot be used (its image does not decode, or no word is left of its captions) is replaced by
    the next usable one of its shard; each is logged once.

    Args:
        consumed: ``position`` of the last batch trained on.

    Raises:
        CapfiltError: the ranks cannot share the batch evenly, or ``consumed`` is not a whole number of batches.
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
        if batch_size % world_size:
            raise CapfiltError(
                f"optim.batch_size: {batch_size} images do not divide among {world_size} ranks; take a multiple of "
                f"{world_size}, or another cluster.gpus"
            )
        if consumed % batch_size:
            raise CapfiltError(
                f"optim.batch_size: {consumed:,} samples consumed are no whole number of batches of {batch_size}; "
                "resume with the batch size that the run began with"
            )
        self.consumed = consumed
        self.snapshot = snapshot
        self._config = config.data
        self._seed = config.run.seed
        self._batch_size = batch_size
        self._share = batch_size // world_size
        self._rank = rank
        self._order = Order(snapshot, config.run.seed, config.data.shuffle_shards)
        self._first_captions = [
            _first_captions(source, config.data) for source in snapshot.sources for _ in source.shards
        ]
        self._unusable: set[str] = set()

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches without end. Raises CorruptShardError for a shard that is not what its record says."""
        workers = self._config.workers
        ahead = max(2, -(-_CHUNKS_AHEAD_PER_THREAD * workers * _CHUNK // self._share))
        with ExitStack() as stack:
            shelf = stack.enter_context(Shelf(self.snapshot))
            pool = ThreadPoolExecutor(workers)
            stack.callback(pool.shutdown, cancel_futures=True)
            making: deque[_Making] = deque()
            for step, draws in self._planned(shelf):
                making.append(self._make(pool, shelf, step, draws))
                if len(making) > ahead:
                    made = making.popleft()
                    batch = made.wait()
                    shelf.leave(made.draws)
                    yield batch

    def _planned(self, shelf: Shelf) -> Iterator[tuple[int, list[Draw]]]:
        """Yield each step and this rank's samples of it, ``read_ahead`` shards after them already being opened."""
        planned: deque[tuple[int, list[Draw]]] = deque()
        first_uses: deque[int] = deque()
        for step in count(self.consumed // self._batch_size):
            start = step * self._batch_size
            draws = self._order.draws(start, start + self._batch_size)
            draws = draws[self._rank * self._share : (self._rank + 1) * self._share]
            planned.append((step, draws))
            first_uses.extend([step] * shelf.want(draws))
            while planned:
                now = planned[0][0]
                while first_uses and first_uses[0] <= now:
                    first_uses.popleft()
                if len(first_uses) < self._config.read_ahead and len(planned) < _PLANNED_STEPS:
                    break
                yield planned.popleft()

    def _make(self, pool: ThreadPoolExecutor, shelf: Shelf, step: int, draws: Sequence[Draw]) -> "_Making":
        """Begin to make a batch."""
        size_px = self._config.image_size_px
        batch = Batch(
            pixels_BCHW=torch.empty((len(draws), 3, size_px, size_px), dtype=torch.uint8),
            captions=[""] * len(draws),
            uids=[""] * len(draws),
            position=(step + 1) * self._batch_size,
        )
        chunks = [
            pool.submit(self._fill, batch, shelf, draws, range(start, min(start + _CHUNK, len(draws))))
            for start in range(0, len(draws), _CHUNK)
        ]
        return _Making(batch=batch, draws=draws, chunks=chunks)

    def _fill(self, batch: Batch, shelf: Shelf, draws: Sequence[Draw], rows: range) -> None:
        """Make some rows of a batch."""
        for row in rows:
            draw = draws[row]
            sample, pixels_CHW, captions = self._usable(shelf.get(draw.shard), draw)
            numbers = sample_random(self._seed, sample.uid, draw.turn)
            batch.uids[row] = sample.uid
            batch.captions[row] = captions[int(numbers.random() * len(captions))]
            batch.pixels_BCHW[row] = random_crop(
                pixels_CHW,
                numbers,
                size_px=self._config.image_size_px,
                min_scale=self._config.min_scale,
                flip=self._config.flip,
            )

    def _usable(self, shard: OpenShard, draw: Draw) -> tuple[Sample, Tensor, list[str]]:
        """Return a sample with its pixels and captions, or the next of the shard that can be used."""
        for number in range(draw.sample, draw.sample + len(shard)):
            sample = shard.sample(number % len(shard))
            try:
                captions = usable_captions(
                    sample.captions, self._first_captions[draw.shard], self._config.max_words
                )
                return sample, decode(sample.image), captions
            except (ImageError, NoCaptionError) as error:
                if sample.uid not in self._unusable:
                    self._unusable.add(sample.uid)
                    _log.warning("%s: sample %s is not used: %s", shard.ref.tar.path, sample.uid, error)
        raise CapfiltError(
            f"{shard.ref.tar.path} of {shard.ref.corpus}: not one sample has an image that decodes and a caption of "
            "words; take it out, or leave its source out with data.corpus.sources"
        )


class HeldOut(NamedTuple):
    """An image set aside for the probe, squashed to a square, and its captions, cleaned, best first."""

    pixels_CHW: Tensor
    captions: list[str]
    uid: str


def held_out_samples(config: PretrainConfig, snapshot: Snapshot, limit: int | None = None) -> list[HeldOut]:
    """Return the images of ``data.held_out``, or the first ``limit`` of them; those that cannot be used are left out.

    Reads the few shards that they are of, each checked against its record.
    """
    samples: list[HeldOut] = []
    for source in snapshot.sources:
        for shard in source.shards:
            if not shard.held_out or len(samples) == limit:
                continue
            with open_shard(Records(Storage(shard.corpus)), shard) as opened:
                for sample in opened.held_out():
                    if len(samples) == limit:
                        break
                    with contextlib.suppress(ImageError, NoCaptionError):
                        captions = usable_captions(
                            sample.captions, _first_captions(source, config.data), config.data.max_words
                        )
                        pixels_CHW = resize(decode(sample.image), config.data.image_size_px)
                        samples.append(HeldOut(pixels_CHW.contiguous(), captions, sample.uid))
    return samples


def _first_captions(source: Source, config: DataConfig) -> int | None:
    """Return how many of an image's captions are drawn from; None: all, where people wrote them."""
    return None if source.kind == "human" else config.captions_per_image


@dataclass(frozen=True, slots=True, kw_only=True)
class _Making:
    """A batch whose rows are being made."""

    batch: Batch
    draws: Sequence[Draw]
    chunks: list[Future[None]]

    def wait(self) -> Batch:
        for chunk in self.chunks:
            chunk.result()
        return self.batch
