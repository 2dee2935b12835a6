"""Errors that a user can correct, and the "did you mean" that many of their messages end with."""

import difflib
from collections.abc import Iterable


class CapfiltError(Exception):
    """Report an error in the user's input: what is wrong, where, and the key or command that corrects it.

    Raised before any work starts wherever that is possible. The command line prints the message alone
    and exits with 2. Takes one string, so that it survives the pickling that Ray does.
    """


class NotFiniteError(CapfiltError):
    """Report that a model computed NaN or infinity from weights and inputs that are finite.

    It computes the same at every try: a stage quarantines the shard, and an evaluation ends.
    """


class CorruptShardError(CapfiltError):
    """Report bytes on storage that differ from the record that committed them."""


class TryAgainLaterError(CapfiltError):
    """Report that the storage, or the cluster, was away for longer than a run waits for it. Exit code 4."""


class DeviceLostError(TryAgainLaterError):
    """Report that this process can use its device no more, after an error there that was charged to a shard."""


def did_you_mean(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str:
    """Return ``; did you mean X?`` for the candidate closest to ``name``, or nothing."""
    near = difflib.get_close_matches(name, list(candidates), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
