"""Metrics of a run: JSON lines always, TensorBoard and wandb if configured, and the rates that are reported."""

import importlib.util
import json
import math
import resource
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch

from pipeline.storage.scratch import temporary_folder
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.pretrain import MetricsConfig
from training.distributed import World
from training.lease import Lease
from training.trainer.steps.seconds import StepSeconds

FILE = "metrics.jsonl"

# Dense bf16 rates of the data sheets, in FLOP/s, by a part of the device's name; the first match counts.
_PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
}


# What is known of each rank: a list in order of rank, by the name of the value.
OfRanks = Mapping[str, list[float]]


class Sink(Protocol):
    """Where metrics go."""

    def write(self, step: int, values: Mapping[str, float | None], of_ranks: OfRanks | None = None) -> None:
        """Write the values of a step, None: not known here; and those of each rank, where there is room for them."""

    def close(self) -> None:
        """Write what is buffered."""


class JsonLines:
    """``metrics.jsonl`` in the run's folder: one object a line, each step once, in order.

    A resumed run first drops the lines after its checkpoint, since those steps are repeated. On remote storage, where
    nothing can be appended, the whole file is uploaded at each ``flush``.

    Args:
        storage: the run's folder.
        after_step: the step of the checkpoint.
        lease: of the folder: once it is lost, nothing is uploaded.
    """

    def __init__(self, storage: Storage, after_step: int, lease: Lease | None = None) -> None:
        self._storage, self._lease = storage, lease
        self._stack = ExitStack()
        if storage.is_local:
            path = Path(storage.url(FILE))
            path.parent.mkdir(parents=True, exist_ok=True)
        else:
            path = self._stack.enter_context(temporary_folder()) / FILE
            if storage.exists(FILE):
                path.write_bytes(storage.read(FILE))
        self._path = path
        self._file = self._stack.enter_context(path.open("a+"))
        self._file.seek(0)
        kept = [line for line in self._file if _step_of(line) <= after_step]
        self._file.truncate(0)
        self._file.writelines(kept)
        self._file.flush()

    def write(self, step: int, values: Mapping[str, float | None], of_ranks: OfRanks | None = None) -> None:
        """Append one line."""
        known = {
            name: value if value is not None and math.isfinite(value) else None
            for name, value in values.items()
        }
        ranks = {"ranks": of_ranks} if of_ranks else {}
        self._file.write(json.dumps({"step": step, **known, **ranks}) + "\n")
        self._file.flush()

    def flush(self) -> None:
        """Upload the file to remote storage."""
        if not self._storage.is_local and not (self._lease and self._lease.is_lost()):
            self._storage.put(self._path, FILE)

    def close(self) -> None:
        """Flush and close the file."""
        self.flush()
        self._stack.close()


class TensorBoard:
    """Event files in the run's local folder, or in ``runs/`` where the run's folder is remote."""

    def __init__(self, folder: str) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(folder)

    def write(self, step: int, values: Mapping[str, float | None], of_ranks: OfRanks | None = None) -> None:
        """Add one point to each curve; ranks have none."""
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class Wandb:
    """A wandb run of the same name, resumed where the training is."""

    def __init__(self, project: str, name: str, run_key: str, config: Mapping[str, Any], folder: str) -> None:
        import wandb

        Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=project, name=name, id=run_key, resume="allow", config=dict(config), dir=folder
            )
        except wandb.errors.Error as error:
            raise CapfiltError(
                f"metrics.wandb_project: {error}; log in (WANDB_API_KEY), set WANDB_MODE=offline, or leave it empty"
            ) from error

    def write(self, step: int, values: Mapping[str, float | None], of_ranks: OfRanks | None = None) -> None:
        """Log one step, without the ranks."""
        self._run.log({name: value for name, value in values.items() if value is not None}, step=step)

    def close(self) -> None:
        """End wandb's run."""
        self._run.finish()


def require_libraries(config: MetricsConfig) -> None:
    """Raise CapfiltError where the library of a sink is missing, before anything is loaded or written."""
    for key, library in (("tensorboard", "tensorboardX"), ("wandb_project", "wandb")):
        if getattr(config, key) and importlib.util.find_spec(library) is None:
            raise CapfiltError(
                f"metrics.{key}: {library} is not installed: pip install {library}, or leave it out"
            )


class Throughput:
    """Rates between two reports: samples and FLOP per second, the share of time spent waiting for data.

    Args:
        world: the ranks.
        flops_per_sample: counts the FLOP of one sample's step; called where the device's peak rate is known.
        seconds: of the parts of a step.

    Attributes:
        of_ranks: each rank's peak memory, and its seconds of a step by part, at the last report.
    """

    def __init__(
        self, world: World, flops_per_sample: Callable[[], float], seconds: StepSeconds | None = None
    ) -> None:
        self._world = world
        self._seconds = seconds or StepSeconds(world.device)
        self.of_ranks: dict[str, list[float]] = {}
        peak_flops = _peak_flops(world.device)
        # Counting takes about a second, which a training on the CPU does without.
        self._peak_rate = peak_flops * world.size / flops_per_sample() if peak_flops else None
        self._reset()

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._samples = self._steps = 0
        self._waited_s = 0.0

    def add(self, samples: int, waited_s: float) -> None:
        """Count a step: samples over all ranks, seconds in which this rank had no data."""
        self._samples += samples
        self._steps += 1
        self._waited_s += waited_s

    def report(self) -> dict[str, float | None]:
        """Return the rates since the last report, and reset; every rank calls it, at the same step."""
        seconds = time.perf_counter() - self._start
        rate = self._samples / seconds
        # Model FLOP utilisation (arXiv 2204.02311, appendix B): the achieved share of the devices' peak rate.
        mfu = rate / self._peak_rate if self._peak_rate else None
        own = {
            "peak_memory_gb": _peak_memory_bytes(self._world.device) / 1e9,
            "wait_share": min(1.0, self._waited_s / seconds),
            "data_s": self._waited_s / max(1, self._steps),
            **{f"{part}_s": total / max(1, self._steps) for part, total in self._seconds.take().items()},
        }
        numbers_1K = torch.tensor([[*own.values()]], dtype=torch.float64, device=self._world.device)
        numbers_RK = self._world.all_gather(numbers_1K, [1] * self._world.size)
        of_ranks = dict(zip(own, numbers_RK.T.tolist(), strict=True))
        # The largest of all ranks: the others wait for that rank in the gradients' sum, which no rank counts.
        wait_share, peak_memory_gb = max(of_ranks.pop("wait_share")), max(of_ranks["peak_memory_gb"])
        self.of_ranks = {name: [round(number, 4) for number in numbers] for name, numbers in of_ranks.items()}
        rates = {
            "samples_per_s": rate,
            "mfu": mfu,
            "data_wait_share": wait_share,
            "peak_memory_gb": peak_memory_gb,
        }
        self._reset()
        return rates


def _peak_flops(device: torch.device) -> float | None:
    """Return the bf16 rate of a GPU's data sheet; None for a CPU or a device that is not listed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for part, flops in _PEAK_FLOPS.items() if part in name), None)


def _peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _step_of(line: str) -> float:
    """Return the step of a line; infinity for a line that a kill has cut off."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf
