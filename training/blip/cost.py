"""The floating-point operations of a step of BLIP, for one sample."""

import torch
from torch import Tensor

from training.blip.model import Med
from training.blip.momentum import Encoders
from training.models.flops import FORWARD, TRAINED, count_flops
from training.models.tokenizer import Texts

# ITM's pairs of an image, each of which BLIP's own code projects the image for.
_PAIRS = 3


def flops_per_sample(model: Med, momentum: Encoders | None) -> float:
    """Return the FLOP of one sample's step: what is trained, and the momentum encoders' forward pass."""
    forward = FORWARD * count_flops(lambda: _embed(model, momentum), model.device) if momentum else 0
    return forward + TRAINED * count_flops(lambda: _compute(model), model.device)


def flops_saved_per_sample(model: Med) -> float:
    """Return the FLOP that BLIP's own step has beyond: an image's keys and values projected for each pair."""
    here = model.encodes_text + model.decodes_text - (model.encodes_text and model.shares_projection)
    more = _PAIRS * model.encodes_text + model.decodes_text - here
    bert = model.text_encoder if model.encodes_text else model.text_decoder.bert
    num_tokens, width = model.visual_encoder.pos_embed.shape[1:]
    image_1PE = torch.empty(1, num_tokens, width, device=model.device, dtype=model.visual_encoder.dtype)
    return more and more * TRAINED * count_flops(lambda: bert.project_image(image_1PE), model.device)


def _sample(model: Med) -> tuple[Tensor, Texts]:
    """Return an image, and a text for each pair, of full length."""
    size = model.config.data.image_size_px
    pixels_1CHW = torch.empty(1, 3, size, size, dtype=torch.uint8, device=model.device)
    return pixels_1CHW, Texts.full(_PAIRS, model.shape.text.max_text_tokens, model.device)


def _embed(model: Med, encoders: Encoders) -> None:
    pixels_1CHW, texts = _sample(model)
    encoders.embed_images(encoders.visual_encoder(pixels_1CHW))
    encoders.embed_texts(texts.ids_BL[:1], texts.mask_BL[:1])


def _compute(model: Med) -> None:
    """Compute one sample without the losses: its text for ITC and LM, three pairs for ITM."""
    pixels_1CHW, texts = _sample(model)
    features_1PE = model.visual_encoder(pixels_1CHW)
    for_encoder, for_decoder = model.project(features_1PE)
    if model.encodes_text:
        model.encoders.embed_images(features_1PE)
        model.encoders.embed_texts(texts.ids_BL[:1], texts.mask_BL[:1])
        model.match(for_encoder, texts)
    if model.decodes_text:
        model.text_decoder.logits(model.text_decoder(texts.ids_BL[:1], for_decoder)[0, 1:])
