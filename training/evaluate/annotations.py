"""Benchmarks' annotation files, as published, read into three small types.

Captions (retrieval and captioning): Karpathy's ``dataset_coco.json`` and ``dataset_flickr30k.json``; LAVIS's lists
(``coco_karpathy_test.json``, ``flickr30k_test.json``); COCO's own layout (``captions_val2014.json``, NoCaps'
``nocaps_val_4500_captions.json`` with its domains). Questions: VQAv2's and OK-VQA's pair of files, LAVIS's lists
(``vqa_val_eval.json``), GQA's ``testdev_balanced_questions.json``. The layout is told by the file's content.
"""

import contextlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.storage import Storage
from schemas.errors import CapfiltError

_CAPTION_LAYOUTS = "Karpathy's dataset_*.json, LAVIS's *_karpathy_*.json, or COCO's {images, annotations}"
_QUESTION_LAYOUTS = (
    "VQA's {questions} (with --answers for {annotations}), LAVIS's vqa_*_eval.json, or GQA's *_questions.json"
)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionSet:
    """Questions, and how an answer to them counts."""

    kind: Literal["vqa", "gqa"]
    questions: tuple[Question, ...]


def read_captioned_images(path: str, split: str = "test") -> list[CaptionedImage]:
    """Read captions.

    Args:
        path: the annotation file, local or remote.
        split: of a Karpathy file, which holds all of them: ``train``, ``val`` or ``test``.

    Raises:
        CapfiltError: no such file, not one of the layouts, no image of that split, an image without captions.
    """
    content = _read_json(path)
    with _layout_errors(path, _CAPTION_LAYOUTS):
        if isinstance(content, list):
            images = [_lavis_image(index, entry) for index, entry in enumerate(content)]
        elif "annotations" in content:
            images = _coco_images(content)
        else:
            images = [_karpathy_image(i, e) for i, e in enumerate(content["images"]) if e["split"] == split]
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
        CapfiltError: no such file, not one of the layouts, or a question without an annotation.
    """
    content = _read_json(path)
    with _layout_errors(path, _QUESTION_LAYOUTS):
        if isinstance(content, list):
            return QuestionSet(kind="vqa", questions=tuple(map(_lavis_question, content)))
        if "questions" not in content:
            return QuestionSet(
                kind="gqa", questions=tuple(_gqa_question(key, entry) for key, entry in content.items())
            )
        file = _coco_file_name(content.get("data_subtype", ""))
        questions = [
            Question(id=entry["question_id"], file=file(entry["image_id"]), text=entry["question"])
            for entry in content["questions"]
        ]
    if answers:
        questions = _with_answers(questions, answers, path)
    return QuestionSet(kind="vqa", questions=tuple(questions))


def _karpathy_image(index: int, entry: Mapping[str, Any]) -> CaptionedImage:
    folder = entry.get("filepath", "")
    return CaptionedImage(
        id=int(entry.get("cocoid", entry.get("imgid", index))),
        file=f"{folder}/{entry['filename']}" if folder else entry["filename"],
        captions=tuple(sentence["raw"] for sentence in entry["sentences"]),
    )


def _lavis_image(index: int, entry: Mapping[str, Any]) -> CaptionedImage:
    captions = entry["caption"]
    return CaptionedImage(
        id=_number_of(entry["image"], index),
        file=entry["image"],
        captions=(captions,) if isinstance(captions, str) else tuple(captions),
    )


def _number_of(file: str, otherwise: int) -> int:
    """Return COCO's number of an image, which its file name ends with."""
    digits = file.rpartition("_")[2].partition(".")[0]
    return int(digits) if digits.isdigit() else otherwise


def _coco_images(content: Mapping[str, Any]) -> list[CaptionedImage]:
    captions: dict[Any, list[str]] = defaultdict(list)
    for annotation in content["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    return [
        CaptionedImage(
            id=image["id"],
            file=image["file_name"],
            captions=tuple(captions[image["id"]]),
            domain=image.get("domain") or "",
        )
        for image in content["images"]
    ]


def _splits(content: Any, split: str) -> str:
    if not isinstance(content, Mapping) or "annotations" in content:
        return ""
    known = sorted({entry.get("split", "") for entry in content["images"]})
    return f" of split {split!r} (--split: {', '.join(known)})"


def _lavis_question(entry: Mapping[str, Any]) -> Question:
    answers = entry.get("answer", ())
    return Question(
        id=entry["question_id"],
        file=entry["image"],
        text=entry["question"],
        answers=(answers,) if isinstance(answers, str) else tuple(answers),
    )


def _gqa_question(key: str, entry: Mapping[str, Any]) -> Question:
    answer = entry.get("answer")
    return Question(
        id=key,
        file=f"{entry['imageId']}.jpg",
        text=entry["question"],
        answers=() if answer is None else (answer,),
    )


def _coco_file_name(subset: str) -> Callable[[int], str]:
    """Return how an image of COCO is called; test-dev's images lie among those of the whole test set."""
    folder = "test2015" if subset.startswith("test") else subset
    if not folder:
        raise KeyError("data_subtype")
    return lambda number: f"{folder}/COCO_{folder}_{number:012d}.jpg"


def _with_answers(questions: Iterable[Question], path: str, questions_path: str) -> list[Question]:
    content = _read_json(path)
    with _layout_errors(path, "VQA's {annotations}"):
        answers = {
            entry["question_id"]: tuple(answer["answer"] for answer in entry["answers"])
            for entry in content["annotations"]
        }
    questions = list(questions)
    if missing := [question.id for question in questions if question.id not in answers]:
        raise CapfiltError(
            f"{path} has no answers to {len(missing)} of the {len(questions)} questions in {questions_path}, "
            f"{missing[0]} first: are the two of one subset?"
        )
    return [Question(id=one.id, file=one.file, text=one.text, answers=answers[one.id]) for one in questions]


def _read_json(path: str) -> Any:
    folder, _, name = path.rpartition("/")
    try:
        content = json.loads(Storage(folder or ".").read(name))
    except FileNotFoundError as error:
        raise CapfiltError(f"{path}: no such file") from error
    except ValueError as error:
        raise CapfiltError(f"{path} is no JSON: {error}") from error
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
    except (TypeError, AttributeError, ValueError) as error:
        raise CapfiltError(f"{path} is laid out otherwise ({error}): it must be {layouts}") from error
