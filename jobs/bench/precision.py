"""Whether bfloat16 learns what float32 learns: the same small model on the same samples, step by step."""

from statistics import mean
from typing import Any

import torch

from jobs.bench.stage1 import synthetic_step
from jobs.bench.training import bench_device
from pipeline.rng import seed_for
from schemas.config import Precision
from schemas.pretrain import PretrainConfig
from training.blip2.build import compile_stage, empty_stage
from training.blip2.stage1 import Stage1
from training.distributed import World

_BATCH = 64
_LAST = 50


def measure_precision(steps: int = 200, batch: int = _BATCH) -> dict[str, Any]:
    """Train a small stage 1 by heart for ``steps`` steps, in float32, in bfloat16, and in float32 once more.

    The last one has other dropout and negatives: it says what difference means nothing.

    Returns:
        The losses of the three, and their mean distances from float32's over the last 50 steps.
    """
    runs = {"fp32": _losses("fp32", 0, steps, batch), "bf16": _losses("bf16", 0, steps, batch)}
    runs["fp32_other_seed"] = _losses("fp32", 1, steps, batch)
    last = min(_LAST, steps)

    def distance(name: str, signed: bool) -> float:
        pairs = zip(runs[name][-last:], runs["fp32"][-last:], strict=True)
        return round(mean((one - other) if signed else abs(one - other) for one, other in pairs), 5)

    return {
        "device": bench_device().type,
        "steps": steps,
        "batch": batch,
        "first_loss": round(runs["fp32"][0], 4),
        "last_loss": {name: round(mean(losses[-last:]), 4) for name, losses in runs.items()},
        "distance": {name: distance(name, False) for name in ("bf16", "fp32_other_seed")},
        "bias": {name: distance(name, True) for name in ("bf16", "fp32_other_seed")},
        "losses": {name: [round(loss, 4) for loss in losses] for name, losses in runs.items()},
    }


def _losses(precision: Precision, seed: int, steps: int, batch: int) -> list[float]:
    device = bench_device()
    config = _small_config(precision, seed, batch)
    torch.manual_seed(seed_for("weights"))
    # On the CPU, so that both precisions round the same random weights.
    stage = empty_stage(config, World(device), "cpu")
    assert isinstance(stage, Stage1)
    stage.to(device).train()
    if device.type == "cuda":
        compile_stage(stage)
    step = synthetic_step(stage, batch)
    optimizer = torch.optim.AdamW((one for _, one in stage.trainable_named_parameters()), lr=3e-4)
    losses = []
    for index in range(steps):
        losses.append(step(index, batch, batch)["loss"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return torch.stack(losses).tolist()


def _small_config(precision: Precision, seed: int, batch: int) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "run": {"name": "precision", "stage": 1, "seed": seed},
            "data": {"corpus": [{"path": "none"}]},
            "vision": {"model": "ViT-S-32", "pretrained": ""},
            "qformer": {
                "layers": 4,
                "width": 256,
                "heads": 4,
                "ffn_width": 1024,
                "num_queries": 16,
                "vocab_size": 999,
            },
            "optim": {"batch_size": batch},
            "performance": {"precision": precision},
        }
    )
