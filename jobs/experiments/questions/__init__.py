"""The experiments, each in a file of its own, in the order in which `capfilt experiment all` runs them."""

from jobs.experiments.questions.attributes import ATTRIBUTES
from jobs.experiments.questions.captions import CAPTIONS
from jobs.experiments.questions.curation import CURATION
from jobs.experiments.questions.decoding import DECODING
from jobs.experiments.questions.decoupled import DECOUPLED
from jobs.experiments.questions.longer import LONGER
from jobs.experiments.questions.losses import LOSSES
from jobs.experiments.questions.question import NUM_CAPTIONS, Question
from jobs.experiments.questions.rounds import ROUNDS_QUESTION
from jobs.experiments.questions.search import SEARCH
from jobs.experiments.questions.selection import SELECTION
from jobs.experiments.questions.sharing import SHARING
from jobs.experiments.questions.stages import STAGES
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
