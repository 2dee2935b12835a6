"""The candidate captions of one image: their order, best first, and which of them are kept and why the others are not.

One pure function, used by the rank stage (what a second CLIP scores), the select stage and `capfilt trace`.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Literal

from pipeline.text import same_text_key

Reason = Literal[
    "marked", "web_caption_never", "empty_text", "not_scored", "below_min_score", "same_text", "outscored"
]
_ORIGIN_ORDER = {"synthetic": 0, "human": 1, "web": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One text of an image; columns as in the table ``candidates``."""

    origin: str
    candidate: int
    text: str
    score: float | None
    rerank_score: float | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """A candidate and why it is not kept; ``reason`` is None for one that is kept.

    ``same_as``: the better candidate with the same text, where ``reason`` is ``same_text``.
    """

    candidate: Candidate
    reason: Reason | None
    same_as: Candidate | None = None


def choose(
    candidates: Iterable[Candidate],
    *,
    top_k: int | None = None,
    min_score: float | None = None,
    web_caption: Literal["compete", "always", "never"] = "compete",
    marked_texts: Collection[str] = (),
) -> list[Choice]:
    """Return every candidate, best first, with the reason why it is not kept.

    - Best first: by ``rerank_score``, candidates that have one before those that have none, then by
      ``score``; equal scores by origin (synthetic, human, web), then by index within the origin.
    - Texts that differ in case alone are one text: its best candidate stands for it.
    - A candidate without a score (its text is empty, or the image does not decode) is never kept, nor one whose
      score is NaN or infinite.

    Args:
        top_k: how many distinct texts to keep; None keeps all.
        min_score: the least score of a candidate that is kept.
        web_caption: the web caption is one more candidate (``compete``), not a candidate (``never``), or kept beside
            the ``top_k`` others (``always``).
        marked_texts: keys (``same_text_key``) of texts that someone marked: they are not candidates.
    """
    choices: list[Choice] = []
    # Both by text: the candidates that compete for the top_k places, and those that are kept.
    competing: dict[str, Candidate] = {}
    kept: dict[str, Candidate] = {}
    for candidate in sorted(candidates, key=_best_first):
        reason, same_as = _unusable(candidate, min_score, web_caption), None
        text = same_text_key(candidate.text)
        if text in marked_texts:
            reason = "marked"
        if reason is None and not (web_caption == "always" and candidate.origin == "web"):
            best = competing.setdefault(text, candidate)
            if best is not candidate:
                reason, same_as = "same_text", best
            elif top_k is not None and len(competing) > top_k:
                reason = "outscored"
        if reason is None:
            best = kept.setdefault(text, candidate)
            if best is not candidate:
                reason, same_as = "same_text", best
        choices.append(Choice(candidate, reason, same_as))
    return choices


def _unusable(candidate: Candidate, min_score: float | None, web_caption: str) -> Reason | None:
    """Return why a candidate is not kept whatever the others are, or None."""
    if web_caption == "never" and candidate.origin == "web":
        return "web_caption_never"
    if not candidate.text:
        return "empty_text"
    score = _finite_score(candidate)
    if score is None:
        return "not_scored"
    return "below_min_score" if min_score is not None and score < min_score else None


def _finite_score(candidate: Candidate) -> float | None:
    """Return the score; None where there is none, or where it or ``rerank_score`` is NaN or infinite."""
    score = candidate.score
    if score is None or not isfinite(score) or not isfinite(candidate.rerank_score or 0.0):
        return None
    return score


def _best_first(candidate: Candidate) -> tuple[bool, bool, float, float, int, int, str]:
    score = _finite_score(candidate)
    return (
        score is None,
        candidate.rerank_score is None,
        0.0 if score is None else -(candidate.rerank_score or 0.0),
        0.0 if score is None else -score,
        _ORIGIN_ORDER[candidate.origin],
        candidate.candidate,
        candidate.text,
    )
