"""What commands share: arguments and options, and how a corpus is opened that is looked into."""

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.arrow_alone import import_arrow_alone
from jobs.output.render import complain
from schemas.corpus_format import FORMAT_FOLDER, require_known_format
from schemas.errors import CapfiltError

if TYPE_CHECKING:
    from pipeline.manifest.manifest import Manifest
    from pipeline.storage.storage import Storage

CorpusArgument = Annotated[
    str, typer.Argument(metavar="CORPUS", help="Folder or URL of the corpus.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of a table.")]
JsonObjectOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one key; may be repeated.", metavar="SECTION.KEY=VALUE"),
]
LimitOption = Annotated[int, typer.Option("--limit", min=1, help="At most N lines.", metavar="N")]
WideOption = Annotated[bool, typer.Option("--wide", help="Show every column and every digest whole.")]
SourceOption = Annotated[str | None, typer.Option("--source", help="Only this [[source]].", metavar="NAME")]
AddressOption = Annotated[str, typer.Option("--address", help="Dashboard of the Ray cluster.", metavar="URL")]
HeaderOption = Annotated[
    list[str] | None,
    typer.Option(
        "--header", help="Sent with each request, for a proxy; may be repeated.", metavar="NAME=VALUE"
    ),
]
AllowOpenOption = Annotated[
    bool, typer.Option("--allow-open", help="Also to a cluster that asks nobody for a token.")
]


def open_manifest(corpus: str) -> "Manifest":
    """Open a corpus that exists: a mistyped name must not read as an empty one."""
    storage = open_corpus(corpus)
    import_arrow_alone()
    from pipeline.manifest.manifest import Manifest

    manifest = Manifest(storage)
    if warning := manifest.rewrite_copied_catalog():
        complain(warning)
    return manifest


def open_corpus(corpus: str) -> "Storage":
    """Return the storage of a corpus. Raises CapfiltError where there is none, or one of a newer format."""
    from pipeline.storage.storage import Storage

    storage = Storage(corpus)
    if not storage.is_corpus():
        raise CapfiltError(
            f"{corpus} is not a corpus: it has no records/ folder; give the [corpus] path of its config"
        )
    require_known_format(corpus, (info.path for info in storage.list(FORMAT_FOLDER)))
    return storage
