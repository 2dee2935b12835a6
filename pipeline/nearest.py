"""The nearest valid name to one that is wrong: the end of many an error message."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str:
    """Return ``; did you mean X?`` for the candidate closest to ``name``, or nothing."""
    near = difflib.get_close_matches(name, list(candidates), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""
