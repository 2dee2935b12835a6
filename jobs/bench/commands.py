"""``capfilt bench``: a command for each thing measured, and how its result is printed.

A command does its own set-up in a temporary folder that it always removes, and needs no weights, no Ray and no
network beyond loopback. At its defaults it takes about a minute on two idle cores; ``caption`` and ``shard`` run
models of the published sizes, which takes about five on a CPU, and some on a GPU, most of them to compile.
``stage1`` and ``stage2`` train models of the published sizes: a step takes minutes on a CPU.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import typer

from schemas.errors import CapfiltError

bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Figures = dict[str, Any]


def _number(help_text: str | None = None, least: int = 1, most: int | None = None) -> Any:
    """Return the option of a whole number."""
    return typer.Option(min=least, max=most, help=help_text, metavar="N")


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Rounds = Annotated[int, _number("Each way, in turn; medians are shown.")]
Arch = Annotated[Literal["vitg", "vitl"], typer.Option(help="The image encoder.")]
Batch = Annotated[int | None, _number("Default: 2, on a GPU the paper's.", least=2)]
Steps = Annotated[int, _number("Timed; the median is shown.")]
Folder = Annotated[
    str | None,
    typer.Option(help="Keep the corpus of --shards there, and use the one that is there.", metavar="DIR"),
]
MicroBatch = Annotated[int, _number("Images at once; 0: what fits the memory.", least=0)]

# Section 4.1 of the BLIP-2 paper.
_STAGE1_BATCH = {"vitg": 1680, "vitl": 2320}
_STAGE2_BATCH = {"opt": 1920, "t5": 1520}


def _benchmark(*parts: str, name: str | None = None) -> Callable[[Callable[..., Figures]], object]:
    """Make a function that returns figures a command, which prints them or, with ``--json``, all as one object.

    Args:
        parts: the figures that are printed as a table; the single values stand below.
        name: of the command, where it is not the function's.
    """

    def register(measure: Callable[..., Figures]) -> object:
        @functools.wraps(measure)
        def command(json_: bool, **options: Any) -> None:
            from jobs.bench.fixtures.machine import describe_machine

            # Its load is read before the benchmark adds to it.
            machine = describe_machine()
            _print(measure(**options), machine, parts, json_)

        as_json = inspect.Parameter("json_", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
        signature = inspect.signature(measure)
        parameters = [*signature.parameters.values(), as_json]
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # typer's list
        return bench.command(name)(command)

    return register


@_benchmark("capfilt", "img2dataset")
def crawl(
    images: Annotated[int, _number("A shard's.", most=99_999)] = 300,
    size: Annotated[str, typer.Option(help="Of the pictures served.", metavar="WxH")] = "640x480",
    cpus: Annotated[int, _number("Our worker's: threads that decode.")] = 1,
) -> Figures:
    """Crawl a loopback server, in turn with img2dataset's own Downloader: rate, CPU, memory, ratio."""
    from jobs.bench.crawl import measure_crawl

    return measure_crawl(images, _size(size), cpus)


@_benchmark("pictures")
def jpeg_scaling(images: Annotated[int, _number("Of each size.")] = 3, rounds: Rounds = 3) -> Figures:
    """Decode JPEGs in full and as crawl.jpeg_scaling does: distance of the resized pixels, CPU."""
    from jobs.bench.engines.jpeg_scaling import measure_jpeg_scaling

    return measure_jpeg_scaling(images, rounds)


@_benchmark("first", "grown", "retried")
def intake(rows: Annotated[int, _number("Of the list.", least=10)] = 1_000_000) -> Figures:
    """Read a Parquet list into url shards, and again grown by 1%; queue its URLs, all failed, again: rate, memory."""
    from jobs.bench.corpora.intake import measure_intake

    return measure_intake(rows)


@_benchmark("queries")
def manifest(images: Annotated[int, _number("Of the corpus.")] = 150_000) -> Figures:
    """Ask a synthetic corpus, as `capfilt sql` does and in plain DuckDB; compact its records."""
    from jobs.bench.corpora.manifest import measure_manifest

    return measure_manifest(images)


@_benchmark("pages")
def look(
    images: Annotated[int, _number("Of the corpus.")] = 150_000,
    shards: Annotated[
        int | None, _number("Instead, ask the server of a corpus of so many shards, its rows thinned.")
    ] = None,
    folder: Folder = None,
) -> Figures:
    """Show a synthetic corpus as `capfilt look` does: seconds and shards read of each page, memory."""
    if shards is None:
        from jobs.bench.corpora.look import measure_look

        return measure_look(images)
    from jobs.bench.corpora.first_screen import measure_first_screen

    return measure_first_screen(shards, folder)


@_benchmark("operations", "requests")
def storage(
    operations: Annotated[int, _number("Objects created and read a round.", least=8)] = 400,
    shards: Annotated[int, _number("Of the run whose requests are counted.")] = 4,
    rounds: Rounds = 3,
) -> Figures:
    """Create and read objects on a local S3 server, in turn with s3fs; count the requests of a small run."""
    from jobs.bench.corpora.storage import measure_storage

    return measure_storage(operations, shards, rounds)


@_benchmark("commands")
def scale(
    shards: Annotated[int, _number("Of the corpus.")] = 500,
    s3: Annotated[bool, typer.Option("--s3", help="On a local S3 server; requests are counted too.")] = False,
    only: Annotated[
        str, typer.Option(help="Commands that have this in their names.", metavar="TEXT", show_default=False)
    ] = "",
    folder: Folder = None,
) -> Figures:
    """Ask a corpus of very many shards: CPU seconds, start included, and peak memory of each command."""
    from jobs.bench.corpora.scale import measure_scale

    return measure_scale(shards, s3, only, folder)


@_benchmark("corpora")
def commits(
    shards: Annotated[
        list[int] | None, _number("Of a corpus; may be repeated. Default: 500 and 4000.")
    ] = None,
) -> Figures:
    """Run stages that do no work on Ray: CPU milliseconds of driver and worker for each commit."""
    from jobs.bench.corpora.commits import measure_commits

    return measure_commits(shards or [500, 4000])


@_benchmark("whole", "stopped", "gone on with")
def verify(samples: Annotated[int, _number("Of the corpus.", least=100)] = 100_000) -> Figures:
    """Verify a damaged corpus, whole, and stopped and gone on with: CPU seconds and peak memory of each."""
    from jobs.bench.corpora.verify import measure_verify

    return measure_verify(samples)


@_benchmark("select")
def select(images: Annotated[int, _number("A shard's.", most=70_000)] = 2_000) -> Figures:
    """Write curated shards from scored candidates: rate and memory."""
    from jobs.bench.corpora.selection import measure_select

    return measure_select(images)


@_benchmark("sizes")
def images(images: Annotated[int, _number("Of each size.")] = 16) -> Figures:
    """Decode JPEGs for both models: with the libraries' own code, and on our two pixel paths."""
    from jobs.bench.engines.images import measure_images

    return measure_images(images)


@_benchmark()
def caption(
    batch_size: Annotated[int, _number("Of capfilt, on a GPU.")] = 256, rounds: Rounds = 5
) -> Figures:
    """Caption beside transformers' generate: operations, decoding alone, JPEG to the best two."""
    from jobs.bench.engines.caption import measure_caption

    return measure_caption(batch_size, rounds)


@_benchmark("open_clip", "capfilt")
def rank(
    images: Annotated[int | None, _number("Default: 2, on a GPU 256.")] = None,
    captions: Annotated[int, _number("Of each image.", least=2)] = 11,
    mean_tokens: Annotated[int, _number("Of a caption, start and end included.", least=4, most=77)] = 14,
    rounds: Rounds = 5,
    model: Annotated[str, typer.Option(help="open_clip architecture.", metavar="NAME")] = "ViT-L-14",
) -> Figures:
    """Rank beside open_clip's own: agreement, operations, both towers and the tokenizer."""
    from jobs.bench.engines.rank import measure_rank

    return measure_rank(images or _by_device(2, 256), captions, mean_tokens, rounds, model)


@_benchmark("transformers", "features_once", "capfilt", name="filter")
def filter_(
    images: Annotated[int | None, _number("Default: 1, on a GPU 64.")] = None,
    captions: Annotated[int, _number("Of each image.")] = 11,
    mean_tokens: Annotated[int, _number("Of a caption, start and end included.", least=4, most=35)] = 14,
    rounds: Rounds = 3,
    size: Annotated[
        Literal["base", "large", "blip2"],
        typer.Option(
            help="Of the published model: BLIP's with ViT-B/16 or ViT-L/16, BLIP-2's with ViT-g/14."
        ),
    ] = "base",
) -> Figures:
    """Filter beside transformers' own: agreement, operations, and its class with and without shared features."""
    from jobs.bench.engines.filter import SIZES, measure_filter

    return measure_filter(images or _by_device(1, 64), captions, mean_tokens, rounds, SIZES[size])


@_benchmark("caption", "rank")
def shard(
    images: Annotated[int | None, _number("A shard's. Default: 3, on a GPU 2001.")] = None,
    shards: Annotated[int, _number()] = 2,
    rounds: Annotated[int, _number("Medians are shown.")] = 3,
    size: Annotated[Literal["full", "demo"], typer.Option(help="Of the models.")] = "full",
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp8"], typer.Option(help="Of both stages.")
    ] = "auto",
) -> Figures:
    """Send whole shards through both GPU stages: their rate, and its share of the bare engine's."""
    from jobs.bench.engines.shard import measure_shard

    return measure_shard(images or _by_device(3, 2001), shards, rounds, size, precision)


@_benchmark("bf16_from_fp32", "fp8_from_fp32", "fp8_from_bf16")
def fp8(images: Annotated[int, _number("Of the demo's world.", least=2)] = 500) -> Figures:
    """Compare float32, bfloat16 and float8 on the demo's trained models: scores, captions, what is kept."""
    from jobs.bench.engines.fp8 import measure_fp8

    return measure_fp8(images)


@_benchmark()
def stage1(
    arch: Arch = "vitl", batch: Batch = None, steps: Steps = 3, micro_batch: MicroBatch = 0
) -> Figures:
    """Train stage 1 at the published size with random weights: samples/s, share of the matmul rate, memory."""
    from jobs.bench.training.train_step import measure_train_step

    batch = batch or _by_device(2, _STAGE1_BATCH[arch])
    return measure_train_step(arch, None, batch, steps, micro_batch)


@_benchmark()
def stage2(
    arch: Arch = "vitl",
    language: Annotated[
        str, typer.Option(help="A published OPT or FlanT5.", metavar="NAME")
    ] = "facebook/opt-2.7b",
    batch: Batch = None,
    steps: Steps = 3,
    micro_batch: MicroBatch = 0,
) -> Figures:
    """Train stage 2 at the published size with random weights: samples/s, share of the matmul rate, memory."""
    from jobs.bench.training.train_step import measure_train_step

    batch = batch or _by_device(2, _STAGE2_BATCH["t5" if "t5" in language else "opt"])
    return measure_train_step(arch, language, batch, steps, micro_batch)


@_benchmark("capfilt", "webdataset")
def loader(
    images: Annotated[int, _number("A round's.", least=64)] = 1024,
    ranks: Annotated[
        int | None, _number("Count what so many ranks, 8 on a node, read of the shards.")
    ] = None,
) -> Figures:
    """Load curated shards, in turn with a plain WebDataset loop: rate per core, memory, ratio."""
    if ranks:
        from jobs.bench.training.shard_reads import measure_shard_reads

        return measure_shard_reads(ranks)
    from jobs.bench.training.loader import measure_loader

    return measure_loader(images)


@_benchmark("last_loss", "distance", "bias")
def precision(steps: Annotated[int, _number()] = 200) -> Figures:
    """Train a small stage 1 in float32 and in bfloat16: how far the losses are apart, beside another seed's."""
    from jobs.bench.training.train_step import measure_precision

    return measure_precision(steps)


def _print(figures: Figures, machine: Figures, parts: Sequence[str], as_json: bool) -> None:
    """Print those of the parts that there are as a table and the single values below; or all as JSON."""
    from jobs.output.render import print_facts, print_json, print_table

    if as_json:
        return print_json(figures | {"machine": machine})
    shown = [name for name in parts if name in figures]
    for table in _tables([figures[name] for name in shown], shown):
        print_table(table)
        print()
    facts = _readable({name: value for name, value in figures.items() if name not in shown})
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
