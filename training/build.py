"""Builds the model of a run from its config: with its weights on a device, or without any for a plan."""

from collections.abc import Callable
from typing import Any

import torch

from pipeline.models.device import compute_dtype
from pipeline.rng import seed_for
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from training.blip.stage import BlipStage
from training.blip2.stage1 import Stage1
from training.blip2.stage2 import Stage2
from training.distributed import World
from training.models.language import empty_language
from training.models.language_on_ranks import load_on_ranks
from training.models.pretrained import tokenizer_folder
from training.models.tokenizer import CaptionTokenizer
from training.models.vision import empty_vision, load_vision

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


def build_blip(config: PretrainConfig, world: World, device: torch.device) -> BlipStage:
    """Build a model of BLIP with its tokenizer and random weights; as ``build_stage``."""
    assert config.blip is not None, "a model of BLIP has [blip]"
    text = config.blip.text
    folder = tokenizer_folder(text.tokenizer, "main", "blip.text.tokenizer")
    num_added = 1 if config.run.stage == "blip-captioner" else 2
    tokenizer = CaptionTokenizer(folder, text, "blip.text", num_added, exact=False)
    torch.manual_seed(seed_for("weights", config.run.seed))
    return BlipStage(config, tokenizer, world, compute_dtype(config.performance.precision, device)).to(device)


def build_blip2(config: PretrainConfig, world: World, device: torch.device) -> Blip2Stage:
    """Load the frozen models of a stage of BLIP-2, and build what is trained; as ``build_stage``."""
    dtype = compute_dtype(config.performance.precision, device)
    # A rank that cannot read it must not leave the others in a later collective.
    vision = world.all_or_raise(lambda: load_vision(config.vision, config.data.image_size_px, dtype))
    torch.manual_seed(seed_for("weights", config.run.seed))
    if config.language is None:
        folder = tokenizer_folder(config.qformer.tokenizer, "main", "qformer.tokenizer")
        stage: Blip2Stage = Stage1(config, vision, CaptionTokenizer(folder, config.qformer), world)
    else:
        language = load_on_ranks(
            config.language, world, device, shard=config.performance.shard_language and world.size > 1
        )
        stage = Stage2(config, vision, language, world)
    return stage.to(device)


def empty_stage(config: PretrainConfig, world: World, device: torch.device | str) -> Stage:
    """Build the model of a run without any file: with random weights on a device, or without data on ``meta``.

    Raises:
        CapfiltError: the config names a model that is neither known nor found.
    """
    device = torch.device(device)
    if config.blip is None:
        return empty_blip2(config, world, device)
    with device:
        return BlipStage(config, None, world, compute_dtype(config.performance.precision, device))


def empty_blip2(config: PretrainConfig, world: World, device: torch.device) -> Blip2Stage:
    """Build a stage of BLIP-2 as ``empty_stage``."""
    vision = empty_vision(config.vision, device, compute_dtype(config.performance.precision, device))
    if vision.image_size_px != config.data.image_size_px:
        raise CapfiltError(
            f"vision.model = {config.vision.model!r} takes images of {vision.image_size_px} pixels; "
            f"set data.image_size_px = {vision.image_size_px}"
        )
    language = None if config.language is None else empty_language(config.language, device)
    with device:
        if language is None:
            return Stage1(config, vision, None, world)
        return Stage2(config, vision, language, world)


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
