"""The candidate captions of one image: their order, best first, and which of them are kept and why the others are not.

One pure function, used by the rank stage (what a second CLIP scores), the select stage and `capfilt trace`.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any, Literal

from pipeline.text import same_text_key
from schemas.config import SelectConfig

Reason = Literal[
    "marked",
    "web_caption_never",
    "empty_text",
    "not_scored",
    "filtered_out",
    "below_min_score",
    "same_text",
    "outscored",
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
    match_probability: float | None = None

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Candidate":
        """Return the candidate of a stored row; a number that it has no column for is None."""
        values: dict[str, Any] = {name: row.get(name) for name in CANDIDATE_COLUMNS}
        return cls(**values)


# As the stored rows have them.
CANDIDATE_COLUMNS = tuple(field.name for field in fields(Candidate))


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
    by: Literal["clip", "itm", "both"] = "clip",
    min_match: float = 0.5,
    marked_texts: Collection[str] = (),
) -> list[Choice]:
    """Return every candidate, best first, with the reason why it is not kept.

    - Best first: by ``rerank_score``, candidates that have one before those that have none, then by
      ``score``; equal scores by origin (synthetic, human, web), then by index within the origin.
    - Texts that differ in case alone are one text: its best candidate stands for it.
    - A candidate without a score (its text is empty, or the image does not decode) is never kept, nor one whose
      score is NaN or infinite.
    - By ``itm`` the match probability is the score, and CLIP's do not count. By ``itm`` and ``both`` a candidate whose
      probability is under ``min_match`` is not kept.

    Args:
        top_k: how many distinct texts to keep; None keeps all.
        min_score: the least CLIP score of a candidate that is kept; of no effect by ``itm``.
        web_caption: the web caption is one more candidate (``compete``), not a candidate (``never``), or kept beside
            the ``top_k`` others (``always``).
        marked_texts: keys (``same_text_key``) of texts that someone marked: they are not candidates.
    """
    choices: list[Choice] = []
    # Both by text: the candidates that compete for the top_k places, and those that are kept.
    competing: dict[str, Candidate] = {}
    kept: dict[str, Candidate] = {}
    order = _by_match if by == "itm" else _best_first
    for candidate in sorted(candidates, key=order):
        reason = (
            _unused(candidate, web_caption)
            or _refused(candidate, by, min_match)
            or _unscored(candidate, by, min_score)
        )
        same_as = None
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


def choose_by(
    candidates: Iterable[Candidate], config: SelectConfig, marked_texts: Collection[str] = ()
) -> list[Choice]:
    """Return ``choose`` with the rules of ``[select]``, whose keys are its arguments."""
    return choose(candidates, marked_texts=marked_texts, **vars(config))


def choose_again(
    rows: Iterable[Mapping[str, Any]], config: SelectConfig | None, marked_texts: Collection[str] = ()
) -> list[Choice]:
    """Return what ``select`` chose of an image's stored rows; by no rule where its config is not known."""
    candidates = [Candidate.of_row(row) for row in rows]
    # Of a human source every distinct caption is kept.
    if config is None or any(candidate.origin == "human" for candidate in candidates):
        return choose(candidates, marked_texts=marked_texts)
    return choose_by(candidates, config, marked_texts)


def _unused(candidate: Candidate, web_caption: str) -> Reason | None:
    """Return why a candidate takes no part, whatever was computed of it, or None."""
    if web_caption == "never" and candidate.origin == "web":
        return "web_caption_never"
    return None if candidate.text else "empty_text"


def _refused(candidate: Candidate, by: str, min_match: float) -> Reason | None:
    """Return why the filter's verdict keeps a candidate out, or None."""
    if by == "clip":
        return None
    probability = candidate.match_probability
    if probability is None or not isfinite(probability):
        return "not_scored"
    return "filtered_out" if probability < min_match else None


def _unscored(candidate: Candidate, by: str, min_score: float | None) -> Reason | None:
    """Return why CLIP's score keeps a candidate out, or None."""
    if by == "itm":
        return None
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


def _by_match(candidate: Candidate) -> tuple[bool, float, int, int, str]:
    probability = candidate.match_probability
    is_finite = probability is not None and isfinite(probability)
    return (
        not is_finite,
        -(probability or 0.0) if is_finite else 0.0,
        _ORIGIN_ORDER[candidate.origin],
        candidate.candidate,
        candidate.text,
    )
