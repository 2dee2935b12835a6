"""What each rank knows of a whole step of BLIP: momentum embeddings, ids of images, hard negatives and alpha.

ITC and ITM compare within groups of ``blip.negatives_of`` samples that follow each other in the step.

The legend of the names: N images of the step over all ranks, and as many texts; B of a micro-batch, C the width of the
contrastive embeddings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from schemas.pretrain import BlipConfig, PretrainConfig
from training.blip.losses import draw_negatives
from training.blip.model import Med
from training.losses import draw_negatives as draw_online_negatives
from training.models.micro_batches import (
    Negatives,
    SampleKeys,
    belonging,
    negative_uniforms,
    same_on_all_ranks,
)
from training.models.tokenizer import Texts

# Embeddings of a micro-batch's images and of its texts, each (B, C).
Embeddings = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalBatch:
    """What each rank knows of the whole step: momentum embeddings, ids and negatives. None of it has a gradient."""

    image_NC: Tensor
    text_NC: Tensor
    id_N: Tensor
    negatives: Negatives
    alpha: float


@torch.no_grad()
def gather_step(
    model: Med,
    online: Sequence[Embeddings],
    momentum: Sequence[Embeddings],
    texts: Texts,
    keys: SampleKeys,
    position: int,
    counts: Sequence[int],
) -> GlobalBatch:
    """Gather the step from all ranks, and draw its negatives, the same on every rank.

    Args:
        model: whose temperature and ranks these are.
        online: embeddings of each micro-batch of this rank.
        momentum: the momentum encoders' of the same micro-batches.
        texts: of this rank.
        keys: of this rank's samples.
        position: samples that the run has consumed after this step.
        counts: images of each rank.
    """
    gather, device, seed = partial(model.world.all_gather, counts=counts), model.device, model.config.run.seed
    image_NC, text_NC = (gather(torch.cat(parts_BC)) for parts_BC in zip(*online, strict=True))
    momentum_image_NC, momentum_text_NC = (
        gather(torch.cat(parts_BC)) for parts_BC in zip(*momentum, strict=True)
    )
    id_N = gather(keys.uid_B.to(device))
    all_texts = Texts(ids_BL=gather(texts.ids_BL.to(device)), mask_BL=gather(texts.mask_BL.to(device)))
    # An image's other texts, and texts equal to its own, are not negatives.
    same_NN = belonging(keys, gather, device)
    uniforms_2N = negative_uniforms(seed, position, len(id_N)).to(device)
    apart_NN = other_groups(model.shape, 0, len(id_N), id_N)
    if model.decodes_text:
        texts_N, texts_share = draw_negatives(
            image_NC, momentum_text_NC, model.temp, same_NN, apart_NN, uniforms_2N[0]
        )
        images_N, images_share = draw_negatives(
            text_NC, momentum_image_NC, model.temp, same_NN.T, apart_NN, uniforms_2N[1]
        )
        drawn = texts_N, images_N, (texts_share + images_share) / 2
    else:
        # A filter's negatives come from the online encoders alone, without a least weight (blip_retrieval.py), as in
        # stage 1 of BLIP-2, where an image has several embeddings: here it has one.
        drawn = draw_online_negatives(image_NC[:, None], text_NC, model.temp, same_NN, uniforms_2N, apart_NN)
    return GlobalBatch(
        image_NC=momentum_image_NC,
        text_NC=momentum_text_NC,
        id_N=id_N,
        negatives=same_on_all_ranks(all_texts, drawn, model.world),
        alpha=alpha_at(model.config, model.shape, position),
    )


def other_groups(shape: BlipConfig, first: int, size: int, samples_N: Tensor) -> Tensor:
    """Return where samples ``first`` and following of the step are in another group than each sample: (B, N)."""
    num_samples = len(samples_N)
    group_N = torch.arange(num_samples, device=samples_N.device) // (shape.negatives_of or num_samples)
    return group_N[first : first + size, None] != group_N


def alpha_at(config: PretrainConfig, shape: BlipConfig, position: int) -> float:
    """Return alpha in the step that ends at ``position``: it rises from 0 over the first ``alpha_epochs``."""
    optim = config.optim
    assert optim.epoch_steps is not None, "a preset did not fill optim.epoch_steps"
    ramp_steps = shape.alpha_epochs * optim.epoch_steps
    steps_before = position // optim.batch_size - 1
    return shape.alpha * (min(1.0, steps_before / ramp_steps) if ramp_steps else 1.0)
