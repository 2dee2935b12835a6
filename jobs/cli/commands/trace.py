"""The command ``trace``: how one sample, or a checkpoint, came about."""

import shlex
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from jobs.arrow_alone import import_arrow_alone
from jobs.cli.groups import LOOK
from jobs.cli.options import JsonOption, WideOption, open_manifest
from jobs.environment import program_name
from jobs.output.render import print_facts, print_json, print_table
from schemas.names import printable

traces = typer.Typer()

# Of a checkpoint's shards, how many lines.
_SHARDS_SHOWN = 20

_CANDIDATES = (
    "outcome", "score", "rerank_score", "match_probability", "origin", "candidate", "text",
    "seed", "truncated",
)  # fmt: skip
_MODELS = ("digest", "kind", "name", "revision", "parameters")
# What a narrow screen does without first.
_SPARE_CANDIDATES = ("rerank_score", "truncated", "candidate")
_SPARE_RUNS = ("finished_at", "started_at", "config_digest")
_SPARE_MODELS = ("revision", "parameters", "kind")
_SPARE_SHARDS = ("corpus", "sha256")
# What follows a sample's candidates: the key of its trace, the title, the columns, and those that are spared first.
_TABLES = (
    ("checkpoints", "checkpoints", ("use", "path", "stage", "step", "run_id", "created_at"), ("run_id", "created_at")),
    ("marks", "marks", ("what", "named_by", "value", "caption", "reason", "made_at", "undone_at"),
     ("value", "made_at", "undone_at")),
    ("stages", "made by",
     ("stage", "shard", "state", "run_id", "attempt", "fingerprint", "models", "host", "device", "finished_at"),
     ("host", "device", "attempt", "finished_at", "state")),
    ("models", "models", _MODELS, _SPARE_MODELS),
    ("taught_by", "taught by, nearest first", ("model", "checkpoint", "corpus", "source", "images", "urls"),
     ("corpus",)),
    ("runs", "runs", ("run_id", "command", "config_digest", "outcome", "started_at", "finished_at"), _SPARE_RUNS),
)  # fmt: skip
# Of these, the ones that are not mentioned where there are none.
_OPTIONAL = ("checkpoints", "marks", "taught_by")


@traces.command(rich_help_panel=LOOK)
def trace(
    where: Annotated[
        str,
        typer.Argument(
            metavar="CORPUS|CHECKPOINT",
            help="Folder or URL of the corpus; or, alone, of a run or its checkpoint (step-...).",
            show_default=False,
        ),
    ],
    uid_or_url: Annotated[
        str | None, typer.Argument(metavar="UID-or-URL", help="As the tables have it.", show_default=False)
    ] = None,
    wide: WideOption = False,
    json_: JsonOption = False,
) -> None:
    """Show how one sample, or a checkpoint, came about.

    A sample: from its fetch to the captions that were kept. A checkpoint: the shards it was trained on, and the
    runs and models that made these.
    """
    if uid_or_url is None:
        import_arrow_alone()
        from pipeline.lineage.checkpoint_trace import trace_checkpoint

        lineage = trace_checkpoint(where)
        return print_json(lineage) if json_ else _print_lineage(lineage, wide)
    manifest = open_manifest(where)
    from pipeline.lineage.sample_trace import trace as trace_sample

    sample_traces = trace_sample(manifest, uid_or_url)
    if json_:
        return print_json(sample_traces)
    for number, traced in enumerate(sample_traces):
        print("\n" * number, end="")
        _print_sample_trace(traced, wide)


def _print_lineage(lineage: dict[str, Any], wide: bool) -> None:
    names = ("path", "stage", "run_id", "step", "samples", "snapshot", "created_at", "metrics")
    print_facts({name: lineage["checkpoint"][name] for name in names})
    _print_models(lineage["loaded"], "models it loaded or began from", wide)
    print_table(lineage["sources"], title="\nsources", wide=wide)
    print_table(lineage["shards"][:_SHARDS_SHOWN], title="\nshards", spare=_SPARE_SHARDS, wide=wide)
    if len(lineage["shards"]) > _SHARDS_SHOWN:
        print(f"... and {len(lineage['shards']) - _SHARDS_SHOWN:,} more; --json shows all")
    for source in lineage["sources"]:
        if source["urls"] is None:
            print(
                f"\nnot known: what made the shards of {printable(source['source'])}; "
                f"{printable(source['corpus'])} is not a corpus, or has them no more"
            )
    if not lineage["stages"]:
        return
    print_table(lineage["runs"], title="\nruns that made them", spare=_SPARE_RUNS, wide=wide)
    _print_models(lineage["models"], "models that made them", wide)
    for corpus in dict.fromkeys(
        source["corpus"] for source in lineage["sources"] if source["urls"] is not None
    ):
        ask = "SELECT source, shard, uid, url, caption FROM curated"
        print(f'\nevery URL: {program_name()} sql {shlex.quote(printable(corpus))} "{ask}"')


def _print_sample_trace(traced: dict[str, Any], wide: bool) -> None:
    names = ("uid", "source", "url", "captions", "shard", "key", "tar", "curated_tar")
    print_facts(
        {name: traced[name] for name in names}
        | {"extra": None if traced["extra"] == "{}" else traced["extra"]}
    )
    for fetch in traced["fetches"]:
        print(f"\nfetch, shard {fetch['shard']}")
        print_facts({name: value for name, value in fetch.items() if name not in ("shard", "key")})
    print_table(
        traced["candidates"],
        _CANDIDATES,
        title="\ncandidates, best first",
        spare=_SPARE_CANDIDATES,
        aside=("seed",),
        wide=wide,
    )
    if traced["selection"]:
        print(
            "\nselection: "
            + ", ".join(filter(None, (traced["selection"]["status"], traced["selection"]["reason"])))
        )
    for key, title, columns, spare in _TABLES:
        if traced[key] or key not in _OPTIONAL:
            print_table(traced[key], columns, title=f"\n{title}", spare=spare, wide=wide)


def _print_models(models: Sequence[dict[str, Any]], title: str, wide: bool) -> None:
    print_table(models, _MODELS, title=f"\n{title}", spare=_SPARE_MODELS, wide=wide)
