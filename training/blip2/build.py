"""Builds a stage of BLIP-2 from its config: with its frozen models on a device, or without any weights."""

import torch
from torch.distributed.fsdp import fully_shard

from pipeline.models.device import compute_dtype
from pipeline.rng import seed_for
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from training.blip2.stage1 import Stage1
from training.blip2.stage2 import Stage2
from training.distributed import World
from training.models.language import DecoderOnly, EncoderDecoder, empty_language, load_language
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
    vision = load_vision(config.vision, config.data.image_size_px, dtype)
    torch.manual_seed(seed_for("weights", config.run.seed))
    if config.language is None:
        folder = tokenizer_folder(config.qformer.tokenizer, "main", "qformer.tokenizer")
        stage: Stage1 | Stage2 = Stage1(
            config, vision, CaptionTokenizer(folder, config.qformer), world, dtype
        )
    else:
        stage = Stage2(config, vision, load_language(config.language), world, dtype)
    if config.language is not None and config.performance.shard_language and world.size > 1:
        shard_language(stage.language)
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


def shard_language(language: DecoderOnly | EncoderDecoder) -> None:
    """Shard a frozen language model's blocks over all ranks (FSDP2); each is gathered while it computes.

    Embeddings and output head are used outside the blocks' own calls, so what is not in a block is not sharded.
    """
    blocks = language.blocks
    in_blocks = {parameter for block in blocks for parameter in block.parameters()}
    for block in blocks:
        fully_shard(block)
    for root in language.roots:
        whole = {parameter for parameter in root.parameters() if parameter not in in_blocks}
        fully_shard(root, ignored_params=whole)
    language.is_sharded = True
