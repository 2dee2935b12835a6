"""``capfilt bench``: a command for each thing measured, and how its result is printed.

A command does its own set-up in a temporary folder that it always removes, and needs no weights, no Ray and no
network beyond loopback. At its defaults it takes about a minute on two idle cores; ``caption`` and ``shard`` run
models of the published sizes, which takes about five on a CPU, and some on a GPU, most of them to compile.
``stage1`` and ``stage2`` train models of the published sizes: a step takes minutes on a CPU.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import typer

from schemas.errors import CapfiltError

bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Rounds = Annotated[int, typer.Option(min=1, help="Each way, in turn; medians are shown.", metavar="N")]
Arch = Annotated[Literal["vitg", "vitl"], typer.Option(help="The image encoder.")]
Batch = Annotated[
    int | None, typer.Option(min=2, help="Default: 2, on a GPU the paper's.", metavar="N", show_default=False)
]
Steps = Annotated[int, typer.Option(min=1, help="Timed; the median is shown.", metavar="N")]
Folder = Annotated[
    str | None,
    typer.Option(
        help="Keep the corpus of --shards there, and use the one that is there.",
        metavar="DIR",
        show_default=False,
    ),
]
MicroBatch = Annotated[int, typer.Option(min=0, help="Images at once; 0: what fits the memory.", metavar="N")]

# Section 4.1 of the BLIP-2 paper.
_STAGE1_BATCH = {"vitg": 1680, "vitl": 2320}
_STAGE2_BATCH = {"opt": 1920, "t5": 1520}


@bench.command()
def crawl(
    images: Annotated[int, typer.Option(min=1, max=99_999, help="A shard's.", metavar="N")] = 300,
    size: Annotated[str, typer.Option(help="Of the pictures served.", metavar="WxH")] = "640x480",
    cpus: Annotated[int, typer.Option(min=1, help="Our worker's: threads that decode.", metavar="N")] = 1,
    json_: Json = False,
) -> None:
    """Crawl a loopback server, in turn with img2dataset's own Downloader: rate, CPU, memory, ratio."""
    from jobs.bench.crawl import measure_crawl

    _report(json_, ("capfilt", "img2dataset"), measure_crawl, images, _size(size), cpus)


@bench.command()
def jpeg_scaling(
    images: Annotated[int, typer.Option(min=1, help="Of each size.", metavar="N")] = 3,
    rounds: Rounds = 3,
    json_: Json = False,
) -> None:
    """Decode JPEGs in full and as crawl.jpeg_scaling does: distance of the resized pixels, CPU."""
    from jobs.bench.engines.jpeg_scaling import measure_jpeg_scaling

    _report(json_, ("pictures",), measure_jpeg_scaling, images, rounds)


@bench.command()
def intake(
    rows: Annotated[int, typer.Option(min=10, help="Of the list.", metavar="N")] = 1_000_000,
    json_: Json = False,
) -> None:
    """Read a Parquet list into url shards, and again grown by 1%; queue its URLs, all failed, again: rate, memory."""
    from jobs.bench.corpora.intake import measure_intake

    _report(json_, ("first", "grown", "retried"), measure_intake, rows)


@bench.command()
def manifest(
    images: Annotated[int, typer.Option(min=1, help="Of the corpus.", metavar="N")] = 150_000,
    json_: Json = False,
) -> None:
    """Ask a synthetic corpus, as `capfilt sql` does and in plain DuckDB; compact its records."""
    from jobs.bench.corpora.manifest import measure_manifest

    _report(json_, ("queries",), measure_manifest, images)


@bench.command()
def look(
    images: Annotated[int, typer.Option(min=1, help="Of the corpus.", metavar="N")] = 150_000,
    shards: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Instead, ask the server of a corpus of so many shards, its rows thinned.",
            metavar="N",
        ),
    ] = None,
    folder: Folder = None,
    json_: Json = False,
) -> None:
    """Show a synthetic corpus as `capfilt look` does: seconds and shards read of each page, memory."""
    if shards is None:
        from jobs.bench.corpora.look import measure_look

        return _report(json_, ("pages",), measure_look, images)
    from jobs.bench.corpora.first_screen import measure_first_screen

    _report(json_, ("pages",), measure_first_screen, shards, folder)


@bench.command()
def storage(
    operations: Annotated[
        int, typer.Option(min=8, help="Objects created and read a round.", metavar="N")
    ] = 400,
    shards: Annotated[
        int, typer.Option(min=1, help="Of the run whose requests are counted.", metavar="N")
    ] = 4,
    rounds: Rounds = 3,
    json_: Json = False,
) -> None:
    """Create and read objects on a local S3 server, in turn with s3fs; count the requests of a small run."""
    from jobs.bench.corpora.storage import measure_storage

    _report(json_, ("operations", "requests"), measure_storage, operations, shards, rounds)


@bench.command()
def scale(
    shards: Annotated[int, typer.Option(min=1, help="Of the corpus.", metavar="N")] = 500,
    s3: Annotated[bool, typer.Option("--s3", help="On a local S3 server; requests are counted too.")] = False,
    only: Annotated[
        str, typer.Option(help="Commands that have this in their names.", metavar="TEXT", show_default=False)
    ] = "",
    folder: Folder = None,
    json_: Json = False,
) -> None:
    """Ask a corpus of very many shards: CPU seconds, start included, and peak memory of each command."""
    from jobs.bench.corpora.scale import measure_scale

    _report(json_, ("commands",), measure_scale, shards, s3, only, folder)


@bench.command()
def commits(
    shards: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Of a corpus; may be repeated. Default: 500 and 4000.", metavar="N"),
    ] = None,
    json_: Json = False,
) -> None:
    """Run stages that do no work on Ray: CPU milliseconds of driver and worker for each commit."""
    from jobs.bench.corpora.commits import measure_commits

    _report(json_, ("corpora",), measure_commits, shards or [500, 4000])


@bench.command()
def verify(
    samples: Annotated[int, typer.Option(min=100, help="Of the corpus.", metavar="N")] = 100_000,
    json_: Json = False,
) -> None:
    """Verify a damaged corpus, whole, and stopped and gone on with: CPU seconds and peak memory of each."""
    from jobs.bench.corpora.verify import measure_verify

    _report(json_, ("whole", "stopped", "gone on with"), measure_verify, samples)


@bench.command()
def select(
    images: Annotated[int, typer.Option(min=1, max=70_000, help="A shard's.", metavar="N")] = 2_000,
    json_: Json = False,
) -> None:
    """Write curated shards from scored candidates: rate and memory."""
    from jobs.bench.corpora.selection import measure_select

    _report(json_, ("select",), measure_select, images)


@bench.command()
def images(
    images: Annotated[int, typer.Option(min=1, help="Of each size.", metavar="N")] = 16,
    json_: Json = False,
) -> None:
    """Decode JPEGs for both models: with the libraries' own code, and on our two pixel paths."""
    from jobs.bench.engines.images import measure_images

    _report(json_, ("sizes",), measure_images, images)


@bench.command()
def caption(
    batch_size: Annotated[int, typer.Option(min=1, help="Of capfilt, on a GPU.", metavar="N")] = 256,
    rounds: Rounds = 5,
    json_: Json = False,
) -> None:
    """Caption beside transformers' generate: operations, decoding alone, JPEG to the best two."""
    from jobs.bench.engines.caption import measure_caption

    _report(json_, (), measure_caption, batch_size, rounds)


@bench.command()
def rank(
    images: Annotated[
        int | None, typer.Option(min=1, help="Default: 2, on a GPU 256.", metavar="N", show_default=False)
    ] = None,
    captions: Annotated[int, typer.Option(min=2, help="Of each image.", metavar="N")] = 11,
    mean_tokens: Annotated[
        int, typer.Option(min=4, max=77, help="Of a caption, start and end included.", metavar="N")
    ] = 14,
    rounds: Rounds = 5,
    model: Annotated[str, typer.Option(help="open_clip architecture.", metavar="NAME")] = "ViT-L-14",
    json_: Json = False,
) -> None:
    """Rank beside open_clip's own: agreement, operations, both towers and the tokenizer."""
    from jobs.bench.engines.rank import measure_rank

    images = images or _by_device(2, 256)
    _report(json_, ("open_clip", "capfilt"), measure_rank, images, captions, mean_tokens, rounds, model)


@bench.command("filter")
def filter_(
    images: Annotated[
        int | None, typer.Option(min=1, help="Default: 1, on a GPU 64.", metavar="N", show_default=False)
    ] = None,
    captions: Annotated[int, typer.Option(min=1, help="Of each image.", metavar="N")] = 11,
    mean_tokens: Annotated[
        int, typer.Option(min=4, max=35, help="Of a caption, start and end included.", metavar="N")
    ] = 14,
    rounds: Annotated[
        int, typer.Option(min=1, help="Each way, in turn; medians are shown.", metavar="N")
    ] = 3,
    size: Annotated[
        Literal["base", "large", "blip2"],
        typer.Option(
            help="Of the published model: BLIP's with ViT-B/16 or ViT-L/16, BLIP-2's with ViT-g/14."
        ),
    ] = "base",
    json_: Json = False,
) -> None:
    """Filter beside transformers' own: agreement, operations, and its class with and without shared features."""
    from jobs.bench.engines.filter import SIZES, measure_filter

    images = images or _by_device(1, 64)
    parts = ("transformers", "features_once", "capfilt")
    _report(json_, parts, measure_filter, images, captions, mean_tokens, rounds, SIZES[size])


@bench.command()
def shard(
    images: Annotated[
        int | None, typer.Option(min=1, help="A shard's. Default: 3, on a GPU 2001.", metavar="N")
    ] = None,
    shards: Annotated[int, typer.Option(min=1, metavar="N")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Medians are shown.", metavar="N")] = 3,
    size: Annotated[Literal["full", "demo"], typer.Option(help="Of the models.")] = "full",
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp8"], typer.Option(help="Of both stages.")
    ] = "auto",
    json_: Json = False,
) -> None:
    """Send whole shards through both GPU stages: their rate, and its share of the bare engine's."""
    from jobs.bench.engines.shard import measure_shard

    images = images or _by_device(3, 2001)
    _report(json_, ("caption", "rank"), measure_shard, images, shards, rounds, size, precision)


@bench.command()
def fp8(
    images: Annotated[int, typer.Option(min=2, help="Of the demo's world.", metavar="N")] = 500,
    json_: Json = False,
) -> None:
    """Compare float32, bfloat16 and float8 on the demo's trained models: scores, captions, what is kept."""
    from jobs.bench.engines.fp8 import measure_fp8

    _report(json_, ("bf16_from_fp32", "fp8_from_fp32", "fp8_from_bf16"), measure_fp8, images)


@bench.command()
def stage1(
    arch: Arch = "vitl",
    batch: Batch = None,
    steps: Steps = 3,
    micro_batch: MicroBatch = 0,
    json_: Json = False,
) -> None:
    """Train stage 1 at the published size with random weights: samples/s, share of the matmul rate, memory."""
    from jobs.bench.training.train_step import measure_train_step

    batch = batch or _by_device(2, _STAGE1_BATCH[arch])
    _report(json_, (), measure_train_step, arch, None, batch, steps, micro_batch)


@bench.command()
def stage2(
    arch: Arch = "vitl",
    language: Annotated[
        str, typer.Option(help="A published OPT or FlanT5.", metavar="NAME")
    ] = "facebook/opt-2.7b",
    batch: Batch = None,
    steps: Steps = 3,
    micro_batch: MicroBatch = 0,
    json_: Json = False,
) -> None:
    """Train stage 2 at the published size with random weights: samples/s, share of the matmul rate, memory."""
    from jobs.bench.training.train_step import measure_train_step

    batch = batch or _by_device(2, _STAGE2_BATCH["t5" if "t5" in language else "opt"])
    _report(json_, (), measure_train_step, arch, language, batch, steps, micro_batch)


@bench.command()
def loader(
    images: Annotated[int, typer.Option(min=64, help="A round's.", metavar="N")] = 1024,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Count what so many ranks, 8 on a node, read of the shards.", metavar="N"),
    ] = None,
    json_: Json = False,
) -> None:
    """Load curated shards, in turn with a plain WebDataset loop: rate per core, memory, ratio."""
    if ranks:
        from jobs.bench.training.shard_reads import measure_shard_reads

        return _report(json_, (), measure_shard_reads, ranks)
    from jobs.bench.training.loader import measure_loader

    _report(json_, ("capfilt", "webdataset"), measure_loader, images)


@bench.command()
def precision(
    steps: Annotated[int, typer.Option(min=1, metavar="N")] = 200,
    json_: Json = False,
) -> None:
    """Train a small stage 1 in float32 and in bfloat16: how far the losses are apart, beside another seed's."""
    from jobs.bench.training.train_step import measure_precision

    _report(json_, ("last_loss", "distance", "bias"), measure_precision, steps)


def _report(
    as_json: bool, parts: Sequence[str], measure: Callable[..., dict[str, Any]], *arguments: Any
) -> None:
    """Measure, then print the named parts of the result as a table and its single values below; or all as JSON."""
    from jobs.bench.fixtures.machine import describe_machine
    from jobs.output.render import print_facts, print_json, print_table

    # Its load is read before the benchmark adds to it.
    machine = describe_machine()
    result = measure(*arguments)
    if as_json:
        return print_json(result | {"machine": machine})
    for table in _tables([result[name] for name in parts], parts):
        print_table(table)
        print()
    facts = _readable({name: value for name, value in result.items() if name not in parts})
    print_facts({name: value for name, value in facts.items() if isinstance(value, (int, float, str))})
    print_facts(machine)


def _tables(values: list[Any], parts: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """Yield each list as it is; of dictionaries one table, with a column for each part and a row for each measure."""
    if not values or isinstance(values[0], list):
        yield from values
        return
    columns = dict(zip(parts, map(_readable, values), strict=True))
    measures = dict.fromkeys(name for column in columns.values() for name in column)
    yield [
        {"measure": name} | {part: column.get(name) for part, column in columns.items()} for name in measures
    ]


def _readable(values: dict[str, Any]) -> dict[str, Any]:
    """Return a measurement for print: memory in MiB, the shares and seconds of parts by themselves."""
    readable: dict[str, Any] = {}
    for name, value in values.items():
        match value:
            case dict():
                readable |= {f"{name}_{part}": number for part, number in value.items()}
            case _ if name.endswith("_bytes"):
                readable[f"{name.removesuffix('_bytes')}_mib"] = round(value / 2**20)
            case _:
                readable[name] = value
    return readable


def _by_device(on_cpu: int, on_gpu: int) -> int:
    import torch

    return on_gpu if torch.cuda.is_available() else on_cpu


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{1,3})x([1-9]\d{1,3})", text)
    if not match or min(int(match[1]), int(match[2])) < 64:
        raise CapfiltError(f"--size {text!r}: width x height from 64 to 9999 pixels, such as 640x480")
    return int(match[1]), int(match[2])
