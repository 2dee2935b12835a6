"""Zero-shot question answering: the paper's prompts, open-ended decoding, official accuracy (BLIP-2, section 4.1).

The clean-up of answers is VQAEval's (GT-Vision-Lab/VQA, as kept in LAVIS), with its errors, since scores are comparable
only with them: its pattern for full stops was meant to spare decimals on both sides and looks at the following
character alone, and ``re.UNICODE`` given as a count makes 32 the most that it removes.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from schemas.errors import CapfiltError
from training.data.transforms import LAVIS_MARKS
from training.evaluate.annotations import QuestionSet
from training.evaluate.generation import Decoding

PROMPTS: dict[str, str] = {
    "opt": "Question: {} Answer:",
    "t5": "Question: {} Short answer:",
}
# A negative length penalty favours short answers.
DECODING = Decoding(beams=5, min_tokens=1, max_tokens=10, length_penalty=-1.0)
_MAX_WORDS = 50
_WITHOUT_MARKS = str.maketrans("", "", LAVIS_MARKS)

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_FULL_STOPS = 32
_ARTICLES = {"a", "an", "the"}
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(value) for value, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}

_ONE_APOSTROPHE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_TWO_APOSTROPHES = """
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
    there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""


def clean_question(question: str) -> str:
    """Return a question as LAVIS's ``blip_question`` does: lower case, some marks gone ("?" stays), 50 words."""
    return " ".join(question.lower().translate(_WITHOUT_MARKS).split()[:_MAX_WORDS])


def score_answers(questions: QuestionSet, answers: Sequence[str]) -> dict[str, float]:
    """Return ``accuracy`` in per cent over the questions whose answers are known; nothing where all are hidden."""
    known = [
        (question.answers, answer)
        for question, answer in zip(questions.questions, answers, strict=True)
        if question.answers
    ]
    if not known:
        return {}
    if questions.kind == "gqa":
        scores = [gqa_accuracy(answer, expected[0]) for expected, answer in known]
    else:
        scores = [vqa_accuracy(answer, people) for people, answer in known]
    return {"accuracy": 100 * sum(scores) / len(scores)}


def lemmatizer() -> Callable[[str], str]:
    """Return what LAVIS does to answers for OK-VQA: nouns and verbs become their lemma, by spaCy's small model.

    OK-VQA's annotations are stemmed; without it "surfing" is not "surf".

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


def _contractions() -> dict[str, str]:
    """Return each spelling that lacks an apostrophe, and the one that has it."""
    table = {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
    for word in _TWO_APOSTROPHES.split():
        start, _, end = word.rpartition("'")
        table |= {f"{start.replace(chr(39), '')}'{end}": word, f"{start}{end}": word}
    # The table's own exceptions; "somebody'd" loses its apostrophe.
    return table | {
        "ow's'at": "'ow's'at",
        "'ows'at": "'ow's'at",
        "'ow'sat": "'ow's'at",
        "somebody'd": "somebodyd",
        "yall'd've": "y'all'd've",
        "y'alld've": "y'all'd've",
        "y'all'dve": "y'all'd've",
    }


_CONTRACTIONS = _contractions()


def vqa_accuracy(answer: str, human_answers: Sequence[str]) -> float:
    """Return the official accuracy of one answer, between 0 and 1.

    An answer counts in full where three of ten people gave it; the mean over leaving each of them out makes two
    worth 0.6 and one 0.3. People's answers are freed of punctuation only where they differ at all, as officially.
    """
    cleaned = clean_answer(answer)
    people = list(human_answers)
    if len(set(people)) > 1:
        people = [_strip_punctuation(given) for given in people]
    agreeing = [given == cleaned for given in people]
    # VQA's rule: the mean over leaving each person out of min(1, matches among the others / 3).
    others = [sum(agreeing) - agrees for agrees in agreeing]
    return sum(min(1.0, count / 3) for count in others) / len(people)


def gqa_accuracy(answer: str, expected: str) -> float:
    """Return 1 where the answer is the expected one, letter for letter after the clean-up, else 0."""
    return float(clean_answer(answer) == clean_answer(expected))


def clean_answer(answer: str) -> str:
    """Return an answer as the official evaluation compares it."""
    text = _strip_punctuation(answer.replace("\n", " ").replace("\t", " ").strip())
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _strip_punctuation(text: str) -> str:
    stripped = text
    has_number = _DIGIT_COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if beside_space or has_number else " ")
    return _FULL_STOP.sub("", stripped, count=_MOST_FULL_STOPS)
