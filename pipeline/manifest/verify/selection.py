"""Which shards of a corpus are verified: all, those of a source, of some numbers, or a share drawn by a hash."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from schemas.errors import CapfiltError

_RANGE = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSelection:
    """Some shards; those that all of its parts name.

    ``source``: of this one; empty for all. ``numbers``: in one of these ranges, both ends included; none for all.
    ``share``: of all shards, drawn by a hash of their names and ``seed``: the same ones whenever it is asked, however
    many others there are.
    """

    source: str = ""
    numbers: tuple[tuple[int, int], ...] = ()
    share: float = 1.0
    seed: int = 0

    def has(self, source: str, shard: str) -> bool:
        """Tell whether a shard is among them."""
        return (
            self.source in ("", source)
            and (not self.numbers or (shard.isdigit() and self._has_number(int(shard))))
            and (self.share >= 1 or _place(self.seed, source, shard) < self.share)
        )

    def _has_number(self, number: int) -> bool:
        return any(first <= number <= last for first, last in self.numbers)

    def __str__(self) -> str:
        """Say which, for people; empty for all."""
        ranges = ", ".join(f"{first}-{last}" if first < last else f"{first}" for first, last in self.numbers)
        parts = [
            f"source {self.source}" if self.source else "",
            f"shards {ranges}" if ranges else "",
            f"a sample of {self.share:g}, seed {self.seed}" if self.share < 1 else "",
        ]
        return "; ".join(filter(None, parts))


EVERY_SHARD = ShardSelection()


def parse_numbers(text: str) -> tuple[tuple[int, int], ...]:
    """Return the ranges that ``0,7,100-199`` names. Raises CapfiltError."""
    ranges = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise CapfiltError(f"--shards {text!r}: numbers and ranges of shards, such as 0,7,100-199")
        ranges.append((int(match[1]), int(match[2] or match[1])))
    return tuple(ranges)


def require_some(selection: ShardSelection, shards: Iterable[tuple[str, str]]) -> None:
    """Raise CapfiltError where a selection names none of the shards that there are."""
    shards = list(shards)
    if selection == EVERY_SHARD or any(selection.has(*shard) for shard in shards):
        return
    sources = ", ".join(sorted({source for source, _ in shards})) or "none"
    raise CapfiltError(
        f"no shard is among those to verify ({selection}); the corpus has {len(shards):,} shards, "
        f"its sources: {sources}"
    )


def _place(seed: int, source: str, shard: str) -> float:
    """Return a number from 0 to 1 that follows from the shard's name and the seed."""
    digest = hashlib.sha256(f"{seed}\n{source}\n{shard}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64
