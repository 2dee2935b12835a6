"""The command ``trace``: how one sample, or a checkpoint, came about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.groups import LOOK
from jobs.options import JsonOption, import_arrow_alone, open_manifest

if TYPE_CHECKING:
    from collections.abc import Sequence

traces = typer.Typer()

# Of a checkpoint's shards, how many lines.
_SHARDS_SHOWN = 20


@traces.command(rich_help_panel=LOOK)
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
        import_arrow_alone()
        from pipeline.lineage import trace_checkpoint

        found = trace_checkpoint(where)
        return print_json(found) if json_ else _print_lineage(found)
    manifest = open_manifest(where)
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
