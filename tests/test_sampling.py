"""Uniform numbers: keyed by seed, uid, sample and step; evenly spread; the same for ever."""

import numpy as np

from pipeline.rng import caption_seeds, stream_seed, uniforms


def test_values_never_change() -> None:
    # A corpus made with another version must not get other captions.
    seed = stream_seed(0, "d41d8cd98f00b204e9800998ecf8427e", 3)
    assert seed == 0x78E068B1F181744E
    expected = [0.2353964156284487, 0.8050593890829746, 0.6147744982028811]
    assert uniforms(np.array(seed, np.uint64), 3).tolist() == expected


def test_splitmix64_reference_outputs() -> None:
    # The first outputs of SplitMix64 seeded with 1234567, as its reference implementation prints them.
    reference = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    expected = [(value >> 11) * 2.0**-53 for value in reference]
    assert uniforms(np.array(1234567, np.uint64), 4).tolist() == expected


def test_a_number_depends_on_its_own_key_alone() -> None:
    uids = [f"{index:032x}" for index in range(20)]
    whole = uniforms(caption_seeds(5, uids, 10), 30)
    assert whole.shape == (20, 10, 30)
    assert (uniforms(caption_seeds(5, uids[7:8], 4), 12) == whole[7:8, :4, :12]).all()
    assert (uniforms(caption_seeds(5, uids[::-1], 10), [29, 3])[..., 1] == whole[::-1, :, 3]).all()
    for other in (
        uniforms(caption_seeds(6, uids, 10), 30),
        uniforms(caption_seeds(5, [uid[::-1] for uid in uids], 10), 30)[1:],
    ):
        assert not np.isin(other, whole).any()


def test_every_key_gets_another_stream() -> None:
    seeds = caption_seeds(0, [str(index) for index in range(5000)], 10)
    assert len(np.unique(seeds)) == seeds.size
    # "1" of sample 12 and "21" of sample 1 must not be confused.
    assert stream_seed(1, "21", 1) != stream_seed(1, "1", 12) != stream_seed(11, "1", 2)


def test_numbers_are_uniform_and_independent() -> None:
    values = uniforms(caption_seeds(0, [f"uid-{index}" for index in range(2000)], 10), 20)
    assert values.min() >= 0 and values.max() < 1
    # Chi-square over 100 bins: 99 degrees of freedom, standard deviation 14.
    counts, _ = np.histogram(values, 100, (0, 1))
    expected = values.size / 100
    assert abs(((counts - expected) ** 2 / expected).sum() - 99) < 5 * 14
    # Neighbours in step, sample and image are uncorrelated (standard deviation 1 / sqrt(400,000) = 0.0016).
    for axis in range(3):
        left = np.take(values, range(values.shape[axis] - 1), axis).ravel()
        right = np.take(values, range(1, values.shape[axis]), axis).ravel()
        assert abs(np.corrcoef(left, right)[0, 1]) < 0.008
    # And every low bit is a fair coin.
    bits = (values * 2.0**53).astype(np.uint64)
    shares = [((bits >> np.uint64(bit)) & np.uint64(1)).mean() for bit in range(53)]
    assert np.allclose(shares, 0.5, atol=0.005)
