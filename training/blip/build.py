"""Builds a model of BLIP from its config, and gives it the weights that it begins with."""

import torch

from pipeline.models.device import compute_dtype
from pipeline.rng import seed_for
from schemas.pretrain import PretrainConfig
from training.blip.stage import BlipStage
from training.distributed import World
from training.models.pretrained import tokenizer_folder
from training.models.tokenizer import CaptionTokenizer


def build_blip(config: PretrainConfig, world: World, device: torch.device) -> BlipStage:
    """Build a model with its tokenizer and random weights of ``run.seed``, the same on every rank.

    Sets torch's generators.

    Raises:
        CapfiltError: there is no such tokenizer, or it does not fit the config.
    """
    assert config.blip is not None, "a model of BLIP has [blip]"
    text = config.blip.text
    folder = tokenizer_folder(text.tokenizer, "main", "blip.text.tokenizer")
    num_added = 1 if config.run.stage == "blip-captioner" else 2
    tokenizer = CaptionTokenizer(folder, text, "blip.text", num_added, exact=False)
    torch.manual_seed(seed_for("weights", config.run.seed))
    return BlipStage(config, tokenizer, world, compute_dtype(config.performance.precision, device)).to(device)


def empty_blip(config: PretrainConfig, world: World, device: torch.device) -> BlipStage:
    """Build a model without any file: with random weights on a device, or without data on ``meta``."""
    with device:
        return BlipStage(config, None, world, compute_dtype(config.performance.precision, device))
