"""The commands ``evaluate`` and ``export``. Libraries are imported inside, so that --help stays quick."""

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.cli.groups import CommandGroup
from jobs.cli.options import JsonObjectOption, SetOption
from jobs.output.evaluation_progress import EvaluationProgress
from jobs.output.render import print_facts, print_json, print_table
from schemas.errors import CapfiltError

if TYPE_CHECKING:
    from schemas.pretrain import PretrainConfig
    from training.distributed import World
    from training.evaluate.annotations import CaptionedImage
    from training.evaluate.published import Result
    from training.evaluate.tasks import Evaluation

# The recalls before ITM reranked, in a result's metrics.
_BY_ITC = "itc_"


def _over_zero(value: float) -> float:
    if not 0 < value < math.inf:
        raise typer.BadParameter(f"{value:g} is not a number over 0")
    return value


evaluate = typer.Typer(cls=CommandGroup, no_args_is_help=True, rich_markup_mode=None)

Model = Annotated[
    str,
    typer.Argument(
        help="A run's folder or checkpoint, an export, a LAVIS .pth, a Blip2 folder.", metavar="MODEL"
    ),
]
Config = Annotated[
    str,
    typer.Option("-c", "--config", help="Recipe of the model, where its files do not say.", metavar="FILE"),
]
Annotations = Annotated[
    str, typer.Option("--annotations", help="Captions: of Karpathy, LAVIS, COCO or NoCaps.", metavar="FILE")
]
Images = Annotated[
    str, typer.Option("--images", help="Folder that the annotations' file names begin in.", metavar="DIR")
]
Split = Annotated[str, typer.Option("--split", help="Of a Karpathy file: val, test.", metavar="NAME")]
Dataset = Annotated[
    str,
    typer.Option("--dataset", help="To compare with: coco, flickr30k, nocaps, vqav2-val ...", metavar="NAME"),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images at once.", metavar="N")]
Beams = Annotated[int, typer.Option("--beams", min=1, metavar="N")]
Predictions = Annotated[
    str, typer.Option("--predictions", help="Write what the model said, as servers take it.", metavar="FILE")
]


@evaluate.command()
def retrieval(
    model: Model,
    annotations: Annotations,
    images: Images,
    config: Config = "",
    set_: SetOption = None,
    split: Split = "test",
    dataset: Dataset = "",
    rerank: Annotated[
        int, typer.Option("--rerank", min=0, help="Candidates that ITM sees; 0: ITC alone.", metavar="K")
    ] = 128,
    batch_size: BatchSize = 32,
    json_: JsonObjectOption = False,
) -> None:
    """Find texts by image and images by text: ITC, and ITM over the first of each list. Stage 1."""
    recipe = _recipe(config, set_)
    captioned = _captioned(annotations, split, images)
    with _evaluation(model, recipe, json_, images, dataset, batch_size) as evaluation:
        result = evaluation.retrieval(captioned, rerank)
    _show(result, model, json_)


@evaluate.command()
def caption(
    model: Model,
    annotations: Annotations,
    images: Images,
    config: Config = "",
    set_: SetOption = None,
    split: Split = "test",
    dataset: Dataset = "",
    prompt: Annotated[str, typer.Option("--prompt", help='Begins every caption, as "a photo of".')] = "",
    beams: Beams = 5,
    min_tokens: Annotated[int, typer.Option("--min-tokens", min=0, metavar="N")] = 8,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, metavar="N")] = 30,
    length_penalty: Annotated[float, typer.Option("--length-penalty")] = 1.0,
    repetition_penalty: Annotated[
        float,
        typer.Option("--repetition-penalty", help="Over 1: fewer tokens come twice.", callback=_over_zero),
    ] = 1.0,
    java: Annotated[bool, typer.Option("--java", help="Count words by Stanford's tokenizer itself.")] = False,
    predictions: Predictions = "",
    batch_size: BatchSize = 32,
    json_: JsonObjectOption = False,
) -> None:
    """Caption images and score the captions by CIDEr and BLEU-4: the language model's, in stage 1 the Q-Former's.

    SPICE is not computed: it needs Stanford's parser in Java. pycocoevalcap scores the FILE of --predictions.
    """
    recipe = _recipe(config, set_)
    captioned = _captioned(annotations, split, images)
    from training.evaluate.generation import Decoding

    decoding = Decoding(
        beams=beams,
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        length_penalty=length_penalty,
        repetition_penalty=repetition_penalty,
    )
    with _evaluation(model, recipe, json_, images, dataset, batch_size) as evaluation:
        result = evaluation.captions(
            captioned, prompt=prompt, decoding=decoding, java=java, predictions=predictions
        )
    _show(result, model, json_)


@evaluate.command()
def vqa(
    model: Model,
    questions: Annotated[
        str, typer.Option("--questions", help="Of VQAv2, OK-VQA or GQA, or LAVIS's list.", metavar="FILE")
    ],
    images: Images,
    answers: Annotated[
        str, typer.Option("--answers", help="VQA's annotations; none for a hidden test set.", metavar="FILE")
    ] = "",
    config: Config = "",
    set_: SetOption = None,
    dataset: Dataset = "",
    prompt: Annotated[
        str, typer.Option("--prompt", help="The question stands at {}; empty: the paper's for the model.")
    ] = "",
    lemmatize: Annotated[
        bool,
        typer.Option("--lemmatize", help="Answers to their lemma, as LAVIS does for OK-VQA; needs spaCy."),
    ] = False,
    predictions: Predictions = "",
    batch_size: BatchSize = 32,
    json_: JsonObjectOption = False,
) -> None:
    """Answer questions about images, zero-shot, and score the answers officially. Stage 2."""
    from training.evaluate.annotations import read_questions, require_enough_answers

    recipe = _recipe(config, set_)
    asked = read_questions(questions, answers)
    require_enough_answers(asked, answers or questions)
    if not predictions and not any(question.answers for question in asked.questions):
        raise CapfiltError(
            f"{questions} comes without answers: name them with --answers, or a file for --predictions"
        )
    _require_pictures(images, [question.file for question in asked.questions])
    with _evaluation(model, recipe, json_, images, dataset, batch_size) as evaluation:
        result = evaluation.answers(asked, prompt=prompt, lemmatize=lemmatize, predictions=predictions)
    _show(result, model, json_)


@evaluate.command("probe")
def probe_(
    model: Model, config: Config = "", set_: SetOption = None, json_: JsonObjectOption = False
) -> None:
    """Look at the images that the run held out: recall at 1, ITM accuracy, CIDEr."""
    recipe = _recipe(config, set_)
    from training.evaluate.tasks import evaluate_probe

    with _loaded(model, recipe, json_) as (stage, report, _):
        result = evaluate_probe(stage, model, report)
    _show(result, model, json_)


def export(
    model: Model,
    folder: Annotated[str, typer.Argument(help="New folder to write.", metavar="DIR")],
    config: Config = "",
    set_: SetOption = None,
    json_: JsonObjectOption = False,
) -> None:
    """Write a model in a format that others can load.

    Hugging Face's Blip2 where the image encoder is an EVA, and Blip for BLIP's captioner and filter; our own documented
    format with any other; BLIP's own for a DIR that ends in .pth.
    """
    from pathlib import Path

    recipe = _recipe(config, set_)
    from training.convert.export import export_model
    from training.convert.load import checkpoint_of, load_trained

    stage = load_trained(model, recipe, precision="fp32")
    kind = export_model(stage, Path(folder), checkpoint_of(model))
    how = _how_to_load(kind, folder, stage.config)
    if json_:
        print_json({"folder": folder, "format": kind, "load": how})
    else:
        names = {"huggingface": "Hugging Face", "blip": "BLIP"}
        print(f"written in the {names.get(kind, 'capfilt')} format: {folder}\n{how}")


def _how_to_load(kind: str, folder: str, config: "PretrainConfig") -> str:
    if isinstance(config.run.stage, str):
        return _how_to_load_blip(kind, folder, config)
    if kind == "huggingface":
        name = "Blip2ForImageTextRetrieval" if config.run.stage == 1 else "Blip2ForConditionalGeneration"
        return (
            f"Load it with transformers: {name}.from_pretrained({folder!r}) and Blip2Processor.from_pretrained"
            f"({folder!r}); capfilt evaluate reads it too."
        )
    return (
        f"Load it with capfilt: capfilt evaluate ... {folder}, or run.init_from = {folder!r}. transformers cannot: its "
        f"Blip2 has no place for the image encoder {config.vision.model!r}, only for EVA's."
    )


def _how_to_load_blip(kind: str, folder: str, config: "PretrainConfig") -> str:
    if kind != "huggingface":
        return f"Begin a training with it: run.init_from = {folder!r}."
    name, key = "BlipForConditionalGeneration", "caption.model"
    if config.run.stage == "blip-filter":
        name, key = "BlipForImageTextRetrieval", "filter.model"
    return f"Use it in a corpus: {key} = {folder!r}. Load it with transformers: {name}.from_pretrained({folder!r})."


def _recipe(config: str, overrides: list[str] | None) -> Any:
    """Return the recipe; asked for before the imports of a model, which take seconds."""
    if not config:
        if overrides:
            raise CapfiltError("--set changes a recipe: name one with -c")
        return None
    from pipeline.config import load_config
    from schemas.pretrain import PretrainConfig

    return load_config(config, overrides or (), PretrainConfig)


@contextlib.contextmanager
def _loaded(model: str, recipe: Any, as_json: bool) -> "Iterator[tuple[Any, EvaluationProgress, World]]":
    """Load a model and yield it with its progress and the ranks that torchrun or srun has started.

    Quiet where a program reads the answer and nobody watches.
    """
    from jobs.ranks.launched_rank import LaunchedRank

    launched = LaunchedRank.of(os.environ)
    is_later_rank = launched is not None and launched.rank > 0
    with EvaluationProgress(quiet=is_later_rank or (as_json and not sys.stderr.isatty())) as report:
        report(f"loading {model}")
        from jobs.ranks.rank import device_of
        from training.convert.load import load_blip2
        from training.distributed import World

        if launched is not None:
            os.environ |= launched.variables()
        world = World.join(device_of(launched.local if launched else 0))
        try:
            yield load_blip2(model, recipe, world.device), report, world
        finally:
            world.close()


@contextlib.contextmanager
def _evaluation(
    model: str, recipe: Any, as_json: bool, images: str, dataset: str, batch_size: int
) -> "Iterator[Evaluation]":
    """Load a model and yield its evaluation, under a line of progress."""
    with _loaded(model, recipe, as_json) as (stage, report, world):
        from training.evaluate.tasks import Evaluation

        yield Evaluation(stage, images, dataset=dataset, batch_size=batch_size, report=report, world=world)


def _captioned(annotations: str, split: str, images: str) -> "list[CaptionedImage]":
    from training.evaluate.annotations import read_captioned_images

    captioned = read_captioned_images(annotations, split)
    _require_pictures(images, [image.file for image in captioned])
    return captioned


def _require_pictures(images: str, files: Sequence[str]) -> None:
    """Fail before a model of many gigabytes is loaded, not after: read the first image, look whether all are there."""
    from training.evaluate.images import BenchmarkImages

    pictures = BenchmarkImages(images, 1)
    pictures.pixels(files[0])
    pictures.require_all(files)


def _show(result: "Result", model: str, as_json: bool) -> None:
    from jobs.ranks.launched_rank import is_first_rank

    if not is_first_rank():
        return
    result = dataclasses.replace(result, checkpoint=model)
    if as_json:
        print(result.to_json())
        return
    names = {"model": "checkpoint", "task": "task", "dataset": "dataset", "images": "samples"}
    print_facts({**{name: getattr(result, field) for name, field in names.items()}, **result.protocol})
    # None where the answers of a test set are hidden.
    if result.metrics:
        print()
        print_table(_rows(result))


def _rows(result: "Result") -> list[dict[str, str]]:
    """Return the table: this model, by ITC and by ITM where the metrics have both, then the published ones."""
    metrics = {name: value for name, value in result.metrics.items() if not name.startswith(_BY_ITC)}
    by_itc = {
        name.removeprefix(_BY_ITC): value
        for name, value in result.metrics.items()
        if name.startswith(_BY_ITC)
    }
    if by_itc:
        first = f"ITM over the first {result.protocol['rerank']}"
        numbers_by_model: dict[str, Mapping[str, float]] = {"ITC": by_itc, first: metrics}
    else:
        numbers_by_model = {"this model": metrics}
    numbers_by_model |= {f"published: {name}": numbers for name, numbers in result.published.items()}
    return [
        {"": name, **{key: _readable(key, numbers.get(key)) for key in metrics}}
        for name, numbers in numbers_by_model.items()
    ]


def _readable(name: str, value: float | None) -> str:
    """Return a metric as papers print it: shares as percent, CIDEr and BLEU as they are."""
    if value is None:
        return "-"
    if name == "itm_accuracy":
        value *= 100
    return f"{value:.1f}%" if "_r" in name or "accuracy" in name else f"{value:.1f}"
