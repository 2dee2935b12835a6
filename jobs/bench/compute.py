"""What a measurement of a model needs of its device: a fair clock, counted operations, the rate that is possible."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jobs.bench.machine import Stopwatch, peak_bytes

Run = Callable[[], Any]

# Large enough for a device to reach its rate, small enough for a second.
_MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}
_MATMULS = {"cpu": 3, "cuda": 30}
_ROUNDS = 5


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Let a CPU compute on one thread, so that its time does not depend on what else runs."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds(run: Run, device: torch.device) -> float:
    """Return what one run takes: CPU seconds on a CPU, which others may use too; seconds on a GPU."""
    _wait(device)
    with Stopwatch() as watch:
        run()
        _wait(device)
    return watch.cpu_s if device.type == "cpu" else watch.seconds


def in_turn(
    ways: dict[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of each way in each of ``rounds``."""
    timed: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            timed[name].append(seconds(way, device))
    return timed


def median_ratio(timed: dict[str, list[float]]) -> float:
    """Return how many times as long theirs takes: the median over the pairs."""
    return round(median(t / o for t, o in zip(timed["theirs"], timed["ours"], strict=True)), 2)


def peak_memory(run: Run, device: torch.device) -> int:
    """Return the most memory held during a run: of a GPU what tensors took, else this process's own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    run()
    return peak_bytes()


def counted_flops(run: Run) -> int:
    """Return the floating-point operations of matrix products in one run, attention included."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one kernel for a whole layer is not counted
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(
                display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: _packed_flops}
            ) as counter,
        ):
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.get_total_flops()


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second of a large matrix product: what the device can do at best."""
    size, times = _MATMUL_SIZE[device.type], _MATMULS[device.type]
    one, two = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def multiply() -> None:
        for _ in range(times):
            torch.matmul(one, two)

    multiply()
    return 2 * size**3 * times / median(seconds(multiply, device) for _ in range(_ROUNDS))


def _packed_flops(x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """Count what pipeline/packing.py computes: a packed weight does not show its shape."""
    return 2 * x_shape[0] * x_shape[1] * out_shape[1]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
