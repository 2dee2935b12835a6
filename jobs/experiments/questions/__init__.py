"""The experiments, in the order in which `capfilt experiment all` runs them."""

from jobs.experiments.questions.bootstrapping import DECOUPLED, ROUNDS_QUESTION
from jobs.experiments.questions.captioning import CAPTIONS, DECODING, SEARCH
from jobs.experiments.questions.curating import ATTRIBUTES, CURATION, SELECTION
from jobs.experiments.questions.question import NUM_CAPTIONS, Question
from jobs.experiments.questions.training import LONGER, LOSSES, SHARING, STAGES
from schemas.errors import CapfiltError, did_you_mean

__all__ = ["NUM_CAPTIONS", "QUESTIONS", "Question", "question"]

QUESTIONS = {
    each.name: each
    for each in (
        ATTRIBUTES,
        CURATION,
        SELECTION,
        CAPTIONS,
        DECODING,
        SEARCH,
        STAGES,
        LOSSES,
        SHARING,
        LONGER,
        DECOUPLED,
        ROUNDS_QUESTION,
    )
}


def question(name: str) -> Question:
    """Return an experiment by its name. Raises CapfiltError where there is none."""
    if name not in QUESTIONS:
        raise CapfiltError(f"experiment {name!r}: there is no such one{did_you_mean(name, list(QUESTIONS))}; "
                           f"there are {', '.join(QUESTIONS)}")  # fmt: skip
    return QUESTIONS[name]
