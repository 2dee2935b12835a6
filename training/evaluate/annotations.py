"""Benchmarks' annotation files, as published, read into three small types.

Captions (retrieval and captioning): Karpathy's ``dataset_coco.json`` and ``dataset_flickr30k.json``; LAVIS's lists
(``coco_karpathy_test.json``, ``flickr30k_test.json``); COCO's own layout (``captions_val2014.json``, NoCaps'
``nocaps_val_4500_captions.json`` with its domains). Questions: VQAv2's and OK-VQA's pair of files, LAVIS's lists
(``vqa_val_eval.json``), GQA's ``testdev_balanced_questions.json``. The layout is found by the file's content.
"""

import contextlib
import json
import math
import posixpath
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.names import confined_name, fits_utf8, printable

_CAPTION_LAYOUTS = "Karpathy's dataset_*.json, LAVIS's *_karpathy_*.json, or COCO's {images, annotations}"
_QUESTION_LAYOUTS = (
    "VQA's {questions} (with --answers for {annotations}), LAVIS's vqa_*_eval.json, or GQA's *_questions.json"
)
# VQA's accuracy leaves each person out and asks for three others: with fewer people no answer reaches 100%.
_MIN_PEOPLE = 4
_QUESTION_ID = "a question_id"
_TOO_DEEP = "is nested too deep for annotations"
# Whole numbers above it are not exact as JSON's floating point.
_EXACT = 2**53


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionedImage:
    """An image file, relative to the folder of images, and people's captions of it.

    ``id`` is the number that result files name, the position where the layout has none.
    """

    id: int
    file: str
    captions: tuple[str, ...]
    domain: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question about an image and its answers: ten people's (VQA), one (GQA), or none (a hidden test set)."""

    id: str | int
    file: str
    text: str
    answers: tuple[str, ...] = ()


Entry = TypeVar("Entry", CaptionedImage, Question)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionSet:
    """Questions, and how an answer to them counts: ``gqa`` by exact match with the one that is right, ``vqa`` by VQA's
    accuracy among people's.
    """

    kind: Literal["vqa", "gqa"]
    questions: tuple[Question, ...]


def read_captioned_images(path: str, split: str = "test") -> list[CaptionedImage]:
    """Read captions.

    Args:
        path: the annotation file, local or remote.
        split: of a Karpathy file, which holds all of them: ``train``, ``val`` or ``test``.

    Raises:
        CapfiltError: no such file, not one of the layouts, no image of that split, an image without captions, a
            caption that is not a text.
    """
    content = _read_json(path)
    with _layout_errors(path, _CAPTION_LAYOUTS):
        if isinstance(content, list):
            images = [_lavis_image(index, entry) for index, entry in enumerate(content)]
        elif "annotations" in content:
            images = _coco_images(content)
        else:
            images = [_karpathy_image(i, e) for i, e in enumerate(content["images"]) if e["split"] == split]
        images = _merged(_checked(image, path) for image in images)
    if not images:
        raise CapfiltError(f"{path} has no images{_splits(content, split)}")
    if bare := [image.file for image in images if not image.captions]:
        raise CapfiltError(f"{path}: {len(bare)} images have no caption, {bare[0]} first")
    return images


def read_questions(path: str, answers: str = "") -> QuestionSet:
    """Read questions and their answers.

    Args:
        path: the file of questions, local or remote.
        answers: VQA's file of annotations; without it the answers are hidden, and only predictions can be made.

    Raises:
        CapfiltError: no such file, not one of the layouts, a question without an annotation, one id for two
            questions, or an answer that is not a text.
    """
    content = _read_json(path)
    with _layout_errors(path, _QUESTION_LAYOUTS):
        if isinstance(content, list):
            questions = list(map(_lavis_question, content))
        elif "questions" in content:
            questions = _vqa_questions(content)
        else:
            questions = [_gqa_question(key, entry) for key, entry in content.items()]
        if answers and (isinstance(content, list) or "questions" not in content):
            raise CapfiltError(f"--answers belongs to VQA's {{questions}}; the answers to {path} stand in it")
        questions = _distinct((_checked(question, path) for question in questions), path)
    if not questions:
        raise CapfiltError(f"{path} holds no questions")
    if answers:
        questions = _with_answers(questions, answers, path)
    # The number of answers decides how they are scored, not the layout: GQA is also published as a list.
    one_each = all(len(question.answers) < 2 for question in questions)
    return QuestionSet(kind="gqa" if one_each else "vqa", questions=tuple(questions))


def require_enough_answers(asked: QuestionSet, path: str) -> None:
    """Raise CapfiltError where VQA's accuracy would count a right answer as partly or wholly wrong."""
    known = [question for question in asked.questions if question.answers]
    few = [question for question in known if len(question.answers) < _MIN_PEOPLE]
    if asked.kind == "vqa" and few:
        raise CapfiltError(
            f"{path}: {len(few)} of {len(known)} questions have fewer than {_MIN_PEOPLE} answers, {_shown(few[0].id)} "
            f"first ({len(few[0].answers)}): VQA's accuracy compares with those of ten people. Give every question one "
            "answer (exact match), or those of all people"
        )


def _checked(entry: Entry, path: str) -> Entry:
    """Return an entry whose file lies in the folder of images. Raises CapfiltError for a value that is not a text."""
    for what, text in _texts(entry):
        if not _is_text(text):
            raise CapfiltError(
                f"{path}: {what} is {_shown(text)}, which is not a text; correct the entry or take it out"
            )
    file = posixpath.normpath(entry.file) if isinstance(entry.file, str) and entry.file else entry.file
    return replace(entry, file=confined_name(file, path))


def _texts(entry: CaptionedImage | Question) -> Iterator[tuple[str, Any]]:
    """Yield what should be a text, each with what it is, for a message."""
    if isinstance(entry, Question):
        yield f"the question {_shown(entry.id)}", entry.text
        return
    for caption in entry.captions:
        yield f"a caption of {_shown(entry.file)}", caption
    yield f"the domain of {_shown(entry.file)}", entry.domain


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and fits_utf8(value)


def _id(given: Any, what: str) -> Any:
    """Return an id: a text, or a whole number, which some programs write as 7.0. Raises ValueError."""
    if isinstance(given, float) and abs(given) < _EXACT and given.is_integer():
        return int(given)
    if _is_text(given) or (isinstance(given, int) and not isinstance(given, bool)):
        return given
    raise ValueError(f"{what} is {_shown(given)}, which is not a whole number or a text")


def _merged(images: Iterable[CaptionedImage]) -> list[CaptionedImage]:
    """Return each image once, with the captions of all of its entries: lists may have an entry for each caption."""
    by_file: dict[str, CaptionedImage] = {}
    for image in images:
        first = by_file.setdefault(image.file, image)
        if first is not image:
            further = [caption for caption in image.captions if caption not in first.captions]
            by_file[image.file] = replace(first, captions=(*first.captions, *further))
    return list(by_file.values())


def _distinct(questions: Iterable[Question], path: str) -> list[Question]:
    """Return each question once. Raises CapfiltError where one id stands for two."""
    by_id: dict[str | int, Question] = {}
    for question in questions:
        if by_id.setdefault(question.id, question) != question:
            raise CapfiltError(f"{path}: two different questions have the question_id {_shown(question.id)}")
    return list(by_id.values())


def _shown(value: Any) -> str:
    """Return a value of the file for a message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return printable(text if len(text) <= 80 else f"{text[:77]}...")


def _karpathy_image(index: int, entry: Mapping[str, Any]) -> CaptionedImage:
    folder = entry.get("filepath", "")
    return CaptionedImage(
        id=int(_id(entry.get("cocoid", entry.get("imgid", index)), "an image's id")),
        file=f"{folder}/{entry['filename']}" if folder else entry["filename"],
        captions=tuple(sentence["raw"] for sentence in entry["sentences"]),
    )


def _lavis_image(index: int, entry: Mapping[str, Any]) -> CaptionedImage:
    captions = entry["caption"]
    return CaptionedImage(
        id=_number_of(entry["image"], index),
        file=entry["image"],
        captions=tuple(captions) if isinstance(captions, list) else (captions,),
    )


def _number_of(file: str, otherwise: int) -> int:
    """Return COCO's number of an image, which its file name ends with."""
    digits = file.rpartition("_")[2].partition(".")[0]
    return int(digits) if digits.isdecimal() else otherwise


def _coco_images(content: Mapping[str, Any]) -> list[CaptionedImage]:
    captions: dict[Any, list[str]] = defaultdict(list)
    for annotation in content["annotations"]:
        # As text: some files have numbers on one side and texts on the other.
        captions[str(_id(annotation["image_id"], "an annotation's image_id"))].append(annotation["caption"])
    ids = [_id(image["id"], "an image's id") for image in content["images"]]
    return [
        CaptionedImage(
            id=number,
            file=image["file_name"],
            captions=tuple(captions[str(number)]),
            domain=image.get("domain") or "",
        )
        for number, image in zip(ids, content["images"], strict=True)
    ]


def _splits(content: Any, split: str) -> str:
    if not isinstance(content, Mapping) or "annotations" in content:
        return ""
    known = sorted({printable(str(entry.get("split", "")))[:80] for entry in content["images"]})
    return f" of split {split!r} (--split: {', '.join(known)})"


def _vqa_questions(content: Mapping[str, Any]) -> list[Question]:
    subset = content["data_subtype"]
    # The images of test-dev are in the folder of the whole test set.
    folder = "test2015" if subset.startswith("test") else subset
    return [
        Question(
            id=_id(entry["question_id"], _QUESTION_ID),
            file=f"{folder}/COCO_{folder}_{entry['image_id']:012d}.jpg",
            text=entry["question"],
        )
        for entry in content["questions"]
    ]


def _lavis_question(entry: Mapping[str, Any]) -> Question:
    return Question(
        id=_id(entry["question_id"], _QUESTION_ID),
        file=entry["image"],
        text=entry["question"],
        answers=_answers(entry.get("answer"), entry["question_id"]),
    )


def _gqa_question(key: str, entry: Mapping[str, Any]) -> Question:
    image = str(_id(entry["imageId"], f"the imageId of the question {_shown(key)}"))
    has_extension = image.lower().endswith((".jpg", ".jpeg", ".png", ".webp"))
    return Question(
        id=_id(key, _QUESTION_ID),
        file=image if has_extension else f"{image}.jpg",
        text=entry["question"],
        answers=_answers(entry.get("answer"), key),
    )


def _answers(given: Any, question: Any) -> tuple[str, ...]:
    """Return one answer or several as texts; none where they are hidden: no key, null, nothing but empty texts."""
    if given is None:
        return ()
    answers = tuple(_answer(value, question) for value in (given if isinstance(given, list) else [given]))
    return answers if any(answer.strip() for answer in answers) else ()


def _answer(given: Any, question: Any) -> str:
    # An object is VQA's annotation of a person's answer.
    answer = given["answer"] if isinstance(given, Mapping) else given
    if isinstance(answer, (int, float)) and not isinstance(answer, bool) and math.isfinite(answer):
        answer = json.dumps(answer)
    if not _is_text(answer):
        raise ValueError(f"an answer to the question {_shown(question)} is {_shown(answer)}")
    return answer


def _with_answers(questions: Iterable[Question], path: str, questions_path: str) -> list[Question]:
    content = _read_json(path)
    with _layout_errors(path, "VQA's {annotations}"):
        answers = {
            _id(entry["question_id"], _QUESTION_ID): _answers(entry["answers"], entry["question_id"])
            for entry in content["annotations"]
        }
    questions = list(questions)
    if missing := [question.id for question in questions if question.id not in answers]:
        raise CapfiltError(
            f"{path} has no answers to {len(missing)} of the {len(questions)} questions in {questions_path}, "
            f"{missing[0]} first: are the two of one subset?"
        )
    return [replace(question, answers=answers[question.id]) for question in questions]


def _read_json(path: str) -> Any:
    folder, slash, name = path.rpartition("/")
    try:
        content = json.loads(Storage(folder or slash or ".").read(name))
    except FileNotFoundError as error:
        raise CapfiltError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise CapfiltError(f"{path} is a folder; name a file of annotations") from error
    except RecursionError as error:
        raise CapfiltError(f"{path} {_TOO_DEEP}") from error
    except ValueError as error:
        raise CapfiltError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, (dict, list)) or not content:
        raise CapfiltError(f"{path} holds no annotations")
    return content


@contextlib.contextmanager
def _layout_errors(path: str, layouts: str) -> Iterator[None]:
    """Turn a missing key or a wrong type, met while a file is read, into a message that names the layouts."""
    try:
        yield
    except KeyError as error:
        raise CapfiltError(f"{path} has an entry without {error}: it must be {layouts}") from error
    except RecursionError as error:
        raise CapfiltError(f"{path} {_TOO_DEEP}: it must be {layouts}") from error
    except (TypeError, AttributeError, ValueError, OverflowError) as error:
        raise CapfiltError(f"{path} is laid out otherwise ({error}): it must be {layouts}") from error
