"""The estimate of a run: parameters, data, steps, cost and memory, computed from shapes without weights."""

from typing import Any

from pipeline.storage.storage import Storage
from schemas.pretrain import PretrainConfig
from training.blip.cost import activation_bytes_per_sample, flops_saved_per_sample
from training.blip.stage import BlipStage
from training.blip2.stage1 import Stage1
from training.build import Blip2Stage, Stage, meta_stage
from training.data.snapshot import Snapshot, take_snapshot
from training.distributed import rank_rows
from training.models.flops import ACTIVATION_BYTES
from training.trainer.optim import fill_preset

# The rate that an estimate assumes: half of what an H200 reaches in a large bf16 matrix product.
ASSUMED_MATMUL_FLOPS = 790e12
ASSUMED_UTILISATION = 0.5

# fp32 master, gradient and AdamW's two moments; and the bf16 copy for matrix products.
_TRAINED_BYTES = 4 + 4 + 8 + 2
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
    stage = meta_stage(config)
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
    """Estimate the memory of one rank from counted elements, without the kernels' own buffers."""
    ranks = config.cluster.gpus or 1
    # Rank 0 has the most images.
    rows = rank_rows(config.optim.batch_size, 0, ranks)
    rank_batch = rows.stop - rows.start
    # Kept of each image of a rank's batch: its pixels and, in stage 1, its bf16 features.
    image_bytes = 3 * config.data.image_size_px**2
    state_bytes = trained * _TRAINED_BYTES
    if isinstance(stage, BlipStage):
        activation_bytes = activation_bytes_per_sample(stage)
        # Momentum encoders have fp32 masters, of which a bf16 copy is made.
        state_bytes += frozen * (4 + _FROZEN_BYTES) + 4 * sum(
            tensor.numel() for name, tensor in stage.named_buffers() if name.startswith("queue.")
        )
    else:
        stored_bytes, activation_bytes, frozen = _blip2_bytes(config, stage, frozen, ranks)
        image_bytes += stored_bytes
        state_bytes += frozen * _FROZEN_BYTES
    memory = {
        "weights_and_optimizer": state_bytes,
        "batch": rank_batch * image_bytes,
        "micro_batch": min(config.performance.micro_batch_size or rank_batch, rank_batch) * activation_bytes,
    }
    memory["total"] = sum(memory.values())
    return {name: round(value / 1e9, 1) for name, value in memory.items()}


def _blip2_bytes(config: PretrainConfig, stage: Blip2Stage, frozen: int, ranks: int) -> tuple[int, int, int]:
    """Return the bytes stored of an image, those of its activations, and the frozen parameters of a rank."""
    shape, vision = config.qformer, stage.visual_encoder
    queries, texts = shape.num_queries, shape.max_text_tokens
    # Kept of each image of a micro-batch from the forward to the backward pass, by the Q-Former's layers.
    token_bytes = shape.width * shape.layers * ACTIVATION_BYTES
    if isinstance(stage, Stage1):
        stored_bytes = vision.num_tokens * vision.width * 2
        # ITC's queries and text, three pairs for ITM, and ITG's text.
        activation_bytes = (queries + texts + 3 * (queries + texts) + texts) * token_bytes
    else:
        stored_bytes = 0
        language = stage.language
        if config.performance.shard_language:
            in_blocks = sum(p.numel() for block in language.blocks for p in block.parameters())
            frozen -= in_blocks - in_blocks // ranks
        activation_bytes = queries * token_bytes
        token_bytes = language.model.config.hidden_size * len(language.blocks) * ACTIVATION_BYTES
        activation_bytes += (queries + texts) * token_bytes
    return stored_bytes, activation_bytes, frozen
