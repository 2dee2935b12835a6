"""The commands that keep a corpus in order, beside verify: gc manifest doctor."""

import re
import shlex
import sys
from dataclasses import asdict
from datetime import timedelta
from typing import Annotated, Literal

import typer

from jobs.cli.groups import KEEP
from jobs.cli.options import (
    AddressOption,
    AllowOpenOption,
    CorpusArgument,
    HeaderOption,
    JsonOption,
    WideOption,
    open_manifest,
)
from jobs.environment import program_name
from jobs.output.render import print_facts, print_json, print_table, printable_lines
from jobs.output.values import readable_bytes
from schemas.errors import CapfiltError

upkeep = typer.Typer()


@upkeep.command(rich_help_panel=KEEP)
def gc(
    corpus: CorpusArgument,
    older_than: Annotated[
        str, typer.Option(help="Spare younger files: an attempt may be under way.", metavar="AGE")
    ] = "24h",
    retired: Annotated[
        bool, typer.Option("--retired", help="Also the files of shards that were recomputed since.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List them, remove nothing.")] = False,
    wide: WideOption = False,
    json_: JsonOption = False,
) -> None:
    """Remove the files of killed attempts, which no record refers to."""
    manifest = open_manifest(corpus)
    from pipeline.corpus.garbage_collection import find_orphans, remove
    from pipeline.corpus.records import Records

    records = Records(manifest.storage)
    orphans = find_orphans(
        records,
        older_than=_age(older_than),
        retired=retired,
        compacted=manifest.compacted.shard_records,
    )
    if not dry_run:
        orphans = remove(records, orphans)
    size = sum(file.bytes for file in orphans)
    if json_:
        return print_json(
            {"removed": not dry_run, "bytes": size, "files": [asdict(file) for file in orphans]}
        )
    if orphans:
        print_table([asdict(file) for file in orphans], wide=wide)
    print(f"{'would remove' if dry_run else 'removed'} {len(orphans):,} files, {readable_bytes(size)}")


def _age(text: str) -> timedelta:
    units = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not match:
        raise CapfiltError(f"--older-than {text!r}: a number and s, m, h or d, such as 24h")
    return timedelta(**{units[match[2]]: float(match[1])})


@upkeep.command(rich_help_panel=KEEP)
def manifest(
    action: Annotated[
        Literal["compact", "rebuild", "upgrade"],
        typer.Argument(
            help="compact: add new records; rebuild: make it anew from the records; upgrade: bring what an earlier "
            "version of capfilt wrote to this one.",
            show_default=False,
        ),
    ],
    corpus: CorpusArgument,
    json_: JsonOption = False,
) -> None:
    """Bring the manifest up to date with the records. Its Parquet files and manifest.duckdb."""
    manifest = open_manifest(corpus)
    if action == "rebuild":
        rows = manifest.rebuild()
    else:
        rows = {"rows": manifest.upgrade() if action == "upgrade" else manifest.compact()}
    print_json(rows) if json_ else print_facts(rows)


@upkeep.command(rich_help_panel=KEEP)
def doctor(
    corpus: Annotated[
        str | None,
        typer.Argument(metavar="[CORPUS]", help="Folder or URL to be written.", show_default=False),
    ] = None,
    config: Annotated[
        str | None, typer.Option("-c", "--config", help="Check what this config needs.", metavar="FILE")
    ] = None,
    address: AddressOption = "",
    header: HeaderOption = None,
    allow_open: AllowOpenOption = False,
    nodes: Annotated[
        bool, typer.Option("--nodes", help="Each node of the Ray cluster that this machine is part of.")
    ] = False,
    wide: WideOption = False,
    json_: JsonOption = False,
) -> None:
    """Check machine, libraries, storage and weights. What stops the next command comes first; exit 2 if it fails.

    With --address, or --nodes on a machine of the cluster, each of its nodes.
    """
    if address or nodes:
        rows = ["--json"] if json_ else ["--wide"] if wide else []
        return _doctor_of_nodes(config, address, header or [], allow_open, rows)
    from jobs.doctor import run_checks

    loaded = None
    if config:
        from pipeline.config import load_config

        loaded = load_config(config)
    print("importing torch, open_clip, transformers, OpenCV and Ray", file=sys.stderr, flush=True)
    checks = run_checks(corpus, loaded)
    failed = sum(check.state == "fail" for check in checks)
    if json_:
        print_json([asdict(check) for check in checks])
        raise typer.Exit(2 if failed else 0)
    command = f"{program_name()} {f'run -c {shlex.quote(config)}' if config else 'demo'}"
    stops = "nothing stops" if not failed else f"{failed} check{'s' if failed > 1 else ''} would stop"
    print(printable_lines(f"{stops} {command}"))
    for check in checks:
        fix = f"\n      {check.mend}" if check.mend else ""
        print(printable_lines(f"{check.state:<5} {check.name:<15} {check.found}{fix}"))
    raise typer.Exit(2 if failed else 0)


def _doctor_of_nodes(
    config: str | None, address: str, headers: list[str], allow_open: bool, options: list[str]
) -> None:
    """Check the nodes of a cluster: with an address as a job there, else from this machine."""
    if config is None:
        raise CapfiltError("doctor: the nodes are checked for a config: give -c FILE")
    if address:
        from jobs.cluster.submit import load_job, submit_job

        arguments = ["doctor", "--nodes", *options]
        job = load_job(config, [], arguments)
        raise typer.Exit(submit_job(job, arguments, address, headers, allow_open=allow_open, follow=True))
    from jobs.cluster.node_checks import check_nodes, names_of
    from pipeline.config import load_config

    rows = check_nodes(load_config(config))
    failed = sum(row["state"] == "fail" for row in rows)
    if "--json" in options:
        print_json(rows)
    else:
        number = len({node for row in rows for node in row["nodes"]})
        shown = [row | {"nodes": names_of(row["nodes"], number)} for row in rows]
        print_table(shown, ["state", "check", "found", "nodes"], wide="--wide" in options)
        for row in shown:
            if row["mend"]:
                print(printable_lines(f"{row['check']}: {row['mend']}"))
    raise typer.Exit(2 if failed else 0)
