"""The steps of a bootstrapping, in their order: which are done, and what does the others."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from jobs.bootstrap.progress import is_exported, is_trained, is_whole, last_checkpoint, require_fetched
from jobs.bootstrap.rounds import Model, Rounds
from jobs.pretrain import TrainingInterruptedError, pretrain, training_interrupts
from jobs.run import RunOptions, run
from pipeline.corpus.checkpoint_files import SavedCheckpoints
from pipeline.corpus.records import Records
from pipeline.intake.take_over import take_over_crawl
from pipeline.storage.local_files import moved_when_whole, wait_for_lock
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig
from schemas.errors import CapfiltError
from schemas.stages import STAGES, Stage
from training.convert.export import export_model
from training.convert.load import load_trained

EXPORTED: tuple[Model, ...] = ("captioner", "filter")
# Exit code of a command that no signal stopped.
_NOT_DONE = 3


class BootstrapStopped(Exception):
    """Report a step that did not come to its end; ``exit_code`` is the step's."""

    def __init__(self, step: str, exit_code: int) -> None:
        super().__init__(f"{step} is not done; the same command goes on with it")
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step: ``place`` is what it makes, ``do`` makes what of it is missing."""

    name: str
    place: str
    is_done: Callable[[], bool]
    do: Callable[[], None]


def steps(rounds: Rounds, console: Console, local: bool = False) -> Iterator[Step]:
    """Yield the steps in their order, the last one the model that is pretrained on the last round's corpus.

    Args:
        local: the stages of the corpora run in this process, without Ray.
    """
    base, human = rounds.corpus, rounds.human_config()
    yield Step(
        name="crawl",
        place=base.corpus.path,
        is_done=partial(is_whole, base, "crawl", "corpus.path"),
        do=partial(_run_stages, base, ("crawl",), console, local),
    )
    yield Step(
        name="human captions",
        place=base.corpus.path,
        is_done=partial(is_whole, human, "select", "corpus.path"),
        do=partial(_run_stages, human, STAGES, console, local),
    )
    for number in range(1, rounds.count + 1):
        yield _training_step(rounds, "pretrain", number)
        for model in EXPORTED:
            yield _training_step(rounds, model, number)
            yield _export_step(rounds, model, number)
        config = rounds.round_config(number)
        yield Step(
            name=f"round {number}: corpus",
            place=config.corpus.path,
            is_done=partial(is_whole, config, "select", "bootstrap.path"),
            do=partial(_make_corpus, base, config, console, local),
        )
    yield _training_step(rounds, "pretrain", rounds.count + 1)


def bootstrap(rounds: Rounds, console: Console, local: bool = False) -> Iterator[Step]:
    """Do the steps that are missing, each after it was yielded. Safe to repeat and to kill at any time.

    Raises:
        CapfiltError: the input of a step is at fault.
        BootstrapStopped: a step was interrupted, or some of its shards failed.
    """
    for step in steps(rounds, console, local):
        if not step.is_done():
            yield step
            step.do()
            # Asked again: a corpus of which nothing is left is refused before anything is trained on it.
            if not step.is_done():
                raise BootstrapStopped(step.name, _NOT_DONE)


# -- corpora -------------------------------------------------------------------------------------------------


def _run_stages(config: CapfiltConfig, stages: tuple[Stage, ...], console: Console, local: bool) -> None:
    options = RunOptions(command="bootstrap", stages=stages, local=local, only_named=True)
    result = run(config, options, console)
    if result.record.outcome != "done":
        raise BootstrapStopped(config.corpus.path, result.exit_code)


def _make_corpus(base: CapfiltConfig, config: CapfiltConfig, console: Console, local: bool) -> None:
    storage = Storage(config.corpus.path)
    storage.require_conditional_puts()
    storage.require_place("bootstrap.path")
    take_over_crawl(Records(Storage(base.corpus.path)), Records(storage))
    _run_stages(config, tuple(stage for stage in STAGES if stage != "crawl"), console, local)


# -- models --------------------------------------------------------------------------------------------------


def _training_step(rounds: Rounds, model: Model, number: int) -> Step:
    config, folder = rounds.training(model, number), rounds.run_folder(model, number)
    begins_with = "" if model == "pretrain" else rounds.run_folder("pretrain", number)
    return Step(
        name=f"round {number}: {model}",
        place=folder,
        is_done=partial(is_trained, config, folder, begins_with),
        do=partial(_train, rounds, model, number),
    )


def _train(rounds: Rounds, model: Model, number: int) -> None:
    config, section = rounds.training(model, number), rounds.config.bootstrap
    is_first = (model, number) == ("pretrain", 1)
    # A training that goes on has been let begin.
    if is_first and not SavedCheckpoints(rounds.run_folder(model, number)).committed():
        require_fetched(rounds.corpus, section.corpus, section.min_fetched)
    interrupts, name = training_interrupts(), f"{config.run.stage} {config.run.name}"
    try:
        summary = pretrain(config, interrupts)
    except TrainingInterruptedError as error:
        raise BootstrapStopped(name, interrupts.exit_code) from error
    if summary.outcome != "done":
        raise BootstrapStopped(name, interrupts.exit_code if interrupts.count else _NOT_DONE)


def _export_step(rounds: Rounds, model: Model, number: int) -> Step:
    run_folder, folder = rounds.run_folder(model, number), Path(rounds.model_folder(model, number))
    return Step(
        name=f"round {number}: {model} for the corpus",
        place=str(folder),
        is_done=partial(is_exported, run_folder, folder),
        do=partial(_export, run_folder, folder),
    )


def _export(run_folder: str, folder: Path) -> None:
    """Write the model beside its place, then move it there: a folder that is there is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Two of the same command wait for one training, and come here at once.
    with (folder.parent / f".{folder.name}.lock").open("wb") as file:
        wait_for_lock(file)
        if is_exported(run_folder, folder):
            return
        if folder.exists():
            raise CapfiltError(
                f"{folder} is there, and is not the export of {run_folder}; remove it, or set another bootstrap.models"
            )
        checkpoint = last_checkpoint(run_folder)
        assert checkpoint is not None, "the step before trained it"
        with moved_when_whole(folder) as unfinished:
            export_model(load_trained(checkpoint, precision="fp32"), unfinished, checkpoint)
