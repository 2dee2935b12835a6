"""Random numbers as pure functions of what they are for, so that they depend on no batch, order, worker or rank.

Seeds are hashes of their parts. Streams of uniform numbers and permutations are SplitMix64 (Steele, Lea and Flood,
OOPSLA 2014), which is a counter and a hash: any step of a stream is computed directly. The seed that the table
``candidates`` keeps of a caption is all that it takes to draw its numbers again.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

# The increment of SplitMix64's counter and the two multipliers of its hash.
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_DOUBLE_BITS = 53


def seed_for(*parts: int | str) -> int:
    """Return a seed of 63 bits: the same parts give the same seed on every machine."""
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def stream_seed(seed: int, uid: str, index: int) -> int:
    """Return the 64-bit seed of sample ``index`` of an image.

    Args:
        seed: of the run, ``corpus.seed``.
        uid: the image's identity; any text.
        index: of the sample among the image's, from 0.
    """
    digest = hashlib.blake2b(f"{seed}/{index}/{uid}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def caption_seeds(seed: int, uids: Sequence[str], num_samples: int) -> np.ndarray:
    """Return the stream seeds of every sample of some images: uint64 of shape (images, samples)."""
    seeds = [[stream_seed(seed, uid, index) for index in range(num_samples)] for uid in uids]
    return np.array(seeds, np.uint64).reshape(len(uids), num_samples)


def uniforms(stream_seeds: np.ndarray, steps: int | Sequence[int] | np.ndarray) -> np.ndarray:
    """Return doubles in [0, 1) for streams and steps.

    Args:
        stream_seeds: uint64, any shape S.
        steps: how many steps, from 0; or the steps themselves (T of them).

    Returns:
        float64 of shape S + (T,), multiples of 2**-53.
    """
    steps = np.arange(steps) if isinstance(steps, int) else np.asarray(steps)
    bits = _splitmix64(np.asarray(stream_seeds, np.uint64)[..., None], steps.astype(np.uint64))
    # The upper 53 bits: as many as a double's mantissa holds, so that each is exact.
    return (bits >> np.uint64(64 - _DOUBLE_BITS)).astype(np.float64) * 2.0**-_DOUBLE_BITS


def permutation(key: str, size: int) -> np.ndarray:
    """Return the numbers from 0 to ``size`` - 1 in an order that the key alone decides.

    The order is that of SplitMix64's outputs, one for each number. numpy.random's permutations may change between
    versions of NumPy, and a run resumed after an upgrade would see other samples.
    """
    seed = np.uint64(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]))
    return np.argsort(_splitmix64(seed, np.arange(size, dtype=np.uint64)), kind="stable")


def _splitmix64(seeds: np.ndarray | np.uint64, steps: np.ndarray) -> np.ndarray:
    """Return the outputs of the generators with these seeds at these steps, from 0; 64 bits each."""
    # Unsigned arithmetic modulo 2**64 is part of the generator.
    with np.errstate(over="ignore"):
        state = seeds + (steps + np.uint64(1)) * _GAMMA
        state = (state ^ (state >> np.uint64(30))) * _MIX_1
        state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))
