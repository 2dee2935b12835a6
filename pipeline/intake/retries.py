"""What ``--retry`` names: reasons, statuses, or ``transient`` for all that may succeed without a change."""

from schemas.errors import CapfiltError, did_you_mean
from schemas.statuses import REASONS, SAMPLE_STATUSES

TRANSIENT = frozenset(name for name, reason in REASONS.items() if reason.transient)
# What a later shard tries already is decided there.
_REASONS = {name: reason for name, reason in REASONS.items() if name != "retried"}
_STATUSES = tuple(status for status in SAMPLE_STATUSES if status != "ok")


def retried_reasons(words: str) -> frozenset[str]:
    """Return the reasons that comma-separated words name. Raises CapfiltError for a word that is none of them."""
    return frozenset().union(*(_named(word.strip().lower()) for word in words.split(",")))


def _named(word: str) -> frozenset[str]:
    if word == "transient":
        return TRANSIENT
    if word in _STATUSES:
        return frozenset(name for name, reason in _REASONS.items() if reason.status == word)
    if word in _REASONS:
        return frozenset((word,))
    near = did_you_mean(word, ("transient", *_STATUSES, *_REASONS)) or "."
    raise CapfiltError(
        f"--retry {word!r} is not a reason or a status{near} Statuses: transient, "
        f"{', '.join(_STATUSES)}. Reasons: {', '.join(_REASONS)}"
    )
