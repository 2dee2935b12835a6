"""Whole evaluations: a model and a benchmark give a ``Result``."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.corpus.storage import Storage
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from training.blip2.stage1 import Stage1
from training.blip2.stage2 import Stage2
from training.data import snapshot_file
from training.data.held_out import held_out_samples
from training.data.snapshot import Snapshot, take_snapshot
from training.evaluate.annotations import CaptionedImage, QuestionSet
from training.evaluate.captioning import generate_captions, score_captions
from training.evaluate.generation import Decoding, Stage1Generator, Stage2Generator
from training.evaluate.images import ImageFolder, ReportProgress, ignore_progress
from training.evaluate.published import Result, published
from training.evaluate.retrieval import Stage1Matcher, retrieve
from training.evaluate.validation import validate
from training.evaluate.vqa import DECODING, PROMPTS, generate_answers, lemmatizer, score_answers

Stage = Stage1 | Stage2


def evaluate_retrieval(
    stage: Stage,
    captioned: Sequence[CaptionedImage],
    images: str,
    *,
    dataset: str,
    rerank: int,
    batch_size: int,
    report: ReportProgress = ignore_progress,
) -> Result:
    """Retrieve every caption by its image and every image by its captions; ``images`` is the images' folder."""
    if not isinstance(stage, Stage1):
        raise CapfiltError(
            "retrieval needs a model of stage 1: one of stage 2 has neither the text side nor the matching head"
        )
    began = time.perf_counter()
    image_folder = ImageFolder(images, stage.config.data.image_size_px, report)
    files = [image.file for image in captioned]
    pairs = [(caption, index) for index, image in enumerate(captioned) for caption in image.captions]
    texts, image_of_text = zip(*pairs, strict=True)
    matcher = Stage1Matcher(stage)
    passes = iter(("comparing by ITC", "matching by ITM"))
    report("reading the texts", 0, 0)
    metrics = retrieve(
        matcher, lambda: image_folder.batches(files, batch_size, next(passes)), texts, image_of_text, rerank
    )
    protocol = {
        "rerank": rerank,
        "texts": len(texts),
        "max_text_tokens": matcher.max_text_tokens,
        **_common(stage),
    }
    return _result("retrieval", dataset, len(files), metrics, protocol, began)


def evaluate_captions(
    stage: Stage,
    captioned: Sequence[CaptionedImage],
    images: str,
    *,
    dataset: str,
    prompt: str,
    decoding: Decoding,
    batch_size: int,
    java: bool = False,
    predictions: str = "",
    report: ReportProgress = ignore_progress,
) -> Result:
    """Caption every image: by the language model, or by the Q-Former in stage 1."""
    began = time.perf_counter()
    model = Stage1Generator(stage) if isinstance(stage, Stage1) else Stage2Generator(stage)
    image_folder = ImageFolder(images, stage.config.data.image_size_px, report)
    captions = generate_captions(
        model, captioned, image_folder, prompt=prompt, decoding=decoding, batch_size=batch_size
    )
    if predictions:
        rows = [
            {"image_id": image.id, "caption": text} for image, text in zip(captioned, captions, strict=True)
        ]
        _write_rows(predictions, rows)
    metrics = score_captions(captioned, captions, java=java)
    tokenizer = "Stanford's PTBTokenizer 3.4.1" if java else "capfilt's port of PTBTokenizer"
    protocol = {"prompt": prompt, **asdict(decoding), "tokenizer": tokenizer, **_common(stage)}
    return _result("caption", dataset, len(captioned), metrics, protocol, began)


def evaluate_answers(
    stage: Stage,
    asked: QuestionSet,
    images: str,
    *,
    dataset: str,
    prompt: str,
    batch_size: int,
    decoding: Decoding = DECODING,
    lemmatize: bool = False,
    predictions: str = "",
    report: ReportProgress = ignore_progress,
) -> Result:
    """Answer every question; an empty ``prompt`` is the paper's for the language model."""
    if not isinstance(stage, Stage2):
        raise CapfiltError("questions are answered by a language model: name a checkpoint of stage 2")
    finish = lemmatizer() if lemmatize else str.strip
    began = time.perf_counter()
    prompt = prompt or PROMPTS[stage.language.name]
    if "{}" not in prompt:
        raise CapfiltError(f"--prompt {prompt!r} has no {{}} for the question")
    image_folder = ImageFolder(images, stage.config.data.image_size_px, report)
    answers = generate_answers(
        Stage2Generator(stage),
        asked.questions,
        image_folder,
        prompt=prompt,
        decoding=decoding,
        batch_size=batch_size,
    )
    answers = [finish(answer) for answer in answers]
    if predictions:
        rows = [
            {"question_id": question.id, "answer": answer}
            for question, answer in zip(asked.questions, answers, strict=True)
        ]
        _write_rows(predictions, rows)
    metrics = score_answers(asked, answers)
    known = sum(bool(question.answers) for question in asked.questions)
    scored = {"accuracy": "exact match" if asked.kind == "gqa" else "VQA", "scored": known} if known else {}
    protocol = {"prompt": prompt, **asdict(decoding), "lemmatize": lemmatize, **scored, **_common(stage)}
    return _result("vqa", dataset, len(answers), metrics, protocol, began)


def evaluate_probe(stage: Stage, model: str, report: ReportProgress = ignore_progress) -> Result:
    """Compute once what a run computes every ``probe.every_steps``.

    Args:
        stage: the model.
        model: where it comes from. The images are those that this run holds out, else those that its config would.
    """
    config = stage.config
    snapshot = _snapshot_of_run(model, config)
    if snapshot is None:
        if not config.data.held_out:
            raise CapfiltError(
                "data.held_out = 0: no images are held out; set it in a recipe for -c to take some"
            )
        snapshot = take_snapshot(config.data)
    if not snapshot.num_held_out:
        raise CapfiltError(f"{model} held no images out (data.held_out): it has been trained on all of them")
    began = time.perf_counter()
    held_out = held_out_samples(config, snapshot, config.probe.images)
    report(f"looking at {len(held_out):,} held-out images", 0, 0)
    metrics = validate(stage, held_out, config)
    return _result("probe", "held out", len(held_out), metrics, _common(stage), began)


def _snapshot_of_run(model: str, config: PretrainConfig) -> Snapshot | None:
    """Return the shards that a run was trained on, with its held-out images; None where the model is not of a run."""
    name = model.rstrip("/").removesuffix(".json")
    folder, _, last = name.rpartition("/")
    run = Storage(folder if last.startswith("step-") else name)
    files = [info.path for info in run.list("") if info.path.startswith("snapshot-")]
    return snapshot_file.decode(run.read(files[0]), config.data, run.url(files[0])) if files else None


def _common(stage: Stage) -> dict[str, Any]:
    config = stage.config
    language = config.language.model if config.language else ""
    common = {
        "image_size_px": config.data.image_size_px,
        "vision": config.vision.model,
        "language": language,
        "precision": str(stage.Qformer.dtype).removeprefix("torch."),
    }
    return {name: value for name, value in common.items() if value}


def _result(
    task: str,
    dataset: str,
    samples: int,
    metrics: Mapping[str, float],
    protocol: Mapping[str, Any],
    began: float,
) -> Result:
    return Result(
        task=task,
        dataset=dataset,
        samples=samples,
        metrics={name: round(value, 4) for name, value in metrics.items()},
        protocol=protocol,
        published=published(task, dataset),
        seconds=round(time.perf_counter() - began, 1),
    )


def _write_rows(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write predictions as the benchmarks' servers take them."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(rows, ensure_ascii=False))
