"""The memory that a plan counts for a step is what a step takes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import tiny_blip_config, tiny_config
from torch.profiler import ProfilerActivity, profile
from trained import begun_stage, pictures

from schemas.pretrain import PretrainConfig
from tests.test_blip_model import spread_stage
from training.build import meta_stage
from training.models.micro_batches import SampleKeys
from training.models.tokenizer import Texts
from training.trainer.estimate import kept_bytes
from training.trainer.steps.memory import example_target, step_bytes
from training.trainer.steps.optim import fill_preset

pytestmark = pytest.mark.training

IMAGES, MICRO_BATCH = 48, 24


def config_of(folder: Path, method: str) -> PretrainConfig:
    """Return a run without dropout, with which a CPU keeps a matrix of scores, where a GPU does not."""
    optim = {"batch_size": IMAGES, "epoch_steps": 10}
    if method.startswith("blip"):
        blip = {"queue_size": IMAGES, "negatives_of": 0}
        config = tiny_blip_config(folder, folder, method, optim=optim, blip=blip)
        text = config.blip.text.model_copy(update={"dropout": 0.0, "width": 128, "ffn_width": 512})
        changes: dict[str, Any] = {"text": text}
        return fill_preset(
            config.model_copy(update={"blip": config.blip.model_copy(update=changes)}), IMAGES * 10
        )
    qformer = {"dropout": 0.0, "width": 128, "ffn_width": 512, "weights": ""}
    stage, _, family = method.partition(" ")
    language = {"language": {"family": family}} if family else {}
    return tiny_config(folder, folder, int(stage), qformer=qformer, optim={"batch_size": IMAGES}, **language)


def measured_bytes(config: PretrainConfig, micro_batch: int) -> int:
    """Return the most bytes that torch's allocator held at once in a step on the CPU, beyond those before it."""
    stage = spread_stage(config) if config.blip is not None else begun_stage(config)
    stage.train()
    pixels_BCHW = pictures(IMAGES)
    if config.language is not None:
        parts = range(0, IMAGES, micro_batch)
        targets = [example_target(stage, micro_batch) for _ in parts]
        pixels = [pixels_BCHW[start : start + micro_batch] for start in parts]

        def step() -> None:
            stage.step(pixels, targets, IMAGES)
    else:
        length = (config.blip.text if config.blip is not None else config.qformer).max_text_tokens
        ids_BL = torch.randint(5, 20, (IMAGES, length), generator=torch.Generator().manual_seed(0))
        texts = Texts(ids_BL=ids_BL, mask_BL=torch.ones_like(ids_BL, dtype=torch.bool))
        names = [str(number) for number in range(IMAGES)]
        keys = SampleKeys.of(names, range(IMAGES), names, [[name] for name in names], ids_BL)

        def step() -> None:
            stage.step(pixels_BCHW, texts, keys, IMAGES, micro_batch)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    live = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("method", ["1", "2 opt", "2 t5", "blip-pretrain", "blip-captioner", "blip-filter"])
def test_what_is_counted_is_what_a_step_takes(tmp_path: Path, method: str) -> None:
    config = config_of(tmp_path, method)
    for micro_batch in (IMAGES, MICRO_BATCH):
        measured = measured_bytes(config, micro_batch)
        stage = meta_stage(config)
        counted = step_bytes(stage, micro_batch, IMAGES, is_one_of_many=micro_batch < IMAGES)
        counted += (IMAGES - micro_batch) * kept_bytes(stage)
        assert counted == pytest.approx(measured, rel=0.1), micro_batch


def test_a_step_counts_the_whole_batch_of_the_ranks(tmp_path: Path) -> None:
    config = config_of(tmp_path, "1")
    alone, among_many = (
        step_bytes(meta_stage(config), MICRO_BATCH, size, is_one_of_many=False)
        for size in (MICRO_BATCH, 1000)
    )
    # The embeddings of all images, (N, Q, C) in float32, at the least.
    shape = config.qformer
    assert among_many - alone > (1000 - MICRO_BATCH) * shape.num_queries * shape.projection_width * 4
