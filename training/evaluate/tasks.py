"""Whole evaluations: a model and a benchmark give a ``Result``."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from training.blip2.stage1 import Stage1
from training.blip2.stage2 import Stage2
from training.build import Blip2Stage
from training.data.held_out import held_out_samples
from training.data.snapshot import Snapshot, parse_snapshot, take_snapshot
from training.distributed import World
from training.evaluate.annotations import CaptionedImage, QuestionSet
from training.evaluate.captioning import score_captions
from training.evaluate.generation import Decoding, Stage1Generator, Stage2Generator
from training.evaluate.images import BenchmarkImages, ReportProgress, ignore_progress
from training.evaluate.published import Result, published
from training.evaluate.retrieval import Stage1Matcher, retrieve
from training.evaluate.validation import validate
from training.evaluate.vqa import DECODING, PROMPTS, clean_question, lemmatizer, score_answers


@dataclass(frozen=True)
class Evaluation:
    """A model on the images of a benchmark; each method is one task.

    ``images`` is the folder that the annotations' file names begin in; ``dataset`` names the paper's numbers to compare
    with, where it has them; ``report`` is called with the progress. On several ranks of a ``world`` each takes its part
    of the images, and all return the same result; the first one writes predictions.
    """

    stage: Blip2Stage
    images: str = ""
    _: KW_ONLY
    dataset: str = ""
    batch_size: int = 1
    report: ReportProgress = ignore_progress
    world: World = field(default_factory=World)
    began: float = field(default_factory=time.perf_counter)

    @property
    def _folder(self) -> BenchmarkImages:
        return BenchmarkImages(self.images, self.stage.config.data.image_size_px, self.report)

    def retrieval(self, captioned: Sequence[CaptionedImage], rerank: int) -> Result:
        """Retrieve every caption by its image and every image by its captions."""
        if not isinstance(self.stage, Stage1):
            raise CapfiltError(
                "retrieval needs a model of stage 1: one of stage 2 has neither the text side nor the matching head"
            )
        folder = self._folder
        files = [image.file for image in captioned]
        pairs = [(caption, index) for index, image in enumerate(captioned) for caption in image.captions]
        texts, image_of_text = zip(*pairs, strict=True)
        matcher = Stage1Matcher(self.stage)
        passes = iter(("comparing by ITC", "matching by ITM"))
        self.report("reading the texts", 0, 0)
        metrics = retrieve(
            matcher,
            lambda: folder.batches(files[self.world.part(len(files))], self.batch_size, next(passes)),
            texts,
            image_of_text,
            rerank,
            self.world,
        )
        protocol = {"rerank": rerank, "texts": len(texts), "max_text_tokens": matcher.max_text_tokens}
        return _result(self, "retrieval", len(files), metrics, protocol)

    def captions(
        self,
        captioned: Sequence[CaptionedImage],
        *,
        prompt: str,
        decoding: Decoding,
        java: bool = False,
        predictions: str = "",
    ) -> Result:
        """Caption every image: by the language model, or by the Q-Former in stage 1."""
        stage = self.stage
        model = Stage1Generator(stage) if isinstance(stage, Stage1) else Stage2Generator(stage)
        captions: list[str] = []
        files = [image.file for image in captioned[self.world.part(len(captioned))]]
        for pixels_BCHW in self._folder.batches(files, self.batch_size):
            captions += model.caption(pixels_BCHW, prompt, decoding)
        captions = self.world.gather_parts(captions)
        self._write(predictions, ("image_id", "caption"), [image.id for image in captioned], captions)
        metrics = score_captions(captioned, captions, java=java)
        tokenizer = "Stanford's PTBTokenizer 3.4.1" if java else "capfilt's port of PTBTokenizer"
        # Of the scores that papers print, SPICE alone is missing: it needs Stanford's parser in Java.
        protocol = {"prompt": prompt, **asdict(decoding), "tokenizer": tokenizer, "not_computed": "SPICE"}
        return _result(self, "caption", len(captioned), metrics, protocol)

    def answers(
        self, asked: QuestionSet, *, prompt: str, lemmatize: bool = False, predictions: str = ""
    ) -> Result:
        """Answer every question; ``prompt`` holds it at ``{}``, an empty one is the paper's for the language model."""
        if not isinstance(self.stage, Stage2):
            raise CapfiltError("questions are answered by a language model: name a checkpoint of stage 2")
        finish = lemmatizer() if lemmatize else str.strip
        prompt = prompt or PROMPTS[self.stage.language.name]
        if "{}" not in prompt:
            raise CapfiltError(f"--prompt {prompt!r} has no {{}} for the question")
        model = Stage2Generator(self.stage)
        questions = asked.questions[self.world.part(len(asked.questions))]
        answers: list[str] = []
        for pixels_BCHW in self._folder.batches([question.file for question in questions], self.batch_size):
            batch = questions[len(answers) : len(answers) + len(pixels_BCHW)]
            prompts = [prompt.replace("{}", clean_question(question.text)) for question in batch]
            answers += map(finish, model.answer(pixels_BCHW, prompts, DECODING))
        answers = self.world.gather_parts(answers)
        self._write(
            predictions, ("question_id", "answer"), [question.id for question in asked.questions], answers
        )
        metrics = score_answers(asked, answers)
        known = sum(bool(question.answers) for question in asked.questions)
        scored = (
            {"accuracy": "exact match" if asked.kind == "gqa" else "VQA", "scored": known} if known else {}
        )
        protocol = {"prompt": prompt, **asdict(DECODING), "lemmatize": lemmatize, **scored}
        return _result(self, "vqa", len(answers), metrics, protocol)

    def _write(self, path: str, names: tuple[str, str], ids: Sequence[Any], texts: Sequence[str]) -> None:
        """Write predictions as the benchmarks' servers take them, if ``path`` is given."""
        if path and self.world.rank == 0:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            predictions = [dict(zip(names, row, strict=True)) for row in zip(ids, texts, strict=True)]
            Path(path).write_text(json.dumps(predictions, ensure_ascii=False))


def evaluate_probe(stage: Blip2Stage, model: str, report: ReportProgress = ignore_progress) -> Result:
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
    evaluation = Evaluation(stage, dataset="held out", report=report)
    held_out = held_out_samples(config, snapshot, config.probe.images)
    report(f"looking at {len(held_out):,} held-out images", 0, 0)
    return _result(evaluation, "probe", len(held_out), validate(stage, held_out, config), {})


def _snapshot_of_run(model: str, config: PretrainConfig) -> Snapshot | None:
    """Return the shards that a run was trained on, with its held-out images; None where the model is not of a run."""
    name = model.rstrip("/").removesuffix(".json")
    folder, _, last = name.rpartition("/")
    run = Storage(folder if last.startswith("step-") else name)
    files = [info.path for info in run.list("") if info.path.startswith("snapshot-")]
    return parse_snapshot(run.read(files[0]), config.data, run.url(files[0])) if files else None


def _settings(stage: Blip2Stage) -> dict[str, Any]:
    """Return the settings of the model that its numbers depend on."""
    config = stage.config
    settings = {
        "image_size_px": config.data.image_size_px,
        "vision": config.vision.model,
        "language": config.language.model if config.language else "",
        "precision": str(stage.Qformer.dtype).removeprefix("torch."),
    }
    return {name: value for name, value in settings.items() if value}


def _result(
    evaluation: Evaluation, task: str, samples: int, metrics: Mapping[str, float], protocol: Mapping[str, Any]
) -> Result:
    return Result(
        task=task,
        dataset=evaluation.dataset,
        samples=samples,
        metrics={name: round(value, 4) for name, value in metrics.items()},
        protocol={**protocol, **_settings(evaluation.stage)},
        published=published(task, evaluation.dataset),
        seconds=round(time.perf_counter() - evaluation.began, 1),
    )
