"""The order of samples: permutations, shares, epochs; at any position, without what came before."""

import hashlib
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.rng import permutation
from schemas.records import OutputFile, SnapshotShard
from training.data.sampler import SampleIndex, Sampler, apportion, whole_numbers
from training.data.snapshot import Snapshot, Source

WEIGHTS = st.lists(st.integers(0, 10**12), min_size=1, max_size=7).filter(any)
SIZES = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=7), min_size=1, max_size=3)


def snapshot_of(
    sizes: list[list[int]], weights: dict[int, float] | None = None, held_out: int = 0
) -> Snapshot:
    """Return sources with shards of such sizes, no file behind them."""
    weights = weights or {}
    return Snapshot(
        tuple(
            Source(
                slice=0,
                name=f"source{number}",
                kind="web",
                given_weight=weights.get(number),
                shards=tuple(
                    SnapshotShard(
                        corpus="",
                        source=f"source{number}",
                        shard=f"{place:05d}",
                        tar=OutputFile(path="", bytes=0, sha256="", rows=size),
                    )
                    for place, size in enumerate(shards)
                ),
            )
            for number, shards in enumerate(sizes)
        ),
        "digest",
    )


def samples(indices: list[SampleIndex]) -> list[tuple[int, int]]:
    return [(index.shard, index.sample) for index in indices]


# -- permutations ----------------------------------------------------------------------------------------------


@given(st.text(max_size=20), st.integers(0, 500))
def test_a_permutation_has_every_number_once(key: str, size: int) -> None:
    assert sorted(permutation(key, size).tolist()) == list(range(size))


def test_a_permutation_sorts_by_splitmix64() -> None:
    def splitmix64(state: int) -> int:
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        return state ^ state >> 31

    start = int(hashlib.sha256(b"1/0/cc/0").hexdigest()[:16], 16)
    hashes = [splitmix64((start + number * 0x9E3779B97F4A7C15) % 2**64) for number in range(1, 101)]
    expected = sorted(range(100), key=lambda number: hashes[number])
    assert permutation("1/0/cc/0", 100).tolist() == expected
    # The same for ever: a run resumed years later goes on with the same samples.
    assert permutation("1/0/cc/0", 8).tolist() == [0, 1, 7, 6, 2, 3, 5, 4]


def test_permutations_look_random() -> None:
    places = np.array([permutation(f"key {number}", 10) for number in range(4000)])
    # Each number is 400 times at each place; 4 standard deviations are 76.
    counts = np.array([[np.sum(places[:, place] == number) for number in range(10)] for place in range(10)])
    assert np.abs(counts - 400).max() < 95
    assert len({tuple(row) for row in places.tolist()}) > 3990


# -- shares ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**10), WEIGHTS)
def test_shares_add_up_and_never_fall(total: int, weights: list[int]) -> None:
    current, later = apportion(total, weights), apportion(total + 1, weights)
    assert sum(current) == total
    assert sorted(b - a for a, b in zip(current, later, strict=True)) == [0] * (len(weights) - 1) + [1]
    assert all(share == 0 for share, weight in zip(current, weights, strict=True) if weight == 0)


@given(st.integers(0, 10**6), WEIGHTS)
def test_whole_shares_are_exact(times: int, weights: list[int]) -> None:
    assert apportion(times * sum(weights), weights) == [times * weight for weight in weights]


@given(st.integers(0, 10**9), WEIGHTS)
def test_shares_are_near_the_proportion(total: int, weights: list[int]) -> None:
    for share, weight in zip(apportion(total, weights), weights, strict=True):
        assert abs(share - total * weight / sum(weights)) < 1 + len(weights) / 2


@given(st.lists(st.floats(1e-6, 1e12), min_size=1, max_size=5))
def test_weights_keep_their_proportions_exactly(weights: list[float]) -> None:
    whole = whole_numbers(weights)
    for weight, number in zip(weights, whole, strict=True):
        assert number / whole[0] == pytest.approx(weight / weights[0], rel=1e-12)


# -- the stream ------------------------------------------------------------------------------------------------


@given(SIZES, st.integers(0, 2**63), st.integers(1, 4), st.integers(0, 3))
def test_by_default_every_image_comes_once_in_each_epoch(
    sizes: list[list[int]], seed: int, shuffle_shards: int, epoch: int
) -> None:
    snapshot = snapshot_of(sizes)
    total = snapshot.num_images
    indices = Sampler(snapshot, seed, shuffle_shards).indices(epoch * total, (epoch + 1) * total)
    everything = [
        (number, sample) for number, shard in enumerate(snapshot.shards) for sample in range(shard.samples)
    ]
    assert sorted(samples(indices)) == everything
    assert {index.epoch for index in indices} == {epoch}


@given(SIZES, st.integers(0, 10), st.integers(1, 4), st.lists(st.integers(0, 60), min_size=2, max_size=5))
def test_a_stretch_is_the_sum_of_its_parts_wherever_it_begins(
    sizes: list[list[int]], seed: int, shuffle_shards: int, cuts: list[int]
) -> None:
    snapshot = snapshot_of(sizes)
    cuts = sorted(cuts)
    # A fresh order for each part: nothing is remembered.
    parts = [Sampler(snapshot, seed, shuffle_shards).indices(start, stop) for start, stop in pairwise(cuts)]
    whole = Sampler(snapshot, seed, shuffle_shards).indices(cuts[0], cuts[-1])
    assert sorted(index for part in parts for index in part) == sorted(whole)


@given(SIZES, st.integers(1, 4), st.integers(1, 9))
def test_groups_never_fall_and_hold_few_shards(
    sizes: list[list[int]], shuffle_shards: int, batch_size: int
) -> None:
    snapshot = snapshot_of(sizes)
    order = Sampler(snapshot, 1, shuffle_shards)
    source_of = [number for number, source in enumerate(snapshot.sources) for _ in source.shards]
    last, shards = Counter(), {}
    for start in range(0, 3 * snapshot.num_images, batch_size):
        current = Counter()
        for index in order.indices(start, start + batch_size):
            source = source_of[index.shard]
            assert index.group >= last[source]
            current[source] = max(current[source], index.group)
            shards.setdefault((source, index.group), set()).add(index.shard)
        last |= current
    assert max(map(len, shards.values())) <= shuffle_shards


def test_with_other_weights_a_source_goes_through_its_turns_at_its_own_speed() -> None:
    snapshot = snapshot_of([[6, 4], [5, 5, 10]], weights={0: 3.0, 1: 1.0})
    indices = Sampler(snapshot, 3, 2).indices(0, 80)
    seen = Counter(samples(indices))
    small = {sample: times for sample, times in seen.items() if sample[0] < 2}
    large = {sample: times for sample, times in seen.items() if sample[0] >= 2}
    # 60 indices of 10 images, 20 of 20.
    assert len(small) == 10 and set(small.values()) == {6}
    assert len(large) == 20 and set(large.values()) == {1}
    # At any moment, no image of a source is ahead of another by more than one.
    for stop in range(0, 80, 7):
        times = Counter(samples(Sampler(snapshot, 3, 2).indices(0, stop)))
        counts = [times[0, sample] for sample in range(6)] + [times[1, sample] for sample in range(4)]
        assert max(counts) - min(counts) <= 1


def test_every_batch_has_its_share_of_each_source_and_each_shard_of_the_group() -> None:
    snapshot = snapshot_of([[96] * 4, [96] * 12])
    order = Sampler(snapshot, 5, 4)
    for start in range(0, 2 * snapshot.num_images, 32):
        by_shard = Counter(index.shard for index in order.indices(start, start + 32))
        assert sum(times for shard, times in by_shard.items() if shard < 4) == 8
        assert set(by_shard.values()) <= {2, 6}


def test_a_rank_needs_few_shards() -> None:
    """Half of a batch, the same half each time, is of about half of the shards."""
    snapshot = snapshot_of([[100] * 8])
    order = Sampler(snapshot, 5, 8)
    halves = [order.indices(start, start + 32)[:16] for start in range(0, 800, 32)]
    assert {index.shard for half in halves for index in half} < set(range(8))
    assert len({index.shard for half in halves for index in half}) <= 5


def test_seeds_and_turns_differ() -> None:
    snapshot = snapshot_of([[30, 30, 30]])
    first, other = (samples(Sampler(snapshot, seed, 1).indices(0, 30)) for seed in (1, 2))
    again = samples(Sampler(snapshot, 1, 1).indices(90, 120))
    assert first != other and first != again


def test_sources_and_shards_with_nothing_left_give_nothing() -> None:
    snapshot = snapshot_of([[3], [2, 4]], weights={0: 5.0})
    empty = Snapshot(
        tuple(
            Source(
                slice=0,
                name=source.name,
                kind="web",
                given_weight=source.given_weight,
                shards=tuple(
                    SnapshotShard(
                        corpus="",
                        source=shard.source,
                        shard=shard.shard,
                        tar=shard.tar,
                        held_out=tuple("abcd"[: shard.tar.rows]) if shard.tar.rows < 4 else (),
                    )
                    for shard in source.shards
                ),
            )
            for source in snapshot.sources
        ),
        "digest",
    )
    assert Counter(samples(Sampler(empty, 1, 2).indices(0, 8))) == {(2, sample): 2 for sample in range(4)}
