"""Stage 1 at full size: random weights on the device, tokens without a tokenizer, no Ray."""

from typing import Any

import torch
from torch import Tensor

from jobs.bench.training import Arch, bench_config, bench_device, measure_steps
from training.blip2.build import compile_stage, empty_stage
from training.blip2.stage1 import Stage1
from training.distributed import World
from training.models.tokenizer import Texts


def measure_stage1(arch: Arch, batch: int, steps: int, micro_batch: int = 0) -> dict[str, Any]:
    """Measure ``steps`` steps of ``batch`` images, in shares of ``micro_batch``; 0: of what fits the memory."""
    device = bench_device()
    stage = empty_stage(bench_config(arch), World(device), device)
    assert isinstance(stage, Stage1)
    stage.train()
    if device.type == "cuda":
        compile_stage(stage)
    return {
        "stage": 1,
        "arch": arch,
        **measure_steps(stage, synthetic_step(stage, batch), batch, steps, micro_batch),
    }


def synthetic_step(stage: Stage1, batch: int) -> Any:
    """Return a step on random pixels and captions as long as they may be: none of the counted work is left out."""
    shape, size = stage.config.qformer, stage.config.data.image_size_px
    generator = torch.Generator().manual_seed(0)
    pixels_BCHW = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
    ids_BL = torch.randint(1, shape.vocab_size, (batch, shape.max_text_tokens), generator=generator)
    texts = Texts(ids_BL=ids_BL, mask_BL=torch.ones_like(ids_BL, dtype=torch.bool))
    uids = [f"{index:032x}" for index in range(batch)]

    def step(position: int, samples: int, micro_batch: int) -> dict[str, Tensor]:
        rows = slice(0, samples)
        return stage.step(pixels_BCHW[rows], texts[rows], uids[rows], position, micro_batch)

    return step
