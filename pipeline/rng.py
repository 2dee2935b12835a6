"""Uniform numbers for sampling, keyed by (run seed, uid, sample index, step) and by nothing else.

The stream of one caption is SplitMix64 seeded with ``stream_seed``; the number of a step is the step's output
of that generator, computed directly (the generator is a counter and a hash). So a caption's randomness does
not depend on its batch, its place in the batch, the order of the images or the worker, and the seed that the
table ``candidates`` keeps is all that it takes to draw the same numbers again.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_DOUBLE_BITS = 53


def stream_seed(seed: int, uid: str, index: int) -> int:
    """Return the 64-bit seed of sample ``index`` of an image.

    Args:
        seed: of the run, ``corpus.seed``.
        uid: the image's identity; any text.
        index: of the sample among the image's, from 0.
    """
    digest = hashlib.blake2b(f"{seed}/{index}/{uid}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniforms(stream_seeds: np.ndarray, steps: int | Sequence[int] | np.ndarray) -> np.ndarray:
    """Return doubles in [0, 1) for streams and steps.

    Args:
        stream_seeds: uint64, any shape S.
        steps: how many steps, from 0; or the steps themselves (T of them).

    Returns:
        float64 of shape S + (T,), multiples of 2**-53.
    """
    steps = np.arange(steps) if isinstance(steps, int) else np.asarray(steps)
    seeds = np.asarray(stream_seeds, np.uint64)[..., None]
    with np.errstate(over="ignore"):
        state = seeds + (steps.astype(np.uint64) + np.uint64(1)) * _GAMMA
        state = (state ^ (state >> np.uint64(30))) * _MIX_1
        state = (state ^ (state >> np.uint64(27))) * _MIX_2
    bits = state ^ (state >> np.uint64(31))
    return (bits >> np.uint64(64 - _DOUBLE_BITS)).astype(np.float64) * 2.0**-_DOUBLE_BITS


def caption_seeds(seed: int, uids: Sequence[str], num_samples: int) -> np.ndarray:
    """Return the stream seeds of every sample of some images: uint64 of shape (images, samples)."""
    seeds = [[stream_seed(seed, uid, index) for index in range(num_samples)] for uid in uids]
    return np.array(seeds, np.uint64).reshape(len(uids), num_samples)
