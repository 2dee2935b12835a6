"""Builds the model of a run from its config: with its weights on a device, or without any for a plan."""

from collections.abc import Callable
from typing import Any

import torch

from schemas.pretrain import PretrainConfig
from training.blip.build import build_blip, empty_blip
from training.blip.stage import BlipStage
from training.blip2.build import build_blip2, empty_blip2
from training.blip2.stage1 import Stage1
from training.blip2.stage2 import Stage2
from training.distributed import World

Blip2Stage = Stage1 | Stage2
Stage = Blip2Stage | BlipStage


def build_stage(config: PretrainConfig, world: World, device: torch.device | str) -> Stage:
    """Build the model of a run, with its frozen models; what is trained gets random values of ``run.seed``.

    Sets torch's generators. The values are the same on every rank.

    Raises:
        CapfiltError: weights are missing, or do not fit the config.
    """
    device = torch.device(device)
    build = build_blip2 if config.blip is None else build_blip
    stage = build(config, world, device)
    if config.performance.compile and device.type == "cuda":
        compile_stage(stage)
    return stage.train()


def empty_stage(config: PretrainConfig, world: World, device: torch.device | str) -> Stage:
    """Build the model of a run without any file: with random weights on a device, or without data on ``meta``.

    Raises:
        CapfiltError: the config names a model that is neither known nor found.
    """
    build = empty_blip2 if config.blip is None else empty_blip
    return build(config, world, torch.device(device))


def meta_stage(config: PretrainConfig) -> Stage:
    """Build a stage without data, to count its parameters and operations."""
    return empty_stage(config, World("meta"), "meta")


def compile_stage(stage: Stage, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile a stage's blocks, each for the shapes it is called with; blocks of one class share the code.

    Those of a text model are called for queries, text, captions and pairs, with and without gradient, and not all
    attend to images: more versions of one function than torch keeps by default. The texts of a language model get one
    length, so that nothing is compiled after the first steps.

    Args:
        backend: of ``torch.compile``.
    """
    if isinstance(stage, Stage2):
        stage.language.pads_to_most = True
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for block in stage.blocks:
        block.compile(dynamic=False, backend=backend)
