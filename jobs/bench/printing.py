"""What all ``capfilt bench`` commands share: their options, and how a result is printed."""

from collections.abc import Callable
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Rounds = Annotated[int, typer.Option(min=1, help="Each way, in turn; medians are shown.", metavar="N")]


def measured(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Measure, and say on what machine; how busy it was is asked before the benchmark itself makes it so."""
    from jobs.bench.fixtures.machine import describe_machine

    machine = describe_machine()
    return {**measure(*arguments), "machine": machine}


def readable(values: dict[str, Any]) -> dict[str, Any]:
    """Return a measurement for a table: memory in MiB, shares in percent."""
    row: dict[str, Any] = {}
    for name, value in values.items():
        match value:
            case dict():
                row |= {f"{part}_%": round(100 * share, 1) for part, share in value.items()}
            case _ if name.endswith("_bytes"):
                row[f"{name.removesuffix('_bytes')}_mib"] = round(value / 2**20)
            case _:
                row[name] = value
    return row


def show(found: dict[str, Any], rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print the rows as a table and what else was found below it, or all of it as JSON."""
    from jobs.output.render import print_facts, print_json, print_table

    if as_json:
        return print_json(found)
    columns = dict.fromkeys(name for row in rows for name in row)
    print_table([{name: row.get(name) for name in columns} for row in rows])
    print()
    print_facts({name: value for name, value in found.items() if isinstance(value, (int, float, str))})
    print_facts(found["machine"])
