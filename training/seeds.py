"""Random choices that depend on what they are for, and on nothing that was drawn before."""

import hashlib


def seed_for(*parts: int | str) -> int:
    """Return a seed of 63 bits: the same parts give the same one, on every machine."""
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1
