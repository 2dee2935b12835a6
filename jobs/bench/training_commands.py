"""``capfilt bench stage1|stage2|loader|precision``: what training costs on this machine."""

from typing import Annotated, Any, Literal

import typer

from jobs.bench.printing import Json, measured, readable, show

training_bench = typer.Typer()

Arch = Annotated[Literal["vitg", "vitl"], typer.Option(help="The image encoder.")]
Batch = Annotated[
    int | None, typer.Option(min=2, help="Default: 2, on a GPU the paper's.", metavar="N", show_default=False)
]
Steps = Annotated[int, typer.Option(min=1, help="Timed; the median is shown.", metavar="N")]
MicroBatch = Annotated[int, typer.Option(min=0, help="Images at once; 0: what fits the memory.", metavar="N")]

# Of the paper, section 4.1.
_STAGE1_BATCH = {"vitg": 1680, "vitl": 2320}
_STAGE2_BATCH = {"opt": 1920, "t5": 1520}


@training_bench.command()
def stage1(
    arch: Arch = "vitl",
    batch: Batch = None,
    steps: Steps = 3,
    micro_batch: MicroBatch = 0,
    json_: Json = False,
) -> None:
    """Train stage 1 at the published size with random weights: samples/s, share of the matmul rate, memory."""
    from jobs.bench.stage1 import measure_stage1

    batch = batch or _default_batch(_STAGE1_BATCH[arch])
    _show_steps(measured(measure_stage1, arch, batch, steps, micro_batch), json_)


@training_bench.command()
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
    from jobs.bench.stage2 import measure_stage2

    batch = batch or _default_batch(_STAGE2_BATCH["t5" if "t5" in language else "opt"])
    _show_steps(measured(measure_stage2, arch, language, batch, steps, micro_batch), json_)


@training_bench.command()
def loader(
    images: Annotated[int, typer.Option(min=64, help="A round's.", metavar="N")] = 1024,
    json_: Json = False,
) -> None:
    """Load curated shards, in turn with a plain WebDataset loop: rate per core, memory, ratio."""
    from jobs.bench.loader import measure_loader

    found = measured(measure_loader, images)
    show(found, [{"loader": name, **readable(found[name])} for name in ("capfilt", "webdataset")], json_)


@training_bench.command()
def precision(
    steps: Annotated[int, typer.Option(min=1, metavar="N")] = 200,
    json_: Json = False,
) -> None:
    """Train a small stage 1 in float32 and in bfloat16: how far the losses are apart, beside another seed's."""
    from jobs.bench.precision import measure_precision

    found = measured(measure_precision, steps)
    rows = [
        {
            "run": name,
            "last_loss": loss,
            "distance": found["distance"].get(name),
            "bias": found["bias"].get(name),
        }
        for name, loss in found["last_loss"].items()
    ]
    show(found, rows, json_)


def _default_batch(on_gpu: int) -> int:
    import torch

    return on_gpu if torch.cuda.is_available() else 2


def _show_steps(found: dict[str, Any], as_json: bool) -> None:
    table = ("samples_per_s", "step_s", "tflops", "mfu", "gflop_per_sample", "micro_batch", "peak_bytes")
    row = {name: found[name] for name in table}
    show(found if as_json else {k: v for k, v in found.items() if k not in table}, [readable(row)], as_json)
