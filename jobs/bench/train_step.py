"""``capfilt bench stage1|stage2|precision``: training steps at the published sizes, and bfloat16 beside float32.

Random weights on the device, tokens without a tokenizer, no Ray and no files. A CPU computes on one thread.
"""

import math
from collections.abc import Callable
from statistics import mean, median
from typing import Any, Literal

import torch
from torch import Tensor

from jobs.bench.fixtures.compute import matmul_rate, one_thread, seconds
from jobs.bench.fixtures.machine import peak_bytes
from pipeline.models.device import compute_dtype
from pipeline.rng import seed_for
from schemas.config import Precision
from schemas.pretrain import PretrainConfig
from training.blip2.build import Stage, compile_stage, empty_stage
from training.blip2.stage1 import Stage1
from training.distributed import World
from training.losses import IGNORED
from training.models.language import Target
from training.models.tokenizer import Texts

Arch = Literal["vitg", "vitl"]
# Adds the gradients of a step: its position, the number of samples, and of those in a micro-batch.
Step = Callable[[int, int, int], dict[str, Tensor]]

VISION = {
    "vitg": {"model": "EVA01-g-14", "pretrained": "laion400m_s11b_b41k"},
    "vitl": {"model": "ViT-L-14", "pretrained": "openai"},
}
# Tokens of a caption of usual length, and the length that they are padded to.
_OPT_TOKENS, _OPT_LENGTH = 20, 24
_T5_PROMPT, _T5_TARGET = 8, 16
# A larger micro-batch makes a GPU no faster.
_MAX_MICRO_BATCH = 256
# Of the memory; the rest is for what compiled code and the allocator do differently.
_SHARE_OF_MEMORY = 0.85
# Two small micro-batches: memory is a constant plus a share for each sample.
_PROBES = (8, 24)
# bench precision: the batch, and the last steps over which losses are compared.
_PRECISION_BATCH, _COMPARED_STEPS = 64, 50


def bench_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure_train_step(
    arch: Arch, language: str | None, batch: int, steps: int, micro_batch: int = 0
) -> dict[str, Any]:
    """Measure ``steps`` steps of ``batch`` images at the published size.

    Args:
        language: of stage 2: a published model, such as facebook/opt-2.7b; None measures stage 1.
        micro_batch: images at once; 0: as many as fit the memory.
    """
    device = bench_device()
    sections = {} if language is None else {"language": _language_section(language, device)}
    facts: dict[str, Any] = {"stage": 1, "arch": arch}
    if language is not None:
        facts = {"stage": 2, "arch": arch, "language": language}
    config = _config({"name": "bench", "stage": facts["stage"]}, VISION[arch], batch_size=1, **sections)
    stage = empty_stage(config, World(device), device)
    stage.train()
    if device.type == "cuda":
        compile_stage(stage)
    return facts | measure_steps(stage, synthetic_step(stage, batch), batch, steps, micro_batch)


def synthetic_step(stage: Stage, batch: int) -> Step:
    """Return a step on random pixels and captions: full-length ones for stage 1, of usual length for stage 2."""
    generator = torch.Generator().manual_seed(0)
    size = stage.config.data.image_size_px
    pixels_BCHW = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
    if isinstance(stage, Stage1):
        qformer = stage.config.qformer
        ids_BL = torch.randint(1, qformer.vocab_size, (batch, qformer.max_text_tokens), generator=generator)
        texts = Texts(ids_BL=ids_BL, mask_BL=torch.ones_like(ids_BL, dtype=torch.bool))
        uids = [f"{index:032x}" for index in range(batch)]

        def stage1_step(position: int, samples: int, micro_batch: int) -> dict[str, Tensor]:
            rows = slice(samples)
            return stage.step(pixels_BCHW[rows], texts[rows], uids[rows], position, micro_batch)

        return stage1_step
    target = _random_target(stage, batch, generator)

    def stage2_step(position: int, samples: int, micro_batch: int) -> dict[str, Tensor]:
        parts = [slice(at, min(at + micro_batch, samples)) for at in range(0, samples, micro_batch)]
        targets = [Target(**{name: values[rows] for name, values in target.items()}) for rows in parts]
        return stage.step([pixels_BCHW[rows] for rows in parts], targets, position)

    return stage2_step


def _random_target(stage: Stage, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
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


def measure_steps(stage: Stage, step: Step, batch: int, steps: int, micro_batch: int) -> dict[str, Any]:
    """Time whole steps, the optimiser's included, after those that warm up."""
    device = stage.query_tokens.device
    on_gpu = device.type == "cuda"
    parameters = [parameter for _, parameter in stage.trainable_named_parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=on_gpu)
    losses: dict[str, Tensor] = {}

    def timed_step(position: int) -> float:
        def whole_step() -> None:
            losses.update(step(position, batch, micro_batch))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return seconds(whole_step, device)

    with one_thread(device):
        micro_batch = micro_batch or _fitting_micro_batch(stage, step, batch)
        warm_up_s = sum(timed_step(at) for at in range(2 if on_gpu else 1))
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        step_s = median(timed_step(100 + at) for at in range(steps))
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
    """Return the size of equal micro-batches that fit a GPU's memory, by what two small steps take; on a CPU, 1.

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
    # Two points of the line: memory = fixed + bytes_per_sample * samples.
    bytes_per_sample = (peaks[1] - peaks[0]) / (_PROBES[1] - _PROBES[0])
    fixed = peaks[0] - bytes_per_sample * _PROBES[0]
    vision = stage.visual_encoder
    features = batch * vision.num_tokens * vision.width * 2
    # AdamW's two moments are not there yet.
    moments = 8 * sum(parameter.numel() for _, parameter in stage.trainable_named_parameters())
    room = _SHARE_OF_MEMORY * torch.cuda.mem_get_info(device)[1] - fixed - features - moments
    largest = max(1, min(_MAX_MICRO_BATCH, batch, int(room / bytes_per_sample)))
    return math.ceil(batch / math.ceil(batch / largest))


def measure_precision(steps: int = 200, batch: int = _PRECISION_BATCH) -> dict[str, Any]:
    """Train a small stage 1 on one batch in float32, in bfloat16, and in float32 with another seed.

    The last one has other dropout and negatives: its distance is what a difference without meaning looks like.

    Returns:
        The losses of the three, and their mean distances from float32's over the last 50 steps.
    """
    runs = {"fp32": _losses("fp32", 0, steps, batch), "bf16": _losses("bf16", 0, steps, batch)}
    runs["fp32_other_seed"] = _losses("fp32", 1, steps, batch)
    last = min(_COMPARED_STEPS, steps)
    differences = {
        name: [loss - reference for loss, reference in zip(losses, runs["fp32"], strict=True)][-last:]
        for name, losses in runs.items()
        if name != "fp32"
    }
    return {
        "device": bench_device().type,
        "steps": steps,
        "batch": batch,
        "first_loss": round(runs["fp32"][0], 4),
        "last_loss": {name: round(mean(losses[-last:]), 4) for name, losses in runs.items()},
        "distance": {name: round(mean(map(abs, values)), 5) for name, values in differences.items()},
        "bias": {name: round(mean(values), 5) for name, values in differences.items()},
        "losses": {name: [round(loss, 4) for loss in losses] for name, losses in runs.items()},
    }


def _losses(precision: Precision, seed: int, steps: int, batch: int) -> list[float]:
    device = bench_device()
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
    stage = empty_stage(config, World(device), "cpu")
    stage.to(device).train()
    if device.type == "cuda":
        compile_stage(stage)
    step = synthetic_step(stage, batch)
    optimizer = torch.optim.AdamW((weight for _, weight in stage.trainable_named_parameters()), lr=3e-4)
    losses = []
    for index in range(steps):
        losses.append(step(index, batch, batch)["loss"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return torch.stack(losses).tolist()


def _language_section(language: str, device: torch.device) -> dict[str, Any]:
    precision = "bf16" if device.type == "cuda" else "fp32"
    return {"model": language, "family": "t5" if "t5" in language else "opt", "precision": precision}


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
