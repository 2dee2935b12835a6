"""The command ``mark``: a verdict on samples, or its being taken back."""

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.arrow_alone import import_arrow_alone
from jobs.cli.groups import KEEP
from jobs.cli.options import CorpusArgument, JsonObjectOption, open_corpus
from jobs.output.render import print_json
from schemas.errors import CapfiltError
from schemas.names import printable
from schemas.statuses import By, What

if TYPE_CHECKING:
    from schemas.marks import MarkRecord

marks = typer.Typer()

_SHARDS_NAMED = 5


@marks.command(rich_help_panel=KEEP)
def mark(
    corpus: CorpusArgument,
    what: Annotated[
        What,
        typer.Option(
            help="drop: the image; not-this-caption: one text of it, so that the next best is kept."
        ),
    ],
    reason: Annotated[str, typer.Option(help="Why, for who reads it later.", metavar="TEXT")],
    uid: Annotated[list[str] | None, typer.Option(help="May be repeated, as the next three.")] = None,
    url: Annotated[list[str] | None, typer.Option(help="Letter by letter as the list has it.")] = None,
    host: Annotated[list[str] | None, typer.Option(help="Every URL of that host.")] = None,
    sha256: Annotated[
        list[str] | None, typer.Option(help="Every image with these bytes, as fetched.")
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from", help="A list of uids or URLs: Parquet, CSV, TSV, JSON or text.", metavar="FILE"
        ),
    ] = None,
    caption: Annotated[
        str | None,
        typer.Option(
            help="The text of not-this-caption; without it the best that is kept now.", metavar="TEXT"
        ),
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Take back what was marked so.")] = False,
    json_: JsonObjectOption = False,
) -> None:
    """Mark samples that training should not see. The next run selects their shards anew.

    What is fetched stays. A mark of a URL or host also holds for what later lists bring.
    """
    from pipeline.corpus.records import Records

    storage = open_corpus(corpus)
    storage.require_conditional_puts()
    import_arrow_alone()
    from pipeline.marks.marking import Verdict, places_of, take_back
    from pipeline.marks.marking import mark as make_marks

    by, values = _named({"uid": uid, "url": url, "host": host, "sha256": sha256}, from_)
    verdict = Verdict(what=what, named_by=by, values=values, reason=reason, caption=caption)
    mark_records = (take_back if undo else make_marks)(Records(storage), verdict)
    places = [f"{source}/{shard}" for source, shard in places_of(mark_records)]
    print_json(_answer(mark_records, places)) if json_ else _print(mark_records, places)


def _named(given: dict[By, list[str] | None], file: str | None) -> tuple[By, tuple[str, ...]]:
    """Return what samples are named by, and the values. Raises CapfiltError unless it is one kind."""
    kinds = [by for by, values in given.items() if values]
    if len(kinds) + (file is not None) != 1:
        raise CapfiltError("name samples by one of --uid, --url, --host, --sha256 and --from")
    if file is not None:
        from pipeline.marks.from_file import read_values

        return read_values(file)
    return kinds[0], tuple(given[kinds[0]] or ())


def _answer(mark_records: "list[MarkRecord]", places: list[str]) -> dict[str, object]:
    return {
        "marks": [record.mark for record in mark_records],
        "values": sum(len(record.values) for record in mark_records),
        "undone": sorted({mark for record in mark_records for mark in record.undoes}),
        "captions": {uid: text for record in mark_records for uid, text in record.captions.items()},
        "shards": places,
    }


def _print(mark_records: "list[MarkRecord]", places: list[str]) -> None:
    first, values = mark_records[0], sum(len(record.values) for record in mark_records)
    verb = "taken back" if first.undoes else "marked"
    print(printable(f"{verb}: {first.what}, {values:,} by {first.named_by} ({first.reason})"))
    for uid, text in list(first.captions.items())[:_SHARDS_NAMED]:
        print(printable(f"  {uid}: {text}"))
    if places:
        named = ", ".join(places[:_SHARDS_NAMED]) + (", ..." if len(places) > _SHARDS_NAMED else "")
        print(printable(f"in {len(places):,} shards ({named}); `capfilt run` selects them anew"))
    elif not first.undoes:
        print("no sample has it yet; it holds for what later lists bring")
