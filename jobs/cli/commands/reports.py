"""The commands that look into a corpus: status stats runs failures shards card sql.

Each takes the corpus's folder or URL, and answers as a table or, with ``--json``, as one JSON value.
Libraries are imported inside, so that ``capfilt --help`` stays quick; the corpus is opened before them, so that a
mistyped name is reported at once.
"""

import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from jobs.cli.groups import LOOK
from jobs.cli.options import (
    CorpusArgument,
    JsonOption,
    LimitOption,
    SourceOption,
    WideOption,
    open_manifest,
)
from jobs.output.render import print_csv, print_facts, print_json, print_table, printable_lines
from schemas.errors import CapfiltError
from schemas.stages import Stage

reports = typer.Typer()

# What a narrow screen does without first. A run's id begins with the time that it started.
_SPARE_STAGES = ("last_commit", "quarantined")
_SPARE_RUNS = ("host", "shards_skipped", "finished_at", "started_at")
_SPARE_FAILURES = ("detail", "http_status", "transient", "status", "source")
_SPARE_SHARDS = (
    "attempt", "host", "device", "images", "finished_at", "bytes", "seconds", "rows_in", "rows_out"
)  # fmt: skip


@reports.command(rich_help_panel=LOOK)
def status(corpus: CorpusArgument, wide: WideOption = False, json_: JsonOption = False) -> None:
    """Say how far each stage is, and what the last run did. Also how much of the web answered."""
    manifest, status = _open(corpus)
    report = status.status(manifest)
    if json_:
        return print_json(report)
    print_facts({"corpus": report["corpus"]})
    print_table(report["stages"], title="\nstages", spare=_SPARE_STAGES, wide=wide)
    print_table(report["sources"], title="\nimages", wide=wide)
    if report["last_run"]:
        print("\nlast run")
        print_facts(report["last_run"])
    if report["attempts"]:
        print_table(report["attempts"], title="\nbegun and not committed: under way, or killed", wide=wide)


@reports.command(rich_help_panel=LOOK)
def stats(corpus: CorpusArgument, wide: WideOption = False, json_: JsonOption = False) -> None:
    """Sum up success, scores, lengths and rates. From the records alone: no sample is read."""
    manifest, status = _open(corpus)
    statistics = status.stats(manifest)
    if json_:
        return print_json(statistics)
    for name, rows in statistics.items():
        print_table(rows, title=name, wide=wide)
        print()


@reports.command(rich_help_panel=LOOK)
def runs(
    corpus: CorpusArgument, limit: LimitOption = 50, wide: WideOption = False, json_: JsonOption = False
) -> None:
    """List the runs, newest first. One without an outcome is under way, or was killed."""
    manifest, status = _open(corpus)
    _print(status.runs(manifest, limit=limit), _SPARE_RUNS, wide, json_)


@reports.command(rich_help_panel=LOOK)
def failures(
    corpus: CorpusArgument,
    hosts: Annotated[bool, typer.Option("--hosts", help="Count by host too.")] = False,
    source: SourceOption = None,
    limit: LimitOption = 50,
    wide: WideOption = False,
    json_: JsonOption = False,
) -> None:
    """Count the URLs that gave no image, by reason. Each with an example."""
    manifest, status = _open(corpus)
    rows = status.failures(manifest, hosts=hosts, source=source, limit=limit)
    _print(rows, _SPARE_FAILURES, wide, json_)


@reports.command(rich_help_panel=LOOK)
def shards(
    corpus: CorpusArgument,
    stage: Annotated[Stage | None, typer.Option(help="Only this stage.")] = None,
    source: SourceOption = None,
    state: Annotated[
        Literal["committed", "retired", "quarantined"] | None, typer.Option(help="Only this state.")
    ] = None,
    limit: LimitOption = 100,
    wide: WideOption = False,
    json_: JsonOption = False,
) -> None:
    """List the shards: rows, seconds, who made them, errors."""
    manifest, status = _open(corpus)
    rows = status.shards(manifest, stage=stage, source=source, state=state, limit=limit)
    _print(rows, _SPARE_SHARDS, wide, json_)


@reports.command(rich_help_panel=LOOK)
def card(
    corpus: CorpusArgument,
    write: Annotated[
        bool, typer.Option("--write", help="Write it as README.md of the corpus, where the Hub looks for it.")
    ] = False,
) -> None:
    """Print the dataset card. Figures, sources, opt-outs, models, and how `datasets` reads the shards."""
    manifest = open_manifest(corpus)
    from pipeline.manifest.card import dataset_card

    text = dataset_card(manifest)
    if not write:
        return print(printable_lines(text), end="")
    manifest.storage.write("README.md", text.encode())
    print(printable_lines(f"written: {manifest.storage.url('README.md')}\n"), end="")


def _open(corpus: str) -> tuple[Any, Any]:
    """Return the manifest of a corpus, and the module of the reports on it."""
    manifest = open_manifest(corpus)
    from pipeline.manifest import status

    return manifest, status


def _print(rows: list[dict[str, Any]], spare: Sequence[str], wide: bool, json_: bool) -> None:
    print_json(rows) if json_ else print_table(rows, spare=spare, wide=wide)


@reports.command(rich_help_panel=LOOK)
def sql(
    corpus: CorpusArgument,
    query: Annotated[
        str | None,
        typer.Argument(
            metavar="SELECT",
            help="One SELECT, DESCRIBE, SUMMARIZE or EXPLAIN; from standard input if none is given.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        str | None, typer.Option("-f", "--file", help="Read the statement from a file.", metavar="FILE")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Give up after so many seconds.", metavar="S")
    ] = 600,
    memory: Annotated[
        str, typer.Option(help="What the query may take, such as 4GB or 50%.", metavar="SIZE")
    ] = "50%",
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most N rows; a table shows 1000 unless told.", metavar="N")
    ] = None,
    wide: WideOption = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    json_: JsonOption = False,
) -> None:
    """Ask the manifest in SQL, read-only. No file, no network, nothing but the corpus's tables.

    \b
    capfilt sql demo-corpus "SHOW TABLES"
    capfilt sql demo-corpus "DESCRIBE samples"
    capfilt sql demo-corpus "SELECT status, count(*) FROM samples GROUP BY status"
    capfilt sql demo-corpus "SELECT uid, caption FROM curated" --csv > captions.csv
    capfilt sql demo-corpus --file question.sql --json
    """
    query = _statement(query, file)
    manifest = open_manifest(corpus)
    if not (csv or json_):
        answer = manifest.query(query, timeout_s=timeout, max_rows=limit or 1000, memory=memory)
        print_table(answer.dicts(), answer.columns, wide=wide)
        if answer.truncated:
            typer.echo(f"the first {len(answer.rows)} rows; --limit, --json or --csv for more", err=True)
        return
    with manifest.stream(query, timeout_s=timeout, memory=memory) as stream:
        rows = itertools.islice(stream.rows, limit)
        _print_rows(stream.columns, rows) if json_ else print_csv(stream.columns, rows)
        if limit is not None and next(stream.rows, None) is not None:
            typer.echo(f"the first {limit} rows", err=True)


def _statement(query: str | None, file: str | None) -> str:
    """Return the SQL: as given, from a file, or from standard input."""
    if query is not None and file is not None:
        raise CapfiltError("a SELECT and --file: give one of them")
    if query is not None:
        return query
    if file is None and sys.stdin.isatty():
        raise CapfiltError("no statement: give one, such as 'SHOW TABLES', or --file FILE, or standard input")
    try:
        text = sys.stdin.buffer.read() if file in (None, "-") else Path(file).read_bytes()
        query = text.decode("utf-8-sig")
    except OSError as error:
        raise CapfiltError(f"--file {file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CapfiltError(f"{file or 'standard input'}: not UTF-8 text at byte {error.start}") from error
    if not query.strip():
        raise CapfiltError(f"{file or 'standard input'}: no statement in it")
    return query


def _print_rows(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a JSON list, one row a line, as the rows come."""
    before = "["
    for row in rows:
        print(before, end="")
        print_json(dict(zip(columns, row, strict=True)))
        before = ","
    print("]" if before == "," else "[]")
