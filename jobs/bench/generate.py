"""BLIP's decoder both ways, with the same knobs: this project's engine, and transformers' ``generate``."""

import torch
from torch import Tensor
from transformers import BlipForConditionalGeneration

from pipeline.models.blip.decoder import Decoder
from pipeline.models.blip.generation import GridSampler, RowSampler
from pipeline.rng import caption_seeds, uniforms
from schemas.config import CaptionConfig


def prompt_ids(model: BlipForConditionalGeneration) -> list[int]:
    """Return the tokens that all captions begin with: the start alone."""
    return [model.config.text_config.bos_token_id]


def uniform_numbers(images: int, config: CaptionConfig) -> Tensor:
    """Return the numbers that decide the captions of so many images: float64 (B, N, T)."""
    seeds_BN = caption_seeds(0, [str(index) for index in range(images)], config.num_captions)
    return torch.from_numpy(uniforms(seeds_BN, config.max_length - 1))


def engine(
    model: BlipForConditionalGeneration, config: CaptionConfig, images: int
) -> RowSampler | GridSampler:
    """Return the engine as the Captioner builds it on this device."""
    on_gpu = model.device.type == "cuda"
    decoder = Decoder(model.text_decoder, compiled=on_gpu).eval()
    if on_gpu:
        return GridSampler(decoder, prompt_ids(model), config, images)
    return RowSampler(decoder, prompt_ids(model), config)


@torch.inference_mode()
def generate(model: BlipForConditionalGeneration, features_BPE: Tensor, config: CaptionConfig) -> Tensor:
    """Sample with transformers, in the way its ``generate`` of the whole model calls the decoder."""
    return model.text_decoder.generate(
        input_ids=torch.tensor(prompt_ids(model), device=model.device).expand(len(features_BPE), -1),
        encoder_hidden_states=features_BPE,
        encoder_attention_mask=torch.ones(features_BPE.shape[:2], dtype=torch.long, device=model.device),
        do_sample=True,
        num_return_sequences=config.num_captions,
        top_k=config.top_k,
        top_p=config.top_p,
        repetition_penalty=config.repetition_penalty,
        min_length=config.min_length,
        max_length=config.max_length,
        eos_token_id=model.config.text_config.sep_token_id,
        pad_token_id=model.config.text_config.pad_token_id,
    )
