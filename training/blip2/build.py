"""Builds a stage of BLIP-2 from its config: with its frozen models on a device, or without any weights."""

import torch

from pipeline.models.device import compute_dtype
from pipeline.rng import seed_for
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from training.blip2.stage1 import Stage1
from training.blip2.stage2 import Stage2
from training.distributed import World
from training.models.language import empty_language
from training.models.language_on_ranks import load_on_ranks
from training.models.pretrained import tokenizer_folder
from training.models.tokenizer import CaptionTokenizer
from training.models.vision import empty_vision, load_vision


def build_blip2(config: PretrainConfig, world: World, device: torch.device) -> Stage1 | Stage2:
    """Load the frozen models of a stage; what is trained gets random values of ``run.seed``, the same on every rank.

    Sets torch's generators.

    Raises:
        CapfiltError: weights are missing, or do not fit the config.
    """
    dtype = compute_dtype(config.performance.precision, device)
    # A rank that cannot read it must not leave the others in a later collective.
    vision = world.all_or_raise(lambda: load_vision(config.vision, config.data.image_size_px, dtype))
    torch.manual_seed(seed_for("weights", config.run.seed))
    if config.language is None:
        folder = tokenizer_folder(config.qformer.tokenizer, "main", "qformer.tokenizer")
        stage: Stage1 | Stage2 = Stage1(
            config, vision, CaptionTokenizer(folder, config.qformer), world, dtype
        )
    else:
        language = load_on_ranks(
            config.language, world, device, shard=config.performance.shard_language and world.size > 1
        )
        stage = Stage2(config, vision, language, world, dtype)
    return stage.to(device)


def empty_blip2(config: PretrainConfig, world: World, device: torch.device) -> Stage1 | Stage2:
    """Build a stage without any file: with random weights on a device, or without data on ``meta``.

    Raises:
        CapfiltError: the config names a model that is neither known nor found.
    """
    dtype = compute_dtype(config.performance.precision, device)
    vision = empty_vision(config.vision, device, dtype)
    if vision.image_size_px != config.data.image_size_px:
        raise CapfiltError(
            f"vision.model = {config.vision.model!r} takes images of {vision.image_size_px} pixels; "
            f"set data.image_size_px = {vision.image_size_px}"
        )
    language = None if config.language is None else empty_language(config.language, device)
    with device:
        if language is None:
            return Stage1(config, vision, None, world, dtype)
        return Stage2(config, vision, language, world, dtype)
