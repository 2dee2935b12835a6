"""The order of training samples: a pure function of the snapshot and the seed, computed at any position.

Nothing here has a state and nothing is as long as the corpus, so that a run resumes at any sample at once:

- An *epoch* of a source is one pass over its images: a sequence of groups of ``shuffle_shards`` shards. Which shards
  are in a group, and the samples within each shard, get a new permutation in every epoch. No image comes a second time
  before every image of its source came once.
- The stream mixes sources, and a group mixes shards, by apportionment: of the first n samples, each gets its share of
  n to within about one sample. Weights that are the sources' numbers of images therefore give each image exactly once
  in every ``num_images`` samples; with other weights a source goes through its epochs faster or slower than the others.

The samples of a step come sorted by source, and by the place of their shard in its group. A step's loss does not depend
on the order within it; each rank's contiguous part of it then needs few shards, and where a group ends, the shards of
the next one take the places, and so the ranks, of those that end.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, chain
from typing import NamedTuple

from pipeline.rng import permutation
from training.data.snapshot import Snapshot, Source


class SampleIndex(NamedTuple):
    """The place of one sample of the stream.

    ``shard`` indexes ``Snapshot.shards``; ``sample`` counts the shard's training samples from 0; ``epoch`` is that of
    its source; ``group`` counts the source's groups over all epochs and never falls.
    """

    shard: int
    sample: int
    epoch: int
    group: int


class Sampler:
    """The endless stream of a snapshot's samples under one seed."""

    def __init__(self, snapshot: Snapshot, seed: int, shuffle_shards: int) -> None:
        first_shards = accumulate((len(source.shards) for source in snapshot.sources), initial=0)
        self._streams = [
            _SourceStream(source, first_shard, seed, shuffle_shards)
            for source, first_shard in zip(snapshot.sources, first_shards, strict=False)
        ]
        # A source whose images are all held out gives none, whatever its weight.
        self._weights = whole_numbers(
            [source.weight if source.num_images else 0 for source in snapshot.sources]
        )

    def indices(self, start: int, stop: int) -> list[SampleIndex]:
        """Return the samples at positions ``start`` to ``stop`` of the stream, by source and place in a group."""
        firsts, lasts = apportion(start, self._weights), apportion(stop, self._weights)
        return [
            index
            for stream, first, last in zip(self._streams, firsts, lasts, strict=True)
            for index in stream.indices(first, last)
        ]


class _SourceStream:
    """The endless stream of one source."""

    def __init__(self, source: Source, first_shard: int, seed: int, shuffle_shards: int) -> None:
        self._key = f"{seed}/{source.slice}/{source.name}"
        self._shards = [
            (first_shard + number, shard.shard, shard.samples)
            for number, shard in enumerate(source.shards)
            if shard.samples
        ]
        self._num_images = sum(samples for *_, samples in self._shards)
        self._shuffle_shards = shuffle_shards
        self._groups_per_epoch = math.ceil(len(self._shards) / shuffle_shards)
        self._epoch = -1
        self._groups: list[list[tuple[int, str, int]]] = []
        self._starts: list[int] = []
        # Those of the latest two groups of shards are kept.
        self._permutation = lru_cache(2 * shuffle_shards)(permutation)

    def indices(self, first: int, last: int) -> list[SampleIndex]:
        # By the place of a shard in its group: the samples of each group that the range crosses.
        by_place: list[list[SampleIndex]] = [[] for _ in range(self._shuffle_shards)]
        while first < last:
            epoch, position = divmod(first, self._num_images)
            self._begin(epoch)
            group = bisect_right(self._starts, position) - 1
            start = self._starts[group]
            stop = min(position + last - first, self._starts[group + 1])
            shares = self._of_group(epoch, group, position - start, stop - start)
            for samples, share in zip(by_place, shares, strict=False):
                samples += share
            first += stop - position
        return list(chain.from_iterable(by_place))

    def _begin(self, epoch: int) -> None:
        """Lay out an epoch: its shards permuted and cut into groups."""
        if epoch == self._epoch:
            return
        order = permutation(f"{self._key}/{epoch}", len(self._shards)).tolist()
        shards = [self._shards[number] for number in order]
        self._groups = [
            shards[start : start + self._shuffle_shards]
            for start in range(0, len(shards), self._shuffle_shards)
        ]
        sizes = (sum(samples for *_, samples in group) for group in self._groups)
        self._starts = list(accumulate(sizes, initial=0))
        self._epoch = epoch

    def _of_group(self, epoch: int, group: int, start: int, stop: int) -> list[list[SampleIndex]]:
        """Return the samples at positions ``start`` to ``stop`` of a group: of each shard its share of them."""
        sizes = [samples for *_, samples in self._groups[group]]
        firsts, lasts = apportion(start, sizes), apportion(stop, sizes)
        group_number = epoch * self._groups_per_epoch + group
        shares = []
        for shard, first, last in zip(self._groups[group], firsts, lasts, strict=True):
            number, name, num_samples = shard
            samples = self._permutation(f"{self._key}/{epoch}/{name}", num_samples)[first:last].tolist()
            shares.append([SampleIndex(number, sample, epoch, group_number) for sample in samples])
        return shares


def apportion(total: int, weights: Sequence[int]) -> list[int]:
    """Divide ``total`` samples in proportion to weights, by Webster's method, in whole numbers only.

    Of the methods of apportionment this one has what a stream needs: no share falls as the total grows, the shares
    add up to it, and they are exact wherever the proportions are whole.
    """
    # round(certain * weight / sum), as floor((2 a + b) / 2 b) in whole numbers. Rounding up gives each of the k weights
    # at most half a sample too much, so that distributing total - k cannot exceed the total.
    certain, weight_sum = max(0, total - len(weights)), sum(weights)
    shares = [(2 * certain * weight + weight_sum) // (2 * weight_sum) for weight in weights]
    # The rest, about 1.5 samples per weight, goes one by one to the highest quotient weight / (2 share + 1).
    for _ in range(total - sum(shares)):
        best = 0
        for other in range(1, len(weights)):
            # The quotients are compared crosswise, without division; of equals the first wins.
            if weights[other] * (2 * shares[best] + 1) > weights[best] * (2 * shares[other] + 1):
                best = other
        shares[best] += 1
    return shares


def whole_numbers(weights: Sequence[float]) -> list[int]:
    """Return weights in exactly the same proportions as whole numbers."""
    fractions = [Fraction(weight) for weight in weights]
    denominator = math.lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * denominator) for fraction in fractions]
