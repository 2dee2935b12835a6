"""``capfilt bench``: a command for each thing measured, and how its result is printed.

A command does its own set-up in a temporary folder that it always removes, and needs no weights, no Ray and no
network beyond loopback. At its defaults it takes about a minute on two idle cores; ``caption`` and ``shard`` run
models of the published sizes, which takes about five on a CPU, and some on a GPU, most of them to compile.
``stage1`` and ``stage2`` train models of the published sizes: a step takes minutes on a CPU.
"""

import re
from typing import Annotated, Any, Literal

import typer

from jobs.bench.printing import Json, Rounds, measured, readable, show
from jobs.bench.training_commands import training_bench
from jobs.cli.groups import CommandGroup
from schemas.errors import CapfiltError

bench = typer.Typer(cls=CommandGroup, no_args_is_help=True, rich_markup_mode=None)


@bench.command()
def crawl(
    images: Annotated[int, typer.Option(min=1, max=99_999, help="A shard's.", metavar="N")] = 300,
    size: Annotated[str, typer.Option(help="Of the pictures served.", metavar="WxH")] = "640x480",
    json_: Json = False,
) -> None:
    """Crawl a loopback server, in turn with img2dataset's own Downloader: rate, CPU, memory, ratio."""
    from jobs.bench.crawl import measure_crawl

    found = measured(measure_crawl, images, _size(size))
    rows = [{"crawler": name, **readable(found[name])} for name in ("capfilt", "img2dataset")]
    show(found, rows, json_)


@bench.command()
def intake(
    rows: Annotated[int, typer.Option(min=10, help="Of the list.", metavar="N")] = 1_000_000,
    json_: Json = False,
) -> None:
    """Read a Parquet list into url shards, then read it again grown by 1%: rate and memory."""
    from jobs.bench.intake import measure_intake

    found = measured(measure_intake, rows)
    show(found, [{"reading": name, **readable(found[name])} for name in ("first", "grown")], json_)


@bench.command()
def manifest(
    images: Annotated[int, typer.Option(min=1, help="Of the corpus.", metavar="N")] = 150_000,
    json_: Json = False,
) -> None:
    """Ask a synthetic corpus, as `capfilt sql` does and in plain DuckDB; compact its records."""
    from jobs.bench.manifest import measure_manifest

    found = measured(measure_manifest, images)
    show(found, found["queries"], json_)


@bench.command()
def select(
    images: Annotated[int, typer.Option(min=1, max=70_000, help="A shard's.", metavar="N")] = 2_000,
    json_: Json = False,
) -> None:
    """Write curated shards from scored candidates: rate and memory."""
    from jobs.bench.selection import measure_select

    found = measured(measure_select, images)
    show(found, [readable(found["select"])], json_)


@bench.command()
def images(
    images: Annotated[int, typer.Option(min=1, help="Of each size.", metavar="N")] = 16,
    json_: Json = False,
) -> None:
    """Decode JPEGs for both models: with the libraries' own code, and on our two pixel paths."""
    from jobs.bench.images import measure_images

    found = measured(measure_images, images)
    rows = [
        {"size": size, "way": way, **at_size[way]}
        for size, at_size in found["sizes"].items()
        for way in ("naive", "exact", "fast")
    ]
    show(found, rows, json_)


@bench.command()
def caption(
    batch_size: Annotated[int, typer.Option(min=1, help="Ours, on a GPU.", metavar="N")] = 256,
    rounds: Rounds = 5,
    json_: Json = False,
) -> None:
    """Caption beside transformers' generate: agreement, operations, decoding alone, JPEG to the best two."""
    from jobs.bench.caption import measure_caption

    found = measured(measure_caption, batch_size, rounds)
    show(found, _caption_rows(found), json_)


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
    from pipeline.models.device import worker_device

    device = worker_device()
    images = images or {"cpu": 2, "cuda": 256}[device.type]
    found = measured(measure_rank, images, captions, mean_tokens, rounds, device, model)
    show(found, [{"side": side, **readable(found[side])} for side in ("open_clip", "capfilt")], json_)


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
    from pipeline.models.device import worker_device

    images = images or {"cpu": 3, "cuda": 2001}[worker_device().type]
    found = measured(measure_shard, images, shards, rounds, size)
    rows = []
    for stage in ("caption", "rank"):
        rates = {name: value for name, value in found[stage].items() if name != "seconds"}
        parts = {f"{part}_s": value for part, value in found[stage]["seconds"].items()}
        rows.append({"stage": stage, **rates, **parts})
    show(found, rows, json_)


@bench.command()
def fp8(
    images: Annotated[int, typer.Option(min=2, help="Of the demo's world.", metavar="N")] = 500,
    json_: Json = False,
) -> None:
    """Compare float32, bfloat16 and float8 on the demo's trained models: scores, captions, what is kept."""
    from jobs.bench.fp8 import measure_fp8

    found = measured(measure_fp8, images)
    pairs = ("bf16_from_fp32", "fp8_from_fp32", "fp8_from_bf16")
    show(found, [{"change": pair, **found[pair]} for pair in pairs], json_)


for command in training_bench.registered_commands:
    bench.registered_commands.append(command)


def _caption_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each of the three things that are timed."""
    decoding = [
        {
            "part": part,
            "ratio": found[f"decode_ratio{suffix}"],
            "s_per_image": found[f"decode{suffix}_s_per_image"],
            "transformers_s_per_image": found[f"decode{suffix}_s_per_image_transformers"],
            "mean_tokens": found[f"decode{suffix}_mean_tokens"],
            "gflop": found[f"gflop_ours{suffix}"],
        }
        for part, suffix in (("decode, to the last token", ""), ("decode, captions end", "_early_stop"))
    ]
    whole = {
        "part": "JPEG to the best two",
        "ratio": found["end_to_end_ratio"],
        "s_per_image": 1 / found["images_per_s"],
        "transformers_s_per_image": 1 / found["transformers_images_per_s"],
    }
    return [*decoding, whole]


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{1,3})x([1-9]\d{1,3})", text)
    if not match or min(int(match[1]), int(match[2])) < 64:
        raise CapfiltError(f"--size {text!r}: width x height from 64 to 9999 pixels, such as 640x480")
    return int(match[1]), int(match[2])
