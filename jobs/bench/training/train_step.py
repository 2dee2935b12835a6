"""``capfilt bench stage1|stage2|precision``: training steps at the published sizes, and bfloat16 beside float32.

Random weights on the device, tokens without a tokenizer, no Ray and no files. A CPU computes on one thread.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from operator import sub
from statistics import mean, median
from typing import Any, Literal

import torch
from torch import Tensor

from jobs.bench.fixtures.compute import matmul_rate, one_thread, seconds
from jobs.bench.fixtures.machine import peak_bytes
from pipeline.models.device import compute_dtype, worker_device
from pipeline.rng import seed_for
from schemas.config import Precision
from schemas.pretrain import PretrainConfig
from training.blip2.stage1 import Stage1
from training.build import Blip2Stage, compile_stage, empty_blip2
from training.distributed import World
from training.losses import IGNORED
from training.models.language import Target
from training.models.micro_batches import SampleKeys
from training.models.tokenizer import Texts

Arch = Literal["vitg", "vitl"]
# Adds the gradients of a step: its position, and the images of a micro-batch.
Step = Callable[[int, int], dict[str, Tensor]]

VISION = {
    "vitg": {"model": "EVA01-g-14", "pretrained": "laion400m_s11b_b41k"},
    "vitl": {"model": "ViT-L-14", "pretrained": "openai"},
}
# Tokens of a caption of usual length, and the length that they are padded to.
_OPT_TOKENS, _OPT_LENGTH = 20, 24
_T5_PROMPT, _T5_TARGET = 8, 16
# A larger micro-batch makes a GPU no faster.
_MAX_MICRO_BATCH = 256
# bench precision: the last steps, over which losses are compared.
_COMPARED_STEPS = 50


def measure_train_step(
    arch: Arch, language: str | None, batch: int, steps: int, micro_batch: int = 0
) -> dict[str, Any]:
    """Measure ``steps`` steps of ``batch`` images at the published size.

    Args:
        language: of stage 2: a published model, such as facebook/opt-2.7b; None measures stage 1.
        micro_batch: images at once; 0: as many as fit the memory.
    """
    device = worker_device()
    facts: dict[str, Any] = {"stage": 1, "arch": arch}
    sections: dict[str, Any] = {}
    if language is not None:
        facts = {"stage": 2, "arch": arch, "language": language}
        family, precision = "t5" if "t5" in language else "opt", "bf16" if device.type == "cuda" else "fp32"
        sections["language"] = {"model": language, "family": family, "precision": precision}
    config = _config({"name": "bench", "stage": facts["stage"]}, VISION[arch], batch_size=1, **sections)
    stage = _compiled(empty_blip2(config, World(device), device))
    return facts | measure_steps(stage, synthetic_step(stage, batch), batch, steps, micro_batch)


def synthetic_step(stage: Blip2Stage, batch: int) -> Step:
    """Return a step on random pixels and captions: full-length ones for stage 1, of usual length for stage 2."""
    generator = torch.Generator().manual_seed(0)
    size = stage.config.data.image_size_px
    pixels_BCHW = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
    if isinstance(stage, Stage1):
        qformer = stage.config.qformer
        ids_BL = torch.randint(1, qformer.vocab_size, (batch, qformer.max_text_tokens), generator=generator)
        texts = Texts(ids_BL=ids_BL, mask_BL=torch.ones_like(ids_BL, dtype=torch.bool))
        uids = [f"{index:032x}" for index in range(batch)]
        keys = SampleKeys.of(uids, range(batch), uids, [[uid] for uid in uids], ids_BL)
        return lambda position, micro_batch: stage.step(pixels_BCHW, texts, keys, position, micro_batch)
    tokens = _random_target(stage, batch, generator)

    def stage2_step(position: int, micro_batch: int) -> dict[str, Tensor]:
        parts = [slice(start, start + micro_batch) for start in range(0, batch, micro_batch)]
        targets = [Target(**{name: values[rows] for name, values in tokens.items()}) for rows in parts]
        return stage.step([pixels_BCHW[rows] for rows in parts], targets, position)

    return stage2_step


def _random_target(stage: Blip2Stage, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return random tokens as the fields of a Target: OPT predicts what it reads, T5 another text."""
    vocabulary = stage.language.model.config.vocab_size

    def tokens(length: int) -> Tensor:
        return torch.randint(4, vocabulary, (batch, length), generator=generator)

    if stage.language.name == "opt":
        ids_BL = tokens(_OPT_LENGTH)
        mask_BL = torch.arange(_OPT_LENGTH).expand_as(ids_BL) < _OPT_TOKENS
        return {"inputs_BL": ids_BL, "mask_BL": mask_BL, "labels_BT": ids_BL.masked_fill(~mask_BL, IGNORED)}
    inputs_BL, labels_BT = tokens(_T5_PROMPT), tokens(_T5_TARGET)
    return {
        "inputs_BL": inputs_BL,
        "mask_BL": torch.ones_like(inputs_BL, dtype=torch.bool),
        "labels_BT": labels_BT,
    }


def measure_steps(stage: Blip2Stage, step: Step, batch: int, steps: int, micro_batch: int) -> dict[str, Any]:
    """Time whole steps, the optimiser's included, after those that warm up."""
    device = stage.query_tokens.device
    on_gpu = device.type == "cuda"
    train = _with_optimizer(stage, step, lr=1e-6)
    losses: dict[str, Tensor] = {}

    def timed_step(position: int) -> float:
        return seconds(lambda: losses.update(train(position, micro_batch)), device)

    with one_thread(device):
        micro_batch = micro_batch or _fitting_micro_batch(train, batch, device)
        warm_up_s = sum(map(timed_step, range(2 if on_gpu else 1)))
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        step_s = median(timed_step(100 + number) for number in range(steps))
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
        "trainable_parameters": sum(weight.numel() for _, weight in stage.trainable_named_parameters()),
        "losses": {name: round(float(value), 4) for name, value in losses.items()},
    }


def _with_optimizer(stage: Blip2Stage, step: Step, lr: float) -> Step:
    """Return a whole step: gradients, then AdamW."""
    weights = [weight for _, weight in stage.trainable_named_parameters()]
    optimizer = torch.optim.AdamW(weights, lr=lr, fused=weights[0].is_cuda)

    def whole_step(position: int, micro_batch: int) -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        losses = step(position, micro_batch)
        optimizer.step()
        return losses

    return whole_step


def _fitting_micro_batch(train: Step, batch: int, device: torch.device) -> int:
    """Return the size of the fewest equal micro-batches that fit a GPU's memory; on a CPU, 1."""
    if device.type != "cuda":
        return 1
    parts = math.ceil(batch / _MAX_MICRO_BATCH)
    while (micro_batch := math.ceil(batch / parts)) > 1:
        with suppress(torch.OutOfMemoryError):
            train(0, micro_batch)
            return micro_batch
        torch.cuda.empty_cache()
        parts *= 2
    return 1


def _compiled(stage: Blip2Stage) -> Blip2Stage:
    if stage.query_tokens.is_cuda:
        compile_stage(stage)
    return stage.train()


def measure_precision(steps: int = 200, batch: int = 64) -> dict[str, Any]:
    """Train a small stage 1 on one batch in float32, in bfloat16, and in float32 with another seed.

    The last one has other dropout and negatives: its distance is what a difference without meaning looks like.

    Returns:
        The losses of the three, and their mean distances from float32's over the last 50 steps.
    """
    reference = _losses("fp32", 0, steps, batch)
    others = {"bf16": _losses("bf16", 0, steps, batch), "fp32_other_seed": _losses("fp32", 1, steps, batch)}
    runs = {"fp32": reference, **others}
    last = slice(-min(_COMPARED_STEPS, steps), None)
    differences = {name: list(map(sub, losses[last], reference[last])) for name, losses in others.items()}
    return {
        "device": worker_device().type,
        "steps": steps,
        "batch": batch,
        "first_loss": round(reference[0], 4),
        "last_loss": {name: round(mean(losses[last]), 4) for name, losses in runs.items()},
        "distance": {name: round(mean(map(abs, values)), 5) for name, values in differences.items()},
        "bias": {name: round(mean(values), 5) for name, values in differences.items()},
        "losses": {name: [round(loss, 4) for loss in losses] for name, losses in runs.items()},
    }


def _losses(precision: Precision, seed: int, steps: int, batch: int) -> list[float]:
    device = worker_device()
    qformer = {"layers": 4, "width": 256, "heads": 4, "ffn_width": 1024, "num_queries": 16, "vocab_size": 999}
    config = _config(
        {"name": "precision", "stage": 1, "seed": seed},
        {"model": "ViT-S-32", "pretrained": ""},
        batch_size=batch,
        qformer=qformer,
        performance={"precision": precision},
    )
    torch.manual_seed(seed_for("weights"))
    # On the CPU, so that both precisions round the same random weights.
    stage = _compiled(empty_blip2(config, World(device), torch.device("cpu")).to(device))
    train = _with_optimizer(stage, synthetic_step(stage, batch), lr=3e-4)
    return torch.stack([train(index, batch)["loss"] for index in range(steps)]).tolist()


def _config(run: dict[str, Any], vision: dict[str, str], batch_size: int, **sections: Any) -> PretrainConfig:
    """Return the config of a training that reads no corpus."""
    return PretrainConfig.model_validate(
        {
            "run": run,
            "data": {"corpus": [{"path": "none"}]},
            "vision": vision,
            "optim": {"batch_size": batch_size},
            **sections,
        }
    )
