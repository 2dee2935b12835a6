"""Uids that two shards share, found among any number of them: the uids lie sorted in files, and memory is bounded."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.manifest.verify.progress import Discrepancy, VerifyProgress
from pipeline.shards.uids import PackedUids, unpack_uids

# In memory at once, at some 70 bytes each.
_UIDS_AT_ONCE = 3_000_000

# By kind of uid: what two shards that share some are said to do.
_SAID = {"listed": "are also in", "stored": "are ok, and also in"}


@dataclass(frozen=True, slots=True)
class CheckedShard:
    """A shard that was read: the name of its uids' files, and by kind the file of the corpus that they come from."""

    name: str
    paths: dict[str, str]


def doubled_uids(
    progress: VerifyProgress, shards: Sequence[CheckedShard], *, at_once: int = _UIDS_AT_ONCE
) -> Iterator[Discrepancy]:
    """Find uids that two url shards list, retries not counted, or whose image two crawled shards hold.

    Args:
        at_once: so many uids are in memory at once, about.
    """
    for kind, said in _SAID.items():
        having = [shard for shard in shards if kind in shard.paths]
        number, examples = Counter[tuple[int, int]](), dict[tuple[int, int], str]()
        for words_N2, owners in _portions(progress, [shard.name for shard in having], kind, at_once):
            for pair, uids_N2 in _shared(words_N2, owners).items():
                number[pair] += len(uids_N2)
                examples.setdefault(pair, *unpack_uids(uids_N2[:1]))
        for first, second in sorted(number):
            path, example = having[first].paths[kind], examples[first, second]
            what = f"{number[first, second]:,} uids {said} {path}, such as {example}"
            yield Discrepancy(path=having[second].paths[kind], what=what)


def _portions(
    progress: VerifyProgress, names: Sequence[str], kind: str, at_once: int
) -> Iterator[tuple[PackedUids, NDArray[np.int64]]]:
    """Yield the uids of all shards with the places of their shards, those that begin alike together.

    A uid is a digest: its first word is as likely in one range of numbers as in another of the same width.
    """
    total = sum(progress.uids_2N(name, kind).shape[1] for name in names)
    number = -(-total // at_once)
    for portion in range(number):
        low, high = (np.uint64(part * (2**64 - 1) // number) for part in (portion, portion + 1))
        parts = [
            _between(progress.uids_2N(name, kind), low, high, is_last=portion == number - 1) for name in names
        ]
        owners = np.repeat(np.arange(len(parts)), [part.shape[1] for part in parts])
        yield np.concatenate(parts, axis=1).T, owners


def _between(words_2N: PackedUids, low: np.uint64, high: np.uint64, *, is_last: bool) -> PackedUids:
    """Return a copy of the uids whose first word is at least ``low`` and below ``high``, the last portion's end too."""
    start, end = np.searchsorted(words_2N[0], [low, high])
    return np.array(words_2N[:, start : None if is_last else end])


def _shared(words_N2: PackedUids, owners: NDArray[np.int64]) -> dict[tuple[int, int], PackedUids]:
    """Return what the uids of two owners have in common, by the two."""
    order = np.lexsort((owners, words_N2[:, 1], words_N2[:, 0]))
    words_N2, owners = words_N2[order], owners[order]
    again = np.flatnonzero((words_N2[1:] == words_N2[:-1]).all(axis=1) & (owners[1:] != owners[:-1]))
    places: dict[tuple[int, int], list[int]] = {}
    for place in again.tolist():
        places.setdefault((int(owners[place]), int(owners[place + 1])), []).append(place)
    return {pair: words_N2[rows] for pair, rows in places.items()}
