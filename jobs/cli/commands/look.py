"""The command ``look``: a corpus as a page, served on this machine or written as one file."""

import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli.groups import LOOK
from jobs.cli.options import CorpusArgument, open_manifest
from schemas.errors import CapfiltError

if TYPE_CHECKING:
    from pipeline.manifest.manifest import Manifest

looking = typer.Typer()


@looking.command(rich_help_panel=LOOK)
def look(
    corpus: CorpusArgument,
    port: Annotated[
        int,
        typer.Option("--port", min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.", metavar="N"),
    ] = 0,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")
    ] = True,
    html: Annotated[
        str | None,
        typer.Option("--html", help="Write the first screen as one file instead.", metavar="FILE"),
    ] = None,
    images: Annotated[
        int, typer.Option("--images", min=8, max=2000, help="Images in that file.", metavar="N")
    ] = 96,
) -> None:
    """Show a corpus as a page. What became of every URL, what is worth a look, every image with its captions.

    The page is served on 127.0.0.1 alone, at an address that carries a random token; Ctrl-C ends it. With --html the
    first screen is one file: images inside, no script, no request.
    """
    manifest = open_manifest(corpus)
    if html is not None:
        _write(corpus, manifest, Path(html), images)
        return
    _serve(corpus, manifest, port, browser and sys.stdout.isatty())


def _serve(corpus: str, manifest: "Manifest", port: int, browser: bool) -> None:
    import asyncio

    from jobs.look.server import Server, serve

    def started(address: str) -> None:
        print(address, flush=True)
        if browser:
            webbrowser.open(address)

    asyncio.run(serve(Server(corpus, manifest), port, started))


def _write(corpus: str, manifest: "Manifest", path: Path, images: int) -> None:
    from jobs.look.page import overview_file
    from jobs.look.snapshot import Snapshot

    text = overview_file(Snapshot(manifest), corpus, images=images)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CapfiltError(f"--html {path}: cannot be written: {error.strerror}") from error
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
