"""``capfilt bench``: a command for each thing measured, and how its result is printed.

A command does its own set-up in a temporary folder that it always removes, and needs no weights, no Ray and no
network beyond loopback. At its defaults it takes about a minute on two idle cores; ``caption`` and ``shard`` run
models of the published sizes, which takes about five on a CPU, and some on a GPU, most of them to compile.
``stage1`` and ``stage2`` train models of the published sizes: a step takes minutes on a CPU.
"""

import re
from collections.abc import Callable
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
MicroBatch = Annotated[int, typer.Option(min=0, help="Images at once; 0: what fits the memory.", metavar="N")]

# Section 4.1 of the BLIP-2 paper.
_STAGE1_BATCH = {"vitg": 1680, "vitl": 2320}
_STAGE2_BATCH = {"opt": 1920, "t5": 1520}


@bench.command()
def crawl(
    images: Annotated[int, typer.Option(min=1, max=99_999, help="A shard's.", metavar="N")] = 300,
    size: Annotated[str, typer.Option(help="Of the pictures served.", metavar="WxH")] = "640x480",
    json_: Json = False,
) -> None:
    """Crawl a loopback server, in turn with img2dataset's own Downloader: rate, CPU, memory, ratio."""
    from jobs.bench.crawl import measure_crawl

    result = _measured(measure_crawl, images, _size(size))
    _show(result, _rows(result, "crawler", "capfilt", "img2dataset"), json_)


@bench.command()
def intake(
    rows: Annotated[int, typer.Option(min=10, help="Of the list.", metavar="N")] = 1_000_000,
    json_: Json = False,
) -> None:
    """Read a Parquet list into url shards, then read it again grown by 1%: rate and memory."""
    from jobs.bench.intake import measure_intake

    result = _measured(measure_intake, rows)
    _show(result, _rows(result, "reading", "first", "grown"), json_)


@bench.command()
def manifest(
    images: Annotated[int, typer.Option(min=1, help="Of the corpus.", metavar="N")] = 150_000,
    json_: Json = False,
) -> None:
    """Ask a synthetic corpus, as `capfilt sql` does and in plain DuckDB; compact its records."""
    from jobs.bench.manifest import measure_manifest

    result = _measured(measure_manifest, images)
    _show(result, result["queries"], json_)


@bench.command()
def select(
    images: Annotated[int, typer.Option(min=1, max=70_000, help="A shard's.", metavar="N")] = 2_000,
    json_: Json = False,
) -> None:
    """Write curated shards from scored candidates: rate and memory."""
    from jobs.bench.selection import measure_select

    result = _measured(measure_select, images)
    _show(result, [_readable(result["select"])], json_)


@bench.command()
def images(
    images: Annotated[int, typer.Option(min=1, help="Of each size.", metavar="N")] = 16,
    json_: Json = False,
) -> None:
    """Decode JPEGs for both models: with the libraries' own code, and on our two pixel paths."""
    from jobs.bench.images import measure_images

    result = _measured(measure_images, images)
    rows = [
        {"size": size, "way": way, **at_size[way]}
        for size, at_size in result["sizes"].items()
        for way in ("naive", "exact", "fast")
    ]
    _show(result, rows, json_)


@bench.command()
def caption(
    batch_size: Annotated[int, typer.Option(min=1, help="Ours, on a GPU.", metavar="N")] = 256,
    rounds: Rounds = 5,
    json_: Json = False,
) -> None:
    """Caption beside transformers' generate: operations, decoding alone, JPEG to the best two."""
    from jobs.bench.caption import measure_caption

    result = _measured(measure_caption, batch_size, rounds)
    _show(result, caption_rows(result), json_)


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
    from jobs.bench.rank import measure_rank

    result = _measured(measure_rank, images or _by_device(2, 256), captions, mean_tokens, rounds, model)
    _show(result, _rows(result, "side", "open_clip", "capfilt"), json_)


@bench.command()
def shard(
    images: Annotated[
        int | None, typer.Option(min=1, help="A shard's. Default: 3, on a GPU 2001.", metavar="N")
    ] = None,
    shards: Annotated[int, typer.Option(min=1, metavar="N")] = 2,
    rounds: Rounds = 3,
    size: Annotated[Literal["full", "demo"], typer.Option(help="Of the models.")] = "full",
    json_: Json = False,
) -> None:
    """Send whole shards through both GPU stages, beside the bare engine on decoded images: share of its rate."""
    from jobs.bench.shard import measure_shard

    result = _measured(measure_shard, images or _by_device(3, 2001), shards, rounds, size)
    rows = []
    for stage in ("caption", "rank"):
        rates = {name: value for name, value in result[stage].items() if name != "seconds"}
        parts = {f"{part}_s": value for part, value in result[stage]["seconds"].items()}
        rows.append({"stage": stage, **rates, **parts})
    _show(result, rows, json_)


@bench.command()
def fp8(
    images: Annotated[int, typer.Option(min=2, help="Of the demo's world.", metavar="N")] = 500,
    json_: Json = False,
) -> None:
    """Compare float32, bfloat16 and float8 on the demo's trained models: scores, captions, what is kept."""
    from jobs.bench.fp8 import measure_fp8

    result = _measured(measure_fp8, images)
    _show(result, _rows(result, "change", "bf16_from_fp32", "fp8_from_fp32", "fp8_from_bf16"), json_)


@bench.command()
def stage1(
    arch: Arch = "vitl",
    batch: Batch = None,
    steps: Steps = 3,
    micro_batch: MicroBatch = 0,
    json_: Json = False,
) -> None:
    """Train stage 1 at the published size with random weights: samples/s, share of the matmul rate, memory."""
    batch = batch or _by_device(2, _STAGE1_BATCH[arch])
    _show_steps(arch, None, batch, steps, micro_batch, as_json=json_)


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
    batch = batch or _by_device(2, _STAGE2_BATCH["t5" if "t5" in language else "opt"])
    _show_steps(arch, language, batch, steps, micro_batch, as_json=json_)


@bench.command()
def loader(
    images: Annotated[int, typer.Option(min=64, help="A round's.", metavar="N")] = 1024,
    json_: Json = False,
) -> None:
    """Load curated shards, in turn with a plain WebDataset loop: rate per core, memory, ratio."""
    from jobs.bench.loader import measure_loader

    result = _measured(measure_loader, images)
    _show(result, _rows(result, "loader", "capfilt", "webdataset"), json_)


@bench.command()
def precision(
    steps: Annotated[int, typer.Option(min=1, metavar="N")] = 200,
    json_: Json = False,
) -> None:
    """Train a small stage 1 in float32 and in bfloat16: how far the losses are apart, beside another seed's."""
    from jobs.bench.train_step import measure_precision

    result = _measured(measure_precision, steps)
    rows = [
        {
            "run": name,
            "last_loss": loss,
            "distance": result["distance"].get(name),
            "bias": result["bias"].get(name),
        }
        for name, loss in result["last_loss"].items()
    ]
    _show(result, rows, json_)


def caption_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each of the three things that ``bench caption`` times."""
    decoding = [
        {
            "part": part,
            "ratio": result[f"decode_ratio{suffix}"],
            "s_per_image": result[f"decode{suffix}_s_per_image"],
            "transformers_s_per_image": result[f"decode{suffix}_s_per_image_transformers"],
            "mean_tokens": result[f"decode{suffix}_mean_tokens"],
            "gflop": result[f"gflop_ours{suffix}"],
        }
        for part, suffix in (("decode, to the last token", ""), ("decode, captions end", "_early_stop"))
    ]
    whole = {
        "part": "JPEG to the best two",
        "ratio": result["end_to_end_ratio"],
        "s_per_image": 1 / result["images_per_s"],
        "transformers_s_per_image": 1 / result["transformers_images_per_s"],
    }
    return [*decoding, whole]


def _show_steps(*arguments: Any, as_json: bool) -> None:
    from jobs.bench.train_step import measure_train_step

    result = _measured(measure_train_step, *arguments)
    table = ("samples_per_s", "step_s", "tflops", "mfu", "gflop_per_sample", "micro_batch", "peak_bytes")
    row = {name: result[name] for name in table}
    shown = result if as_json else {name: value for name, value in result.items() if name not in table}
    _show(shown, [_readable(row)], as_json)


def _measured(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Measure, and say on what machine; its load is read before the benchmark itself adds to it."""
    from jobs.bench.fixtures.machine import describe_machine

    machine = describe_machine()
    return {**measure(*arguments), "machine": machine}


def _rows(result: dict[str, Any], column: str, *names: str) -> list[dict[str, Any]]:
    """Return a row of the table for each named part of a result."""
    return [{column: name, **_readable(result[name])} for name in names]


def _readable(values: dict[str, Any]) -> dict[str, Any]:
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


def _show(result: dict[str, Any], rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print the rows as a table and the result's other values below it, or all of it as JSON."""
    from jobs.output.render import print_facts, print_json, print_table

    if as_json:
        return print_json(result)
    columns = dict.fromkeys(name for row in rows for name in row)
    print_table([{name: row.get(name) for name in columns} for row in rows])
    print()
    print_facts({name: value for name, value in result.items() if isinstance(value, (int, float, str))})
    print_facts(result["machine"])


def _by_device(on_cpu: int, on_gpu: int) -> int:
    import torch

    return on_gpu if torch.cuda.is_available() else on_cpu


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{1,3})x([1-9]\d{1,3})", text)
    if not match or min(int(match[1]), int(match[2])) < 64:
        raise CapfiltError(f"--size {text!r}: width x height from 64 to 9999 pixels, such as 640x480")
    return int(match[1]), int(match[2])
