"""The commands of the training room, pretrain and bootstrap. Libraries are imported inside: --help stays quick."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli.groups import MEASURE, TRAIN
from jobs.cli.options import JsonObjectOption, SetOption
from jobs.output.render import complain, print_json, print_table

if TYPE_CHECKING:
    from training.trainer.summary import Summary

training = typer.Typer()


@training.command(rich_help_panel=TRAIN)
def pretrain(
    config: Annotated[
        str, typer.Option("-c", "--config", help="The training run's TOML file.", metavar="FILE")
    ],
    set_: SetOption = None,
    max_hours: Annotated[
        float | None, typer.Option("--max-hours", min=0, help="In place of run.max_hours.", metavar="X")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be trained and what it costs, without weights.")
    ] = False,
    json_: JsonObjectOption = False,
) -> None:
    """Train BLIP or BLIP-2 on curated shards, or go on with it. Exit code 1 if it cannot go on, 3 after its hours."""
    from pipeline.config import load_config
    from schemas.pretrain import PretrainConfig

    overrides = [*(set_ or ()), *([f"run.max_hours={max_hours}"] if max_hours is not None else [])]
    loaded = load_config(config, overrides, PretrainConfig)
    if dry_run:
        from training.trainer.estimate import plan

        planned = plan(loaded)
        print(json.dumps(planned) if json_ else plan_text(planned))
        return
    from jobs.pretrain import (
        TrainingFailedError,
        TrainingInterruptedError,
        training_interrupts,
    )
    from jobs.pretrain import pretrain as train
    from jobs.ranks.launched_rank import is_first_rank

    interrupts = training_interrupts()
    try:
        summary = train(loaded, interrupts)
    except TrainingFailedError as error:
        is_interrupted = isinstance(error, TrainingInterruptedError)
        if is_first_rank() or not is_interrupted:
            complain(error)
        raise typer.Exit(interrupts.exit_code if is_interrupted else 1) from error
    if is_first_rank():
        print(summary.to_json() if json_ else _end_text(summary))
    if summary.outcome == "done":
        raise typer.Exit(0)
    raise typer.Exit(interrupts.exit_code if interrupts.count else 3)


def _end_text(summary: "Summary") -> str:
    ended = f"{summary.outcome}: step {summary.step:,} of {summary.steps:,}; {summary.folder}/{summary.checkpoint}"
    more = "\nthe same command goes on where this one stopped" if summary.outcome == "interrupted" else ""
    return ended + more


@training.command(rich_help_panel=TRAIN)
def bootstrap(
    config: Annotated[
        str, typer.Option("-c", "--config", help="The bootstrapping's TOML file.", metavar="FILE")
    ],
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, help="In place of bootstrap.rounds.", metavar="N")
    ] = None,
    set_: SetOption = None,
    local: Annotated[
        bool, typer.Option("--local", help="Work on the corpora in this process, without Ray.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say which steps are done; do nothing.")] = False,
    json_: JsonObjectOption = False,
) -> None:
    """Caption and filter a corpus with models trained on it. Safe to kill and to repeat.

    A round pretrains BLIP on the corpus of the round before, fine-tunes captioner and filter on its human captions, and
    makes the next corpus of the same images. Round 1 begins with the web's own captions.
    """
    from jobs.bootstrap.rounds import load_rounds

    loaded = load_rounds(config, set_ or (), rounds)
    from rich.console import Console

    from jobs.bootstrap.run import BootstrapStopped, steps
    from jobs.bootstrap.run import bootstrap as do_missing
    from jobs.pretrain import TrainingFailedError

    console = Console(stderr=json_, soft_wrap=True)
    if not dry_run:
        try:
            for step in do_missing(loaded, console, local):
                console.print(f"{step.name}: {step.place}", highlight=False, markup=False)
        except (BootstrapStopped, TrainingFailedError) as error:
            complain(error)
            raise typer.Exit(error.exit_code if isinstance(error, BootstrapStopped) else 1) from error
    rows = [
        {"step": step.name, "state": "done" if step.is_done() else "to do", "place": step.place}
        for step in steps(loaded, console)
    ]
    print_json({"steps": rows}) if json_ else print_table(rows)


def plan_text(plan: dict) -> str:
    """Return a plan as lines for people."""
    data, memory = plan["data"], plan["memory_gb"]
    if data["found"]:
        sources = ", ".join(f"{name} {images:,}" for name, images in data["sources"].items())
        images = (
            f"{data['images']:,} images in {data['shards']:,} shards ({sources}): {data['epochs']:g} epochs"
        )
    else:
        images = f"not looked at: {', '.join(data['paths'])} is not there yet"
    # BLIP's own code projects an image's keys and values once for each of its pairs.
    gflop = plan["gflop_per_sample_published"]
    published = f" ({gflop:,.1f} as BLIP's code computes it)" if gflop else ""
    is_blip, number = isinstance(plan["stage"], str), plan["frozen_parameters"]
    untrained = f"; {'momentum encoders' if is_blip else 'frozen'} {number:,}" if number else ""
    stage = plan["stage"] if is_blip else f"stage {plan['stage']}"
    return "\n".join(
        [
            f"{stage}: {plan['name']}",
            f"data        {images}",
            f"trained     {plan['trainable_parameters']:,} parameters{untrained}",
            f"steps       {plan['steps']:,} of {plan['batch_size']:,} images: {plan['samples']:,} samples",
            f"cost        {plan['gflop_per_sample']:,.1f} GFLOP a sample{published}",
            f"            {plan['gpu_hours']:,.2f} GPU-hours at {plan['gpu_hours_at']} (estimate)",
            f"memory      {memory['total']:,.1f} GB a rank (estimate)",
            f"            weights and optimiser {memory['weights_and_optimizer']:,.1f}, "
            f"batch {memory['batch']:,.1f}, micro-batch {memory['micro_batch']:,.1f}",
        ]
    )


@training.command(rich_help_panel=MEASURE)
def experiment(
    name: Annotated[
        str,
        typer.Argument(help="all, or one of docs/experiments.md.", metavar="NAME", show_default=False),
    ],
    out: Annotated[
        str, typer.Option("--out", help="Folder of the experiments.", metavar="FOLDER")
    ] = "experiments",
    arm: Annotated[
        list[str] | None, typer.Option("--arm", help="Only this arm; may be repeated.", metavar="NAME")
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            "--seeds",
            min=1,
            help="Trainings of each arm; 3, and 5 of those that matter most, unless given.",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            min=3,
            help="Of each training; 350 to 900 unless given.",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    urls: Annotated[int, typer.Option("--urls", min=100, help="Of the demo world.", metavar="N")] = 2400,
    scenes: Annotated[
        int,
        typer.Option("--scenes", min=20, max=2000, help="New ones that a model is judged by.", metavar="N"),
    ] = 1000,
    filter_: Annotated[
        str,
        typer.Option(
            "--filter",
            help="A filter of the demo's size, exported; the demo's own unless given.",
            metavar="FOLDER",
            show_default=False,
        ),
    ] = "",
    json_: JsonObjectOption = False,
) -> None:
    """Compare ways to curate and to train on the demo world.

    Trains a model on what each keeps, with several seeds; goes on where it stopped, and writes a page.
    """
    from pathlib import Path

    from rich.console import Console

    from jobs.experiments.questions import QUESTIONS, question
    from jobs.experiments.report import print_results, summary, total_line, write_page
    from jobs.experiments.run import Extent, run_experiment
    from jobs.pretrain import TrainingFailedError
    from schemas.errors import CapfiltError

    asked = [question(name)] if name != "all" else list(QUESTIONS.values())
    if name == "all" and arm:
        raise CapfiltError("--arm belongs to one experiment; name it in place of all")
    if filter_ and not any(each.asks_filter for each in asked):
        raise CapfiltError(f"--filter: {name} does not ask the demo's filter; leave it out")
    extent = Extent(
        arms=tuple(arm or ()),
        seeds=seeds,
        steps=steps,
        num_urls=urls,
        num_scenes=scenes,
        filter_folder=filter_,
    )
    # A smaller run does not replace the page of the whole one.
    is_part = bool(arm or seeds or steps or scenes != Extent().num_scenes)
    console, every, found = Console(stderr=True, soft_wrap=True), [], []
    for each in asked:
        try:
            results = run_experiment(each, Path(out).absolute(), extent, console)
        except TrainingFailedError as error:
            complain(error)
            raise typer.Exit(1) from error
        page = Path(out) / f"{each.name}{'-part' if is_part else ''}.html"
        write_page(results, page)
        every.append(results)
        found.append(summary(results) | {"page": str(page)})
        if not json_:
            print_results(results)
            print(f"{page}\n")
    if json_:
        print_json({"experiments": found} if name == "all" else found[0])
    else:
        print(total_line(every, Path(out)))
