"""The command that compares a corpus with its records: verify."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli.groups import KEEP
from jobs.cli.options import JsonOption, SourceOption, WideOption, open_manifest
from jobs.output.render import print_json, print_table
from jobs.output.values import readable_bytes
from schemas.errors import CapfiltError

if TYPE_CHECKING:
    from pipeline.manifest.verify.corpus import Verification
    from pipeline.manifest.verify.selection import ShardSelection

_WHAT_TO_DO = (
    "a file that is missing or damaged: restore it, or delete its shard's record, records/STAGE/SOURCE/NUMBER.json,\n"
    "and capfilt run makes the shard anew; with --recompute also what was made of it"
)

verification = typer.Typer()


@verification.command(rich_help_panel=KEEP)
def verify(
    corpus: Annotated[
        str | None,
        typer.Argument(metavar="[CORPUS]", help="Folder or URL of the corpus.", show_default=False),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("-c", "--config", help="The corpus of this config, on its Ray cluster.", metavar="FILE"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Compare sizes only.")] = False,
    source: SourceOption = None,
    shards: Annotated[
        str, typer.Option(help="Only these numbers, such as 0,7,100-199.", metavar="LIST", show_default=False)
    ] = "",
    sample: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Only this share of the shards.", metavar="SHARE")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of --sample: another seed, other shards.", metavar="N")] = 0,
    afresh: Annotated[
        bool, typer.Option("--afresh", help="Read all, also what a verification that was stopped has read.")
    ] = False,
    wide: WideOption = False,
    json_: JsonOption = False,
) -> None:
    """Recount and re-hash everything against the records. Exit code 1, and each difference, if there are any.

    One that was stopped goes on where it was. With a config, `capfilt submit -- verify` runs it on a cluster.
    """
    from pipeline.manifest.verify.selection import ShardSelection, parse_numbers

    selection = ShardSelection(
        source=source or "", numbers=parse_numbers(shards) if shards else (), share=sample, seed=seed
    )
    result = _verified(corpus, config, selection, quick=quick, afresh=afresh)
    if json_:
        print_json(asdict(result))
    else:
        if result.differences:
            print_table([asdict(discrepancy) for discrepancy in result.differences], wide=wide)
        if result.read_before:
            print(
                f"{result.read_before:,} shards were read before, by a verification that was stopped (--afresh reads "
                "them again)"
            )
        depth = "sizes of" if quick else "read"
        which = f" ({selection})" if str(selection) else ""
        print(
            f"{depth} {result.files:,} files ({readable_bytes(result.bytes)}) of {result.shards:,} shards{which}: "
            f"{len(result.differences):,} differences"
        )
        if result.differences:
            print(_WHAT_TO_DO)
    raise typer.Exit(1 if result.differences else 0)


def _verified(
    corpus: str | None, config_file: str | None, selection: "ShardSelection", *, quick: bool, afresh: bool
) -> "Verification":
    """Verify a corpus on this machine, or that of a config where its workers run."""
    if (corpus is None) == (config_file is None):
        raise CapfiltError("verify: give a corpus, or -c FILE for that of a config")
    address = ""
    if config_file:
        from jobs.environment import ray_address
        from pipeline.config import load_config

        loaded = load_config(config_file)
        corpus, address = loaded.corpus.path, ray_address(loaded.cluster.address)
    manifest = open_manifest(str(corpus))
    from pipeline.manifest.verify.corpus import verify as verify_corpus
    from pipeline.manifest.verify.progress import verify_progress

    if quick:
        return verify_corpus(manifest, quick=True, selection=selection)
    with verify_progress(manifest.storage.root, selection, afresh=afresh) as progress:
        if not address:
            return verify_corpus(manifest, selection=selection, progress=progress)
        from jobs.cluster.verify import reading_on_ray

        with reading_on_ray(address) as read:
            return verify_corpus(manifest, selection=selection, read=read, progress=progress)
