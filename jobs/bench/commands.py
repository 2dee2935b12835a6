"""``capfilt bench``: a command for each thing measured, and how its result is printed.

A command does its own set-up in a temporary folder that it always removes, needs no network beyond loopback
and no Ray, and takes under a minute at its defaults on two cores.
"""

import re
from collections.abc import Callable
from typing import Annotated, Any

import typer

from schemas.errors import CapfiltError

bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


@bench.command()
def crawl(
    images: Annotated[int, typer.Option(min=1, max=99_999, help="A shard's.", metavar="N")] = 300,
    size: Annotated[str, typer.Option(help="Of the pictures served.", metavar="WxH")] = "640x480",
    json_: Json = False,
) -> None:
    """Crawl a loopback server, in turn with img2dataset's own Downloader: rate, CPU, memory, ratio."""
    from jobs.bench.crawl import measure_crawl

    found = _measured(measure_crawl, images, _size(size))
    rows = [{"crawler": name, **_readable(found[name])} for name in ("capfilt", "img2dataset")]
    _show(found, rows, json_)


@bench.command()
def intake(
    rows: Annotated[int, typer.Option(min=10, help="Of the list.", metavar="N")] = 1_000_000,
    json_: Json = False,
) -> None:
    """Read a Parquet list into url shards, then read it again grown by 1%: rate and memory."""
    from jobs.bench.intake import measure_intake

    found = _measured(measure_intake, rows)
    _show(found, [{"reading": name, **_readable(found[name])} for name in ("first", "grown")], json_)


@bench.command()
def manifest(
    images: Annotated[int, typer.Option(min=1, help="Of the corpus.", metavar="N")] = 150_000,
    json_: Json = False,
) -> None:
    """Ask a synthetic corpus, as `capfilt sql` does and in plain DuckDB; compact its records."""
    from jobs.bench.manifest import measure_manifest

    found = _measured(measure_manifest, images)
    _show(found, found["queries"], json_)


@bench.command()
def select(
    images: Annotated[int, typer.Option(min=1, max=70_000, help="A shard's.", metavar="N")] = 2_000,
    json_: Json = False,
) -> None:
    """Write curated shards from scored candidates: rate and memory."""
    from jobs.bench.selection import measure_select

    found = _measured(measure_select, images)
    _show(found, [_readable(found["select"])], json_)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{1,3})x([1-9]\d{1,3})", text)
    if not match or min(int(match[1]), int(match[2])) < 64:
        raise CapfiltError(f"--size {text!r}: width x height from 64 to 9999 pixels, such as 640x480")
    return int(match[1]), int(match[2])


def _measured(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Measure, and say on what machine; how busy it was is asked before the benchmark itself makes it so."""
    from jobs.bench.machine import describe_machine

    machine = describe_machine()
    return {**measure(*arguments), "machine": machine}


def _readable(measured: dict[str, Any]) -> dict[str, Any]:
    """Return a measurement for a table: memory in MiB, shares in percent."""
    row: dict[str, Any] = {}
    for name, value in measured.items():
        match value:
            case dict():
                row |= {f"{part}_%": round(100 * share, 1) for part, share in value.items()}
            case _ if name.endswith("_bytes"):
                row[f"{name.removesuffix('_bytes')}_mib"] = round(value / 2**20)
            case _:
                row[name] = value
    return row


def _show(found: dict[str, Any], rows: list[dict[str, Any]], as_json: bool) -> None:
    from jobs.render import print_facts, print_json, print_table

    if as_json:
        return print_json(found)
    columns = dict.fromkeys(name for row in rows for name in row)
    print_table([{name: row.get(name) for name in columns} for row in rows])
    print()
    print_facts({name: value for name, value in found.items() if isinstance(value, (int, float, str))})
    print_facts(found["machine"])
