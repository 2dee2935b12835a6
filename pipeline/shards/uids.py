"""The identity of a sample, and many of them in little memory."""

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

# uids packed as two 64-bit words each: 16 bytes, where a Python string takes 81.
PackedUids = NDArray[np.uint64]


def sample_uid(source: str, url: str) -> str:
    """Return the 128-bit hex identity of a sample: stable across re-crawls and re-sharding."""
    return hashlib.sha256(f"{uid_prefix(source)}{url}".encode()).hexdigest()[:32]


def uid_prefix(source: str) -> str:
    """Return what stands before the URL in the text whose digest is a sample's identity."""
    return f"{source}\n"


def pack_uids(uids: Iterable[str]) -> PackedUids:
    """Return uids of 32 hex digits as words_N2."""
    data = bytes.fromhex("".join(uids))
    return np.frombuffer(data, dtype=">u8").astype(np.uint64).reshape(-1, 2)


def unpack_uids(words_N2: PackedUids) -> list[str]:
    """Return the uids that ``pack_uids`` packed."""
    text = words_N2.astype(">u8").tobytes().hex()
    return [text[start : start + 32] for start in range(0, len(text), 32)]
