"""The estimate of a run: parameters, data, steps, cost and memory, computed from shapes without weights."""

from typing import Any

from pipeline.storage.storage import Storage
from schemas.pretrain import PretrainConfig
from training.blip.cost import flops_saved_per_sample
from training.blip.stage import BlipStage
from training.blip2.stage1 import Stage1
from training.blip2.stage2 import Stage2
from training.build import Stage, meta_stage
from training.data.snapshot import Snapshot, take_snapshot
from training.distributed import rank_rows
from training.trainer.steps.memory import step_bytes
from training.trainer.steps.optim import fill_preset

# The rate that an estimate assumes: half of what an H200 reaches in a large bf16 matrix product.
ASSUMED_MATMUL_FLOPS = 790e12
ASSUMED_UTILISATION = 0.5

# fp32 weights, their gradient and AdamW's two moments. The bf16 copies for matrix products live in the step.
_GRADIENT_BYTES = 4
_TRAINED_BYTES = 4 + _GRADIENT_BYTES + 8
_FROZEN_BYTES = 2


def plan(config: PretrainConfig) -> dict[str, Any]:
    """Return the size, the steps and the estimated cost of a run. Reads the corpora only where they exist.

    Raises CapfiltError where a corpus that exists has nothing to train on, or the config names unknown shapes.
    """
    # A plan may be made before the data.
    storages = [Storage(corpus.path) for corpus in config.data.corpus]
    exists = all(storage.is_there() for storage in storages)
    snapshot = take_snapshot(config.data) if exists else None
    config = fill_preset(config, snapshot.num_images if snapshot else None)
    stage = meta_stage(_counted(config))
    trained = sum(parameter.numel() for _, parameter in stage.trainable_named_parameters())
    # Of BLIP the momentum encoders.
    frozen = sum(parameter.numel() for parameter in stage.parameters() if not parameter.requires_grad)
    steps = config.optim.steps
    assert steps is not None
    samples = steps * config.optim.batch_size
    flops = stage.flops_per_sample()
    saved = flops_saved_per_sample(stage) if isinstance(stage, BlipStage) else 0
    gpu_hours = samples * flops / (ASSUMED_MATMUL_FLOPS * ASSUMED_UTILISATION) / 3600
    return {
        "name": config.run.name,
        "stage": config.run.stage,
        "trainable_parameters": trained,
        "frozen_parameters": frozen,
        "steps": steps,
        "batch_size": config.optim.batch_size,
        "samples": samples,
        "gflop_per_sample": round(flops / 1e9, 1),
        "gflop_per_sample_published": round((flops + saved) / 1e9, 1) if saved else None,
        "gpu_hours": round(gpu_hours, 2),
        "gpu_hours_at": f"{ASSUMED_UTILISATION} of {ASSUMED_MATMUL_FLOPS / 1e12:.0f} TFLOP/s",
        "memory_gb": _memory_gb(config, stage, trained, frozen),
        "data": _data(config, snapshot, samples),
        "optim": config.optim.model_dump(mode="json"),
    }


def _counted(config: PretrainConfig) -> PretrainConfig:
    """Return a config as a run on a GPU reads it, without what needs the data or a tokenizer."""
    precision = "bf16" if config.performance.precision == "auto" else config.performance.precision
    changed: dict[str, Any] = {
        "performance": config.performance.model_copy(update={"precision": precision}),
        "optim": config.optim.model_copy(update={"epoch_steps": config.optim.epoch_steps or 1}),
    }
    if config.blip is not None:
        changed["blip"] = config.blip.model_copy(update={"prompt": ""})
    return config.model_copy(update=changed)


def _data(config: PretrainConfig, snapshot: Snapshot | None, samples: int) -> dict[str, Any]:
    if snapshot is None:
        return {"found": False, "paths": [corpus.path for corpus in config.data.corpus]}
    images = snapshot.num_images
    return {
        "found": True,
        "snapshot": snapshot.digest,
        "images": images,
        "held_out": snapshot.num_held_out,
        "shards": len(snapshot.shards),
        "epochs": round(samples / images, 2),
        "sources": {source.name: source.num_images for source in snapshot.sources},
    }


def _memory_gb(config: PretrainConfig, stage: Stage, trained: int, frozen: int) -> dict[str, float]:
    """Estimate the memory of one rank: its state, and what lives in a step, counted on tensors without data."""
    ranks = config.cluster.gpus or 1
    batch_size = config.optim.batch_size
    # Rank 0 has the most images.
    rows = rank_rows(batch_size, 0, ranks)
    rank_batch = rows.stop - rows.start
    micro_batch = min(config.performance.micro_batch_size or rank_batch, rank_batch)
    image_bytes = kept_bytes(stage)
    peak_bytes = step_bytes(stage, micro_batch, batch_size, is_one_of_many=micro_batch < rank_batch)
    memory = {
        "weights_and_optimizer": _state_bytes(config, stage, trained, frozen, ranks),
        "batch": rank_batch * image_bytes,
        "micro_batch": peak_bytes - trained * _GRADIENT_BYTES - micro_batch * image_bytes,
    }
    memory["total"] = sum(memory.values())
    return {name: round(value / 1e9, 1) for name, value in memory.items()}


def kept_bytes(stage: Stage) -> int:
    """Return the bytes kept on the device of each image of a rank, from its first micro-batch to its last."""
    if isinstance(stage, Stage1):
        vision = stage.visual_encoder
        return vision.num_tokens * vision.width * vision.dtype.itemsize
    # BLIP's pixels; stage 2 brings those of a micro-batch alone.
    return 3 * stage.config.data.image_size_px**2 if isinstance(stage, BlipStage) else 0


def _state_bytes(config: PretrainConfig, stage: Stage, trained: int, frozen: int, ranks: int) -> int:
    """Return the bytes of the weights, the gradients and the optimiser's moments."""
    state_bytes = trained * _TRAINED_BYTES
    if isinstance(stage, BlipStage):
        # Momentum encoders have fp32 weights.
        return (
            state_bytes
            + frozen * 4
            + 4 * sum(tensor.numel() for name, tensor in stage.named_buffers() if name.startswith("queue."))
        )
    if isinstance(stage, Stage2) and config.performance.shard_language:
        in_blocks = sum(p.numel() for block in stage.language.blocks for p in block.parameters())
        frozen -= in_blocks - in_blocks // ranks
    return state_bytes + frozen * _FROZEN_BYTES
