"""A stage of a few numbers that keeps the protocol of the real ones: for tests of the loop, not of what it trains."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from schemas.pretrain import PretrainConfig
from training.checkpoint import Checkpoints
from training.data.loader import Batch
from training.distributed import World
from training.models.parameters import PartlyTrained
from training.trainer.loop import Loop
from training.trainer.steps.optim import fill_preset

BATCH_SIZE = 4


class SmallStage(PartlyTrained):
    """Fit a sum of pixels through a layer, dropout and a temperature.

    ``explode_at``: the loss is not a number at these steps; ``unused``: a parameter that no loss reaches.
    """

    def __init__(self, explode_at: Collection[int] = (), world_size: int = 1) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(12, 8)
        self.head = nn.Linear(8, 1)
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.unused = nn.Parameter(torch.ones(3, 2))
        self.explode_at, self.world_size = explode_at, world_size

    def training_step(self, batch: Batch, micro_batch_size: int) -> dict[str, Tensor]:
        torch.manual_seed(batch.position)
        total = torch.zeros(())
        parts = batch.pixels_BCHW.split(micro_batch_size)
        for number, pixels in enumerate(parts, 1):
            features = pixels.flatten(1).float() / 255
            hidden = nn.functional.dropout(self.layer(features).relu(), 0.2, self.training)
            loss = ((self.head(hidden)[:, 0] - features.sum(1)) ** 2 + self.temp**2).sum()
            if batch.position // BATCH_SIZE in self.explode_at:
                loss = loss * float("nan")
            loss = loss / len(batch.uids)
            if number == len(parts):
                self.begin_last_passes()
            (loss / self.world_size).backward()
            total += loss.detach()
        return {"loss": total, "temperature": self.temp.detach().clone()}

    def flops_per_sample(self) -> float:
        return 1e3


def config(output: Path, **sections: dict) -> PretrainConfig:
    """Return a filled config of ten steps."""
    values = {
        "run": {"name": "small", "stage": 1, "output": str(output), "seed": 3},
        "data": {"corpus": [{"path": str(output)}]},
        "optim": {"steps": 10, "batch_size": BATCH_SIZE, "peak_lr": 1e-2},
        "checkpoint": {"every_steps": 5},
        "metrics": {"every_steps": 1},
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return fill_preset(PretrainConfig.model_validate(values), None)


def batches(consumed: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """Yield the endless stream of one rank from a position on: a function of the position alone."""
    share = BATCH_SIZE // world_size
    while True:
        start = consumed + rank * share
        pixels = [_pixels(number) for number in range(start, start + share)]
        consumed += BATCH_SIZE
        uids = [f"{number:032x}" for number in range(start, start + share)]
        yield Batch(
            pixels_BCHW=torch.stack(pixels),
            captions=["a"] * share,
            uids=uids,
            image_hashes=[0] * share,
            kept_captions=[["a"]] * share,
            position=consumed,
        )


def make_loop(config: PretrainConfig, stage: SmallStage | None = None, **options: object) -> Loop:
    """Return the loop of a run on this process."""
    stage = stage or SmallStage()
    checkpoints = Checkpoints(f"{config.run.output}/run")
    options = {"world": World(), "run_id": "20260101T000000-test", "snapshot": "f" * 64} | options
    return Loop(config=config, stage=stage, checkpoints=checkpoints, **options)


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.lines: list[dict] = []
        self.of_ranks: list[Mapping[str, list[float]]] = []

    def write(
        self, step: int, values: Mapping[str, float | None], of_ranks: Mapping[str, list[float]] | None = None
    ) -> None:
        self.lines.append({"step": step, **values})
        self.of_ranks += [of_ranks] if of_ranks else []

    def close(self) -> None:
        pass

    def of(self, name: str) -> list[float]:
        return [line[name] for line in self.lines]


def _pixels(number: int) -> Tensor:
    return torch.randint(
        0, 256, (3, 2, 2), generator=torch.Generator().manual_seed(number), dtype=torch.uint8
    )
