"""The command ``capfilt``: one small function a command, heavy imports inside them."""

import atexit
import contextlib
import gc
import inspect
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer

from jobs.arrow_alone import import_arrow_alone
from jobs.bench.commands import bench
from jobs.cli.commands.cluster import cluster
from jobs.cli.commands.evaluate import evaluate, export
from jobs.cli.commands.init import initial
from jobs.cli.commands.look import looking
from jobs.cli.commands.marks import marks
from jobs.cli.commands.reports import reports
from jobs.cli.commands.trace import traces
from jobs.cli.commands.train import training
from jobs.cli.commands.upkeep import upkeep
from jobs.cli.commands.verify import verification
from jobs.cli.groups import BUILD, HELP_OPTIONS, MEASURE, TRAIN, CommandGroup
from jobs.cli.options import JsonObjectOption, SetOption
from jobs.interrupts import Interrupts
from jobs.output.render import complain, printable_lines
from schemas.errors import CapfiltError, TryAgainLaterError
from schemas.stages import STAGE_INFO, STAGES, Stage

_INTERRUPTED = 130

app = typer.Typer(
    name="capfilt",
    cls=CommandGroup,
    context_settings=HELP_OPTIONS,
    help="Build a CapFilt corpus from image URLs: crawl, caption ten times, rank, keep two.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Config = Annotated[str, typer.Option("-c", "--config", help="The corpus's TOML file.", metavar="FILE")]
Recompute = Annotated[bool, typer.Option("--recompute", help="Replace stale shards instead of refusing.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Work on at most N shards.", metavar="N")]
MaxGpuHours = Annotated[
    float | None,
    typer.Option(
        "--max-gpu-hours",
        min=0,
        help="Begin no shard once the run's workers have used so many GPU-hours.",
        metavar="X",
    ),
]
MaxHours = Annotated[
    float | None, typer.Option("--max-hours", min=0, help="Begin no shard after X hours.", metavar="X")
]
Source = Annotated[
    list[str] | None, typer.Option("--source", help="Only this [[source]]; may be repeated.", metavar="NAME")
]
Local = Annotated[bool, typer.Option("--local", help="Work in this process, a shard at a time, without Ray.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done and what it costs; do nothing.")
]
Retry = Annotated[
    list[str] | None,
    typer.Option(
        "--retry",
        help="Queue again what ended so, instead of reading the lists: transient, statuses or reasons "
        "(refused,http_4xx). A wrong word lists them.",
        metavar="WHICH",
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"capfilt {version('capfilt')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _load(config: str, overrides: list[str] | None, sources: list[str] | None = None) -> Any:
    """Return the config, cut down to the named sources if there are any."""
    from pipeline.config import load_config
    from schemas.errors import did_you_mean

    loaded = load_config(config, overrides or ())
    if not sources:
        return loaded
    names = [source.name for source in loaded.source]
    for name in sources:
        if name not in names:
            raise CapfiltError(f"--source {name}: {config} has no such source{did_you_mean(name, names)}")
    return loaded.model_copy(
        update={"source": tuple(source for source in loaded.source if source.name in sources)}
    )


def _stage_command(name: str, stages: tuple[Stage, ...], text: str) -> None:
    """Add the command that runs some stages; ``--retry`` is for those that crawl."""

    def command(
        config: Config,
        set_: SetOption = None,
        source: Source = None,
        retry: Retry = None,
        recompute: Recompute = False,
        limit: Limit = None,
        max_gpu_hours: MaxGpuHours = None,
        max_hours: MaxHours = None,
        local: Local = False,
        dry_run: DryRun = False,
        json_: JsonObjectOption = False,
    ) -> None:
        retried = _retry_words(retry)
        # Before the imports of a run, which take seconds: an error in the config is reported at once.
        loaded = _load(config, set_, source)
        import_arrow_alone()
        from rich.console import Console

        from jobs.cli.commands.plan import plan_corpus, print_plan
        from jobs.cli.summary import print_result, result_json
        from jobs.run import RunOptions, run
        from pipeline.runs.limits import RunLimits

        if dry_run:
            planned = plan_corpus(loaded, stages, retried, only_named=bool(source))
            print(json.dumps(planned)) if json_ else print_plan(planned)
            return
        options = RunOptions(
            command=name,
            stages=stages,
            recompute=recompute,
            retry=retried,
            limit=limit,
            limits=RunLimits(gpu_hours=max_gpu_hours, hours=max_hours),
            quiet=json_,
            local=local,
            only_named=bool(source),
        )
        console = Console(stderr=json_, soft_wrap=True)
        result = run(loaded, options, console)
        if json_:
            print(json.dumps(result_json(result, config)))
        else:
            print_result(result, console, config)
        raise typer.Exit(result.exit_code)

    if "crawl" not in stages:
        signature = inspect.signature(command)
        parameters = [option for option in signature.parameters.values() if option.name != "retry"]
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # typer's list
    app.command(name, help=text, rich_help_panel=BUILD)(command)


def _retry_words(given: list[str] | None) -> str | None:
    """Return all that --retry names, checked."""
    from schemas.statuses import retried_reasons

    if not given:
        return None
    words = ",".join(given)
    retried_reasons(words)
    return words


app.registered_commands.extend(initial.registered_commands)
_ALL = f"{', '.join(STAGES[:-1])} and {STAGES[-1]}"
_stage_command("run", STAGES, f"Do all that is missing: {_ALL}. All in one streaming run.")
for _stage in STAGES:
    _stage_command(_stage, (_stage,), STAGE_INFO[_stage].help)


@app.command(rich_help_panel=BUILD)
def plan(
    config: Config,
    set_: SetOption = None,
    source: Source = None,
    preview: Annotated[
        bool,
        typer.Option("--preview", help="Say instead what [select] would keep of the scores that are there."),
    ] = False,
    json_: JsonObjectOption = False,
) -> None:
    """Say what is pending and stale, and what it will cost. Changes nothing."""
    loaded = _load(config, set_, source)
    import_arrow_alone()
    from jobs.cli.commands.plan import plan_corpus, preview_corpus, print_plan, print_preview

    if preview:
        rows = preview_corpus(loaded)
        print(json.dumps({"preview": rows})) if json_ else print_preview(rows)
        return
    planned = plan_corpus(loaded, only_named=bool(source))
    print(json.dumps(planned)) if json_ else print_plan(planned)


app.registered_commands.extend(cluster.registered_commands)


@app.command(rich_help_panel=BUILD)
def demo(
    out: Annotated[str, typer.Option(help="Folder of the demo corpus.", metavar="DIR")] = "demo-corpus",
    corpus_only: Annotated[bool, typer.Option("--corpus-only", help="Leave out the training.")] = False,
    json_: JsonObjectOption = False,
) -> None:
    """Build a small corpus here, train on it, and judge both.

    Its web is a small world served on loopback, so that the truth of every caption can be checked.
    """
    from jobs.demo.run import run_demo

    raise typer.Exit(run_demo(out, as_json=json_, corpus_only=corpus_only))


for commands in (looking, reports, traces, marks, verification, upkeep, training):
    app.registered_commands.extend(commands.registered_commands)
app.command(rich_help_panel=TRAIN)(export)
app.add_typer(
    evaluate, name="evaluate", help="Score a trained model on published benchmarks.", rich_help_panel=MEASURE
)
app.add_typer(
    bench,
    name="bench",
    cls=CommandGroup,
    help="Measure what the pipeline costs on this machine.",
    rich_help_panel=MEASURE,
)


def _interruptible(command: Callable[[], Any]) -> None:
    """Call a command, which SIGTERM ends as Ctrl-C does: with 128 + the signal's number."""
    with Interrupts() as interrupts:
        try:
            command()
        except KeyboardInterrupt:  # before Typer handles it
            sys.exit(interrupts.exit_code)
        except SystemExit as ended:
            # Typer says 130 whichever signal it was.
            sys.exit(interrupts.exit_code if interrupts.count and ended.code == _INTERRUPTED else ended.code)


def program() -> None:
    """Be the process ``capfilt``: run the command line, and end with its exit code."""
    code = 0

    def end_beside_threads() -> None:
        # Threads may still wait for a name server or a storage. Python would take the modules from under them, and of
        # each object that they hold DuckDB's binding would print that it leaked.
        if any(thread.daemon for thread in threading.enumerate()):
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(code)

    atexit.register(end_beside_threads)  # first, and so called last
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 our fault, 2 the user's input, 3 done in part, 4 try again later, 130 or 143 stopped.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    # Arrow's own pool keeps 40 to 80 MB of what a question to 50,000 records has freed, and is not quicker.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    # The imports make 60,000 objects that stay: at the default of 700 the collector walks them over and over.
    gc.set_threshold(50_000)
    try:
        _interruptible(app)
    except CapfiltError as error:
        complain(error)
        sys.exit(4 if isinstance(error, TryAgainLaterError) else 2)
    except Exception as error:
        from pipeline.storage.errors import StorageAwayError, storage_error_message

        if message := storage_error_message(error):
            complain(message)
            sys.exit(4 if isinstance(error, StorageAwayError) else 2)
        print(printable_lines(traceback.format_exc()), end="", file=sys.stderr)
        complain("this is a fault of capfilt, not of your input; please report the lines above")
        sys.exit(1)
