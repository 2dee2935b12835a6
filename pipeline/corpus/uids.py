"""Which rows of a list are new, known already, or duplicates: exact, at 16 bytes a row.

A uid is held as two 64-bit words, so that the 115M rows of a LAION list take 1.8 GB where a Python set would
take 12. Arrays are named after their shape: N rows, K known uids, 2 words.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Rows = NDArray[np.int64]


def pack_uids(uids: Iterable[str]) -> Words:
    """Return uids of 32 hex digits as words_N2."""
    data = bytes.fromhex("".join(uids))
    return np.frombuffer(data, dtype=">u8").astype(np.uint64).reshape(-1, 2)


def unpack_uids(words_N2: Words) -> list[str]:
    """Return the uids that ``pack_uids`` packed."""
    text = words_N2.astype(">u8").tobytes().hex()
    return [text[start : start + 32] for start in range(0, len(text), 32)]


class KnownUids:
    """A fixed set of uids, for membership tests of many at once."""

    def __init__(self, words_K2: Words) -> None:
        order = np.argsort(words_K2[:, 0])
        self._high_K = words_K2[order, 0]
        self._low_K = words_K2[order, 1]

    def contains(self, words_N2: Words) -> NDArray[np.bool_]:
        """Tell for each uid whether it is in the set."""
        found_N = np.zeros(len(words_N2), dtype=bool)
        at = np.searchsorted(self._high_K, words_N2[:, 0])
        rows = np.arange(len(words_N2))
        # Several known uids may share their first word: look on until it changes.
        while True:
            inside = at < len(self._high_K)
            rows, at = rows[inside], at[inside]
            alike = self._high_K[at] == words_N2[rows, 0]
            rows, at = rows[alike], at[alike]
            if not len(rows):
                return found_N
            equal = self._low_K[at] == words_N2[rows, 1]
            found_N[rows[equal]] = True
            rows, at = rows[~equal], at[~equal] + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """The rows of a list by uid.

    ``fresh`` marks the first row of each uid that is not known; ``members`` are, in order, the rows of those
    uids that have several, and ``heads`` the first row of each one's uid.
    """

    fresh: NDArray[np.bool_]
    members: Rows
    heads: Rows


def group_rows(words_N2: Words, known_N: NDArray[np.bool_]) -> Grouping:
    """Group the rows that are not known by their uid."""
    fresh_N = ~known_N
    shared = _sharing_first_word(words_N2, fresh_N)
    high, low = words_N2[shared, 0], words_N2[shared, 1]
    order = np.lexsort((shared, low, high))
    rows, high, low = shared[order], high[order], low[order]
    repeats = np.zeros(len(rows), dtype=bool)
    repeats[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    heads = rows[np.maximum.accumulate(np.where(repeats, 0, np.arange(len(rows))))]
    fresh_N[rows[repeats]] = False
    several = repeats.copy()
    several[:-1] |= repeats[1:]
    members, heads = rows[several], heads[several]
    in_order = np.argsort(members)
    return Grouping(fresh=fresh_N, members=members[in_order], heads=heads[in_order])


def _sharing_first_word(words_N2: Words, among_N: NDArray[np.bool_]) -> Rows:
    """Return the rows whose first word another row has too: few, so that only they need the exact sort."""
    rows = np.flatnonzero(among_N)
    rows = rows[np.argsort(words_N2[rows, 0])]
    high = words_N2[rows, 0]
    equal = high[1:] == high[:-1]
    shared = np.zeros(len(rows), dtype=bool)
    shared[1:] |= equal
    shared[:-1] |= equal
    return rows[shared]
