"""Zero-shot question answering: the paper's prompts, open-ended decoding, official accuracy (section 4.1)."""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor

from schemas.errors import CapfiltError
from training.evaluate.annotations import Question, QuestionSet
from training.evaluate.answers import gqa_accuracy, vqa_accuracy
from training.evaluate.generation import Decoding
from training.evaluate.images import Pictures

PROMPTS: dict[Literal["opt", "t5"], str] = {
    "opt": "Question: {} Answer:",
    "t5": "Question: {} Short answer:",
}
# A negative length penalty favours short answers.
DECODING = Decoding(beams=5, min_tokens=1, max_tokens=10, length_penalty=-1.0)
_MAX_WORDS = 50
_MARKS = re.compile(r'[.!"()*#:;~]')


class Answerer(Protocol):
    """What question answering asks of a model."""

    def answer(self, pixels_BCHW: Tensor, prompts: Sequence[str], decoding: Decoding) -> list[str]:
        """Return what follows each prompt, given its image (uint8)."""


def clean_question(question: str) -> str:
    """Return a question as LAVIS's ``blip_question`` does: lower case, some marks gone ("?" stays), 50 words."""
    return " ".join(_MARKS.sub("", question.lower()).split()[:_MAX_WORDS])


def write_answers(
    model: Answerer,
    questions: Sequence[Question],
    pictures: Pictures,
    *,
    prompt: str,
    batch_size: int,
    decoding: Decoding = DECODING,
) -> list[str]:
    """Return an answer to each question; ``prompt`` holds the question at ``{}``."""
    answers: list[str] = []
    for pixels_BCHW in pictures.batches([question.file for question in questions], batch_size):
        asked = questions[len(answers) : len(answers) + len(pixels_BCHW)]
        prompts = [prompt.replace("{}", clean_question(question.text)) for question in asked]
        answers += model.answer(pixels_BCHW, prompts, decoding)
    return answers


def score_answers(questions: QuestionSet, answers: Sequence[str]) -> dict[str, float]:
    """Return ``accuracy`` in per cent over the questions whose answers are known; nothing where all are hidden."""
    known = [(one, answer) for one, answer in zip(questions.questions, answers, strict=True) if one.answers]
    if not known:
        return {}
    if questions.kind == "gqa":
        scores = [gqa_accuracy(answer, one.answers[0]) for one, answer in known]
    else:
        scores = [vqa_accuracy(answer, one.answers) for one, answer in known]
    return {"accuracy": 100 * sum(scores) / len(scores)}


def lemmatizer() -> Callable[[str], str]:
    """Return what LAVIS does to answers for OK-VQA: nouns and verbs become their lemma, by spaCy's small model.

    OK-VQA's annotations are stemmed; without it "surfing" is no "surf".

    Raises:
        CapfiltError: spaCy, which capfilt does not install, or its English model is not there.
    """
    try:
        import spacy

        read: Any = spacy.load("en_core_web_sm")
    except (ImportError, OSError) as error:
        raise CapfiltError(
            "--lemmatize needs spaCy and its model: pip install spacy && python -m spacy download en_core_web_sm"
        ) from error

    def lemmatize(answer: str) -> str:
        return " ".join(word.lemma_ if word.pos_ in ("NOUN", "VERB") else word.text for word in read(answer))

    return lemmatize
