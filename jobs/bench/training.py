"""What the benchmarks of both training stages share: configs, the timed steps, memory, and how near to the limit."""

import math
from collections.abc import Callable
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from jobs.bench.fixtures.compute import matmul_rate, one_thread, seconds
from jobs.bench.fixtures.machine import peak_bytes
from schemas.pretrain import PretrainConfig
from training.blip2.build import Stage
from training.models.layers import compute_dtype

Arch = Literal["vitg", "vitl"]
# Adds the gradients of a step: its position, how many of the batch's samples, in shares of how many.
Step = Callable[[int, int, int], dict[str, Tensor]]

VISION = {
    "vitg": {"model": "EVA01-g-14", "pretrained": "laion400m_s11b_b41k"},
    "vitl": {"model": "ViT-L-14", "pretrained": "openai"},
}
# Beyond it a GPU gains nothing.
_MOST = 256
# Of the memory; the rest is for what compiled code and the allocator do differently.
_SHARE_OF_MEMORY = 0.85
_PROBES = (8, 24)


def bench_config(arch: Arch, **sections: dict[str, Any]) -> PretrainConfig:
    """Return the config of a full-size run that reads nothing."""
    stage = 2 if "language" in sections else 1
    return PretrainConfig.model_validate(
        {
            "run": {"name": "bench", "stage": stage},
            "data": {"corpus": [{"path": "none"}]},
            "vision": VISION[arch],
            "optim": {"batch_size": 1},
            **sections,
        }
    )


def bench_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure_steps(stage: Stage, step: Step, batch: int, steps: int, micro_batch: int) -> dict[str, Any]:
    """Time whole steps, the optimiser's included, after those that warm up; a CPU computes on one thread."""
    device = stage.query_tokens.device
    on_gpu = device.type == "cuda"
    parameters = [parameter for _, parameter in stage.trainable_named_parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=on_gpu)
    losses: dict[str, Tensor] = {}

    def whole_step(position: int) -> None:
        losses.update(step(position, batch, micro_batch))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with one_thread(device):
        micro_batch = micro_batch or _fitting_micro_batch(stage, step, batch)
        warm_up_s = sum(seconds(lambda at=at: whole_step(at), device) for at in range(2 if on_gpu else 1))
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        step_s = median(seconds(lambda at=at: whole_step(100 + at), device) for at in range(steps))
        limit = matmul_rate(device, compute_dtype("auto", device))
    flops = stage.flops_per_sample()
    assert all(math.isfinite(value) for value in losses.values()), losses
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu, one thread",
        "batch": batch,
        "micro_batch": micro_batch,
        "steps": steps,
        "samples_per_s": round(batch / step_s, 2),
        "step_s": round(step_s, 3),
        "warm_up_s": round(warm_up_s, 1),
        "gflop_per_sample": round(flops / 1e9, 1),
        "tflops": round(batch / step_s * flops / 1e12, 3),
        "matmul_tflops": round(limit / 1e12, 3),
        "mfu": round(batch / step_s * flops / limit, 3),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else peak_bytes(),
        "trainable_parameters": sum(parameter.numel() for parameter in parameters),
        "losses": {name: round(float(value), 4) for name, value in losses.items()},
    }


def _fitting_micro_batch(stage: Stage, step: Step, batch: int) -> int:
    """Return the size of equal shares that fit a GPU's memory, by what two small steps take; on a CPU, 1.

    Those steps are not compiled, and so take rather more.
    """
    device = stage.query_tokens.device
    if device.type != "cuda":
        return 1
    peaks = []
    for size in _PROBES:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        with torch.compiler.set_stance("force_eager"):
            step(0, min(size, batch), size)
        torch.cuda.synchronize(device)
        peaks.append(torch.cuda.max_memory_allocated(device))
        stage.zero_grad()
    a_sample = (peaks[1] - peaks[0]) / (_PROBES[1] - _PROBES[0])
    fixed = peaks[0] - a_sample * _PROBES[0]
    vision = stage.visual_encoder
    features = batch * vision.num_tokens * vision.width * 2
    # AdamW's two moments are not there yet.
    moments = 8 * sum(parameter.numel() for _, parameter in stage.trainable_named_parameters())
    room = _SHARE_OF_MEMORY * torch.cuda.mem_get_info(device)[1] - fixed - features - moments
    most = max(1, min(_MOST, batch, int(room / a_sample)))
    return math.ceil(batch / math.ceil(batch / most))
