"""Stage 2 at full size: random weights on the device, tokens without a tokenizer, no Ray."""

from typing import Any

import torch
from torch import Tensor

from jobs.bench.training import Arch, bench_config, bench_device, measure_steps
from training.blip2.build import compile_stage, empty_stage
from training.blip2.stage2 import Stage2
from training.distributed import World
from training.losses import IGNORED
from training.models.language import Target

# Tokens that a caption of usual length has, and what they are padded to.
_OPT_TOKENS, _OPT_LENGTH = 20, 24
_T5_READ, _T5_WRITTEN = 8, 16


def measure_stage2(arch: Arch, language: str, batch: int, steps: int, micro_batch: int = 0) -> dict[str, Any]:
    """Measure ``steps`` steps of ``batch`` images, in shares of ``micro_batch``; 0: of what fits the memory.

    Args:
        language: a published one, such as facebook/opt-2.7b.
    """
    device = bench_device()
    family = "t5" if "t5" in language else "opt"
    precision = "bf16" if device.type == "cuda" else "fp32"
    config = bench_config(arch, language={"model": language, "family": family, "precision": precision})
    stage = empty_stage(config, World(device), device)
    assert isinstance(stage, Stage2)
    stage.train()
    if device.type == "cuda":
        compile_stage(stage)
    found = measure_steps(stage, synthetic_step(stage, batch), batch, steps, micro_batch)
    return {"stage": 2, "arch": arch, "language": language, **found}


def synthetic_step(stage: Stage2, batch: int) -> Any:
    """Return a step on random pixels and captions of usual length."""
    size, words = stage.config.data.image_size_px, stage.language.model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    pixels_BCHW = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
    if stage.language.name == "opt":
        ids_BL = torch.randint(4, words, (batch, _OPT_LENGTH), generator=generator)
        mask_BL = torch.arange(_OPT_LENGTH).expand_as(ids_BL) < _OPT_TOKENS
        read_BL, words_BT = ids_BL, ids_BL.masked_fill(~mask_BL, IGNORED)
    else:
        read_BL = torch.randint(4, words, (batch, _T5_READ), generator=generator)
        words_BT = torch.randint(4, words, (batch, _T5_WRITTEN), generator=generator)
        mask_BL = torch.ones_like(read_BL, dtype=torch.bool)

    def step(position: int, samples: int, micro_batch: int) -> dict[str, Tensor]:
        shares = [slice(at, min(at + micro_batch, samples)) for at in range(0, samples, micro_batch)]
        targets = [
            Target(read_BL=read_BL[rows], mask_BL=mask_BL[rows], words_BT=words_BT[rows]) for rows in shares
        ]
        return stage.step([pixels_BCHW[rows] for rows in shares], targets, position)

    return step
