"""The commands that read a corpus: status stats runs failures shards sql trace verify; and gc, manifest, doctor.

Each takes the corpus's folder or URL, and answers as a table or, with ``--json``, as one JSON value.
Libraries are imported inside, so that ``capfilt --help`` stays quick.
"""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from jobs.groups import KEEP, LOOK
from jobs.render import complain
from schemas.errors import CapfiltError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import timedelta

    from pipeline.manifest import Manifest

reads = typer.Typer()

CorpusArgument = Annotated[
    str, typer.Argument(metavar="CORPUS", help="Folder or URL of the corpus.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of a table.")]
# Of a checkpoint's shards, how many lines.
_SHARDS_SHOWN = 20
SourceOption = Annotated[str | None, typer.Option("--source", help="Only this [[source]].", metavar="NAME")]


def _manifest(corpus: str) -> Manifest:
    """Open a corpus that exists: a mistyped name must not read as an empty one."""
    from pipeline.storage import Storage

    storage = Storage(corpus)
    if not storage.fs.exists(f"{storage.base}/records"):
        raise CapfiltError(
            f"{corpus} is not a corpus: it has no records/ folder; give the [corpus] path of its config"
        )
    from pipeline.manifest import Manifest

    manifest = Manifest(storage)
    if warning := manifest.rewrite_copied_catalog():
        complain(warning)
    return manifest


@reads.command(rich_help_panel=LOOK)
def status(corpus: CorpusArgument, json_: JsonOption = False) -> None:
    """Say how far each stage is, and what the last run did. Also how much of the web answered."""
    manifest = _manifest(corpus)
    from jobs.render import print_facts, print_json, print_table
    from pipeline import report

    found = report.status(manifest)
    if json_:
        return print_json(found)
    print_facts({"corpus": found["corpus"]})
    print_table(found["stages"], title="\nstages")
    print_table(found["sources"], title="\nimages")
    if found["last_run"]:
        print("\nlast run")
        print_facts(found["last_run"])
    if found["attempts"]:
        print_table(found["attempts"], title="\nbegun and not committed: under way, or killed")


@reads.command(rich_help_panel=LOOK)
def stats(corpus: CorpusArgument, json_: JsonOption = False) -> None:
    """Sum up success, scores, lengths and rates. From the records alone: no sample is read."""
    manifest = _manifest(corpus)
    from jobs.render import print_json, print_table
    from pipeline import report

    found = report.stats(manifest)
    if json_:
        return print_json(found)
    for name, rows in found.items():
        print_table(rows, title=name)
        print()


@reads.command(rich_help_panel=LOOK)
def runs(
    corpus: CorpusArgument,
    limit: Annotated[int, typer.Option(min=1, help="At most N lines.", metavar="N")] = 50,
    json_: JsonOption = False,
) -> None:
    """List the runs, newest first. One without an outcome is under way, or was killed."""
    manifest = _manifest(corpus)
    from jobs.render import print_json, print_table
    from pipeline import report

    rows = report.runs(manifest, limit=limit)
    print_json(rows) if json_ else print_table(rows)


@reads.command(rich_help_panel=LOOK)
def failures(
    corpus: CorpusArgument,
    hosts: Annotated[bool, typer.Option("--hosts", help="Count by host too.")] = False,
    source: SourceOption = None,
    limit: Annotated[int, typer.Option(min=1, help="At most N lines.", metavar="N")] = 50,
    json_: JsonOption = False,
) -> None:
    """Count the URLs that gave no image, by reason. Each with an example."""
    manifest = _manifest(corpus)
    from jobs.render import print_json, print_table
    from pipeline import report

    rows = report.failures(manifest, hosts=hosts, source=source, limit=limit)
    print_json(rows) if json_ else print_table(rows)


@reads.command(rich_help_panel=LOOK)
def shards(
    corpus: CorpusArgument,
    stage: Annotated[
        Literal["urls", "crawl", "caption", "rank", "select"] | None, typer.Option(help="Only this stage.")
    ] = None,
    source: SourceOption = None,
    state: Annotated[
        Literal["committed", "retired", "quarantined"] | None, typer.Option(help="Only this state.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most N lines.", metavar="N")] = 100,
    json_: JsonOption = False,
) -> None:
    """List the shards: rows, seconds, who made them, errors."""
    manifest = _manifest(corpus)
    from jobs.render import print_json, print_table
    from pipeline import report

    rows = report.shards(manifest, stage=stage, source=source, state=state, limit=limit)
    print_json(rows) if json_ else print_table(rows)


@reads.command(rich_help_panel=LOOK)
def sql(
    corpus: CorpusArgument,
    query: Annotated[
        str,
        typer.Argument(
            metavar="SELECT", help="One SELECT, DESCRIBE, SUMMARIZE or EXPLAIN.", show_default=False
        ),
    ],
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Give up after so many seconds.", metavar="S")
    ] = 600,
    memory: Annotated[
        str, typer.Option(help="What the query may take, such as 4GB or 50%.", metavar="SIZE")
    ] = "50%",
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most N rows; a table shows 1000 unless told.", metavar="N")
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    json_: JsonOption = False,
) -> None:
    """Ask the manifest in SQL, read-only. No file, no network, nothing but the corpus's tables."""
    from jobs.render import print_csv, print_table

    found = _manifest(corpus)
    if not (csv or json_):
        answer = found.query(query, timeout_s=timeout, max_rows=limit or 1000, memory=memory)
        print_table(answer.dicts(), answer.columns)
        if answer.truncated:
            typer.echo(f"the first {len(answer.rows)} rows; --limit, --json or --csv for more", err=True)
        return
    with found.stream(query, timeout_s=timeout, memory=memory) as stream:
        rows = itertools.islice(stream.rows, limit)
        _print_rows(stream.columns, rows) if json_ else print_csv(stream.columns, rows)
        if limit is not None and next(stream.rows, None) is not None:
            typer.echo(f"the first {limit} rows", err=True)


def _print_rows(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a JSON list, one row a line, as the rows come."""
    from jobs.render import print_json

    before = "["
    for row in rows:
        print(before, end="")
        print_json(dict(zip(columns, row, strict=True)))
        before = ","
    print("]" if before == "," else "[]")


@reads.command(rich_help_panel=LOOK)
def trace(
    where: Annotated[
        str,
        typer.Argument(
            metavar="CORPUS|CHECKPOINT",
            help="Folder or URL of the corpus; or, alone, of a checkpoint (step-...).",
            show_default=False,
        ),
    ],
    who: Annotated[
        str | None, typer.Argument(metavar="[UID-or-URL]", help="As the tables have it.", show_default=False)
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Show how one sample, or a checkpoint, came about.

    A sample: from its fetch to the captions that were kept. A checkpoint: the shards it was trained on, and the
    runs and models that made these.
    """
    from jobs.render import print_json

    if who is None:
        from pipeline.lineage import trace_checkpoint

        found = trace_checkpoint(where)
        return print_json(found) if json_ else _print_lineage(found)
    manifest = _manifest(where)
    from pipeline.trace import trace as trace_sample

    ways = trace_sample(manifest, who)
    if json_:
        return print_json(ways)
    for number, way in enumerate(ways):
        print("\n" * number, end="")
        _print_way(way)


def _print_lineage(found: dict[str, Any]) -> None:
    from jobs.render import print_facts, print_table

    names = ("path", "stage", "run_id", "step", "samples", "snapshot", "created_at", "metrics")
    print_facts({name: found["checkpoint"][name] for name in names})
    _print_models(found["loaded"], "models it loaded or began from")
    print_table(found["sources"], title="\nsources")
    print_table(found["shards"][:_SHARDS_SHOWN], title="\nshards")
    if len(found["shards"]) > _SHARDS_SHOWN:
        print(f"... and {len(found['shards']) - _SHARDS_SHOWN:,} more; --json shows all")
    print_table(found["runs"], title="\nruns that made them")
    _print_models(found["models"], "models that made them")
    for corpus in dict.fromkeys(source["corpus"] for source in found["sources"] if source["urls"] is not None):
        print(f"\nevery URL: capfilt sql {corpus} \"SELECT source, shard, uid, url, caption FROM curated\"")


def _print_way(way: dict[str, Any]) -> None:
    from jobs.render import print_facts, print_table

    names = ("uid", "source", "url", "captions", "shard", "key", "tar", "curated_tar")
    print_facts(
        {name: way[name] for name in names} | {"extra": None if way["extra"] == "{}" else way["extra"]}
    )
    for fetch in way["fetches"]:
        print(f"\nfetch, shard {fetch['shard']}")
        print_facts({name: value for name, value in fetch.items() if name not in ("shard", "key")})
    shown = ("outcome", "score", "rerank_score", "origin", "candidate", "text", "seed", "truncated")
    print_table(way["candidates"], shown, title="\ncandidates, best first")
    if way["selection"]:
        print(f"\nselection: {way['selection']['status']} {way['selection']['reason'] or ''}")
    stages = (
        "stage",
        "shard",
        "state",
        "run_id",
        "attempt",
        "fingerprint",
        "models",
        "host",
        "device",
        "finished_at",
    )
    short = [
        {**row, "fingerprint": _short(row["fingerprint"]), "models": [*map(_short, row["models"] or [])]}
        for row in way["stages"]
    ]
    print_table(short, stages, title="\nmade by")
    _print_models(way["models"], "models")
    print_table(
        way["runs"],
        ("run_id", "command", "config_digest", "outcome", "started_at", "finished_at"),
        title="\nruns",
    )


def _print_models(models: Sequence[dict[str, Any]], title: str) -> None:
    from jobs.render import print_table

    shown = [{**row, "digest": _short(row["digest"])} for row in models]
    print_table(shown, ("digest", "kind", "name", "revision", "parameters"), title=f"\n{title}")


def _short(digest: str | None) -> str | None:
    return digest and digest[:12]


@reads.command(rich_help_panel=KEEP)
def verify(
    corpus: CorpusArgument,
    quick: Annotated[bool, typer.Option("--quick", help="Compare sizes only.")] = False,
    json_: JsonOption = False,
) -> None:
    """Recount and re-hash everything against the records. Exit code 1, and each difference, if there are any."""
    manifest = _manifest(corpus)
    from dataclasses import asdict

    from jobs.render import print_json, print_table, readable_bytes
    from pipeline.verify import verify as verify_corpus

    found = verify_corpus(manifest, quick=quick)
    if json_:
        print_json(asdict(found))
    else:
        if found.differences:
            print_table([asdict(one) for one in found.differences])
        depth = "sizes of" if quick else "read"
        print(
            f"{depth} {found.files:,} files ({readable_bytes(found.bytes)}) of {found.shards:,} shards: "
            f"{len(found.differences):,} differences"
        )
    raise typer.Exit(1 if found.differences else 0)


@reads.command(rich_help_panel=KEEP)
def gc(
    corpus: CorpusArgument,
    older_than: Annotated[
        str, typer.Option(help="Spare younger files: an attempt may be under way.", metavar="AGE")
    ] = "24h",
    retired: Annotated[
        bool, typer.Option("--retired", help="Also the files of shards that were recomputed since.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List them, remove nothing.")] = False,
    json_: JsonOption = False,
) -> None:
    """Remove the files of killed attempts, which no record refers to."""
    storage = _manifest(corpus).storage
    from dataclasses import asdict

    from jobs.render import print_json, print_table, readable_bytes
    from pipeline.garbage import find_garbage, remove
    from pipeline.records import Records

    records = Records(storage)
    garbage = find_garbage(records, older_than=_age(older_than), retired=retired)
    if not dry_run:
        garbage = remove(records, garbage)
    size = sum(file.bytes for file in garbage)
    if json_:
        return print_json(
            {"removed": not dry_run, "bytes": size, "files": [asdict(file) for file in garbage]}
        )
    if garbage:
        print_table([asdict(file) for file in garbage])
    print(f"{'would remove' if dry_run else 'removed'} {len(garbage):,} files, {readable_bytes(size)}")


def _age(text: str) -> timedelta:
    from datetime import timedelta

    units = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not match:
        raise CapfiltError(f"--older-than {text!r}: a number and s, m, h or d, such as 24h")
    return timedelta(**{units[match[2]]: float(match[1])})


@reads.command(rich_help_panel=KEEP)
def manifest(
    action: Annotated[
        Literal["compact", "rebuild"],
        typer.Argument(
            help="compact: add new records; rebuild: make it anew from the records.", show_default=False
        ),
    ],
    corpus: CorpusArgument,
    json_: JsonOption = False,
) -> None:
    """Bring the manifest up to date with the records. Its Parquet files and manifest.duckdb."""
    from jobs.render import print_facts, print_json

    found = _manifest(corpus)
    rows = found.rebuild() if action == "rebuild" else {"rows": found.compact()}
    print_json(rows) if json_ else print_facts(rows)


@reads.command(rich_help_panel=KEEP)
def doctor(
    corpus: Annotated[
        str | None,
        typer.Argument(metavar="[CORPUS]", help="Folder or URL to be written.", show_default=False),
    ] = None,
    config: Annotated[
        str | None, typer.Option("-c", "--config", help="Check what this config needs.", metavar="FILE")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Check machine, libraries, storage and weights. Says what mends what; exit code 2 if a check fails."""
    from dataclasses import asdict

    from jobs.doctor import examine
    from jobs.render import print_json

    loaded = None
    if config:
        from pipeline.configfile import load_config

        loaded = load_config(config)
    checks = []
    for check in examine(corpus, loaded):
        checks.append(check)
        if not json_:
            mend = f"\n      {check.mend}" if check.mend else ""
            print(f"{check.state:<5} {check.name:<15} {check.found}{mend}", flush=True)
    if json_:
        print_json([asdict(check) for check in checks])
    raise typer.Exit(2 if any(check.state == "fail" for check in checks) else 0)
