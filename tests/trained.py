"""Tiny models as if they had been trained: no weight at its first value, large enough for every input to matter."""

from pathlib import Path
from typing import Any

import torch
from tiny_eva import save_eva
from tiny_training import tiny_config
from torch import Tensor
from transformers import OPTForCausalLM, T5ForConditionalGeneration

from schemas.pretrain import PretrainConfig
from training.blip2.stage1 import Stage1
from training.blip2.stage2 import Stage2
from training.build import build_stage
from training.distributed import World
from training.trainer.base_models import begin_training, read_initial_weights

# Rows of the language models' embeddings: their words, and room for Hugging Face's image token.
EMBEDDINGS = 64


def begun_stage(config: PretrainConfig, world: World | None = None) -> Stage1 | Stage2:
    """Return a stage on the CPU as a run begins with it."""
    world = world or World()
    stage = build_stage(config, world, "cpu")
    begin_training(stage, read_initial_weights(config), world)
    return stage


def trained_config(
    folder: Path, stage: int = 1, *, eva: bool = False, family: str = "opt", **sections: Any
) -> PretrainConfig:
    """Return the config of a tiny model on a CLIP ViT, or on EVA's."""
    if eva:
        if not (folder / "eva").is_dir():
            save_eva(folder / "eva")
        sections["vision"] = {"model": f"local-dir:{folder / 'eva'}"}
    if stage == 2:
        sections["language"] = {"family": family, **sections.get("language", {})}
    return tiny_config(folder, folder / "corpus", stage=stage, **sections)


def trained_stage(folder: Path, stage: int = 1, **options: Any) -> Stage1 | Stage2:
    """Return such a model, the same each time; ``options``: of ``trained_config``."""
    config = trained_config(folder, stage, **options)
    if config.language is not None:
        _make_room(Path(config.language.model), config.language.family)
    model = begun_stage(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.trainable_named_parameters():
            if name != "temp":
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * (0.3 if parameter.ndim > 1 else 0.1))
    return model


def pictures(number: int, size_px: int = 32) -> Tensor:
    """Return uint8 images unlike each other."""
    generator = torch.Generator().manual_seed(11)
    coarse = torch.randint(0, 256, (number, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return coarse.repeat_interleave(size_px // 4, dim=2).repeat_interleave(size_px // 4, dim=3)


def _make_room(folder: Path, family: str) -> None:
    """Add rows that no word has, as the published models have, and make the model care for what it reads."""
    model = (OPTForCausalLM if family == "opt" else T5ForConditionalGeneration).from_pretrained(folder)
    words = model.get_input_embeddings().num_embeddings
    if words == EMBEDDINGS:
        return
    torch.manual_seed(3)
    model.resize_token_embeddings(EMBEDDINGS, mean_resizing=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        # Such a row is never the likeliest.
        for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
            embeddings.weight[words:] = 0
    model.save_pretrained(folder)
