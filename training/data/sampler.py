"""The order of samples: a pure function of the snapshot and the seed, for ever, at any position.

Nothing here has a state and nothing is as long as the corpus, so that a run resumes at any sample at once:

- A *turn* of a source is one pass over its images. Turn t is a sequence of groups of ``shuffle_shards`` shards;
  which shards, and the samples within each shard, are permuted anew every turn. No image comes a second time
  before every image of its source came once.
- The stream mixes sources, and a group mixes shards, by apportioning: of the first n samples, each gets its
  share of n to within about one sample. Weights that are the sources' numbers of images therefore give each
  image exactly once in every ``num_images`` samples; with other weights a source goes faster or slower through
  its turns, independent of the others.

The samples of a step come sorted by source and shard. A step's loss does not depend on the order within it, and
so each rank's contiguous share of it needs few shards.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from pipeline.rng import permutation
from training.data.snapshot import Snapshot, Source


class Draw(NamedTuple):
    """One sample of the stream.

    ``shard`` indexes ``Snapshot.shards``; ``sample`` counts the shard's training samples from 0; ``turn`` is
    that of its source; ``group`` counts the source's groups over all turns and never falls.
    """

    shard: int
    sample: int
    turn: int
    group: int


class Order:
    """The endless stream of a snapshot's samples under one seed."""

    def __init__(self, snapshot: Snapshot, seed: int, shuffle_shards: int) -> None:
        starts = accumulate((len(source.shards) for source in snapshot.sources), initial=0)
        self._streams = [
            _SourceStream(source, start, seed, shuffle_shards)
            for source, start in zip(snapshot.sources, starts, strict=False)
        ]
        # A source whose images are all set aside has nothing to give, whatever its weight.
        self._weights = whole_numbers(
            [source.weight if source.num_images else 0 for source in snapshot.sources]
        )

    def draws(self, start: int, stop: int) -> list[Draw]:
        """Return the samples at positions ``start`` to ``stop`` of the stream, sorted by source and shard."""
        firsts, lasts = apportion(start, self._weights), apportion(stop, self._weights)
        return [
            draw
            for stream, first, last in zip(self._streams, firsts, lasts, strict=True)
            for draw in stream.draws(first, last)
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
        self._groups_per_turn = math.ceil(len(self._shards) / shuffle_shards)
        self._turn, self._groups, self._starts = -1, [], []
        self._permutations: dict[tuple[int, int], np.ndarray] = {}

    def draws(self, first: int, last: int) -> list[Draw]:
        draws: list[Draw] = []
        while first < last:
            turn, position = divmod(first, self._num_images)
            self._begin(turn)
            group = bisect_right(self._starts, position) - 1
            stop = min(position + last - first, self._starts[group + 1])
            draws += self._of_group(turn, group, position - self._starts[group], stop - self._starts[group])
            first += stop - position
        return draws

    def _begin(self, turn: int) -> None:
        """Lay out a turn: its shards permuted and cut into groups."""
        if turn == self._turn:
            return
        order = permutation(f"{self._key}/{turn}", len(self._shards)).tolist()
        shards = [self._shards[number] for number in order]
        self._groups = [
            shards[start : start + self._shuffle_shards]
            for start in range(0, len(shards), self._shuffle_shards)
        ]
        sizes = (sum(samples for *_, samples in group) for group in self._groups)
        self._starts = list(accumulate(sizes, initial=0))
        self._turn = turn

    def _of_group(self, turn: int, group: int, start: int, stop: int) -> list[Draw]:
        sizes = [samples for *_, samples in self._groups[group]]
        firsts, lasts = apportion(start, sizes), apportion(stop, sizes)
        serial = turn * self._groups_per_turn + group
        draws = []
        for shard, first, last in zip(self._groups[group], firsts, lasts, strict=True):
            samples = self._permutation(turn, *shard)[first:last].tolist()
            draws += [Draw(shard[0], sample, turn, serial) for sample in samples]
        return draws

    def _permutation(self, turn: int, number: int, name: str, samples: int) -> np.ndarray:
        """Return a shard's samples in the turn's order; those of the latest two groups are kept."""
        found = self._permutations.get((turn, number))
        if found is None:
            while len(self._permutations) >= 2 * self._shuffle_shards:
                del self._permutations[next(iter(self._permutations))]
            found = permutation(f"{self._key}/{turn}/{name}", samples)
            self._permutations[turn, number] = found
        return found


def apportion(total: int, weights: Sequence[int]) -> list[int]:
    """Divide ``total`` samples in proportion to weights, by Webster's method, in whole numbers only.

    Of all methods of apportionment this one is chosen for what a stream needs: no share falls as the total
    grows, the shares add up, and they are exact wherever the proportions are whole.
    """
    # Rounding at a divisor that cannot give out too many, then seat by seat: about 1.5 per weight.
    sure, everything = max(0, total - len(weights)), sum(weights)
    shares = [(2 * sure * weight + everything) // (2 * everything) for weight in weights]
    for _ in range(total - sum(shares)):
        best = 0
        for other in range(1, len(weights)):
            # Highest weight / (2 share + 1), ties to the first.
            if weights[other] * (2 * shares[best] + 1) > weights[best] * (2 * shares[other] + 1):
                best = other
        shares[best] += 1
    return shares


def whole_numbers(weights: Sequence[float]) -> list[int]:
    """Return weights in exactly the same proportions as whole numbers."""
    fractions = [Fraction(weight) for weight in weights]
    common = math.lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * common) for fraction in fractions]
