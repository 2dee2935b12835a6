"""The command ``init``. What it needs is imported inside, so that ``--help`` stays quick."""

import textwrap
from typing import Annotated

import typer

from jobs.cli.groups import BUILD

initial = typer.Typer()


@initial.command(rich_help_panel=BUILD)
def init(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FOLDER|LIST",
            help="Images, tars, img2dataset's shards, a dataset, or lists of URLs; all of one kind.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str, typer.Option(help="Config to write; never one that exists.", metavar="FILE")
    ] = "corpus.toml",
    recipe: Annotated[
        str,
        typer.Option(
            help="Follow a recipe: blip-capfilt, blip2, laion-coco.", metavar="NAME", show_default=False
        ),
    ] = "",
    model: Annotated[
        str, typer.Option(help="Captioner: hub id or folder.", metavar="MODEL", show_default=False)
    ] = "",
    ranker: Annotated[
        str,
        typer.Option(
            help="CLIP: folder, hf-hub:ORG/NAME or ARCHITECTURE/TAG.", metavar="MODEL", show_default=False
        ),
    ] = "",
    demo_weights: Annotated[
        bool, typer.Option("--demo-weights", help="The demo's tiny models: to try it without a download.")
    ] = False,
) -> None:
    """Write a config for pictures or lists of your own. Looks at them, at this machine and at the hub's cache."""
    from jobs.arrow_alone import import_arrow_alone

    import_arrow_alone()
    from jobs.init.command import init as write_config
    from jobs.output.render import printable_lines, screen_width

    result = write_config(
        inputs or (), out, recipe=recipe, model=model, ranker=ranker, demo_weights=demo_weights
    )
    for label, texts in result.facts.items():
        for number, text in enumerate(texts):
            head = f"{label if not number else '':<9}"
            lines = textwrap.wrap(
                text,
                screen_width() or max(len(text) + 20, 80),
                initial_indent=head,
                subsequent_indent=" " * len(head),
                break_long_words=False,
                break_on_hyphens=False,
            )
            print(printable_lines("\n".join(lines)))
    print(printable_lines(f"\nwrote {out}; its comments say what was found and what was guessed\n"))
    print("try next:")
    for command in result.commands:
        print(printable_lines(f"  {command}"))
