"""Nucleus sampling as BLIP does it: which tokens may follow, and which of them a uniform number picks.

The legend of the names: R rows of logits, S samples drawn from them, L tokens so far, V vocabulary, K tokens
that may be chosen.

The order is transformers': repetition penalty, minimum length, temperature, top-k, top-p. The choice among
what is left is the inverse of the cumulative distribution *in vocabulary order* at a given uniform number, so
that one number a step decides, and two logits that swap places in a sort by rounding alone do not change the
outcome. Nothing here asks the device for a value, so that all of it can be captured in a CUDA graph.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from schemas.config import CaptionConfig

# A row's largest K values lie in the K blocks with the largest maxima: two small selections instead of one
# over 30,524 values, which takes several passes.
_BLOCK = 128


class Nucleus(NamedTuple):
    """The tokens that may follow each row, in vocabulary order, and their running probability mass.

    ``ids_RK`` int64; ``mass_RK`` float64, not decreasing; a token of no mass has the value before it.
    """

    ids_RK: Tensor
    mass_RK: Tensor


def nucleus(logits_RV: Tensor, tokens_RL: Tensor, length: int, end_id: int, config: CaptionConfig) -> Nucleus:
    """Return what may follow each row.

    Args:
        logits_RV: float32, of the next token; changed in place.
        tokens_RL: what was said so far, start and prompt included; as in BLIP, the penalty is on all of it.
            A token that is there twice, as padding may be, counts once.
        length: tokens said; before ``config.min_length`` of them, the end may not come.
        end_id: the token that ends a caption.
        config: every knob is read from here, none from the model's files.
    """
    if config.repetition_penalty != 1:
        said_RL = logits_RV.gather(1, tokens_RL)
        penalised_RL = torch.where(
            said_RL < 0, said_RL * config.repetition_penalty, said_RL / config.repetition_penalty
        )
        logits_RV.scatter_(1, tokens_RL, penalised_RL)
    if length < config.min_length:
        logits_RV[:, end_id] = -torch.inf
    # top-k first: the nucleus of 50 values needs no sort of 30,524. The temperature does not change the order.
    logits_RK, ids_RK = _largest(logits_RV, min(config.top_k or logits_RV.shape[1], logits_RV.shape[1]))
    probabilities_RK = (logits_RK / config.temperature).double().softmax(-1)
    # A token stays while those before it, likelier ones, hold less than top_p: the first always does.
    before_RK = probabilities_RK.cumsum(-1) - probabilities_RK
    probabilities_RK = probabilities_RK.masked_fill(before_RK >= config.top_p, 0)
    ids_RK, order_RK = ids_RK.sort(-1)
    return Nucleus(ids_RK, probabilities_RK.gather(1, order_RK).cumsum(-1))


def draw(nucleus: Nucleus, uniforms_S: Tensor) -> Tensor:
    """Return the token that each uniform number (float64 in [0, 1)) picks from its row: int64 of shape (S,)."""
    total_S1 = nucleus.mass_RK[:, -1:]
    # Under the total even after rounding, so that a token of no mass is never reached.
    target_S1 = torch.minimum(uniforms_S[:, None] * total_S1, total_S1.nextafter(torch.zeros_like(total_S1)))
    return nucleus.ids_RK.gather(1, (nucleus.mass_RK <= target_S1).sum(-1, keepdim=True))[:, 0]


def is_finite(nucleus: Nucleus) -> Tensor:
    """Tell for each row whether its logits were finite: NaN or infinity among them makes all of its mass NaN."""
    return nucleus.mass_RK[:, -1].isfinite()


def _largest(logits_RV: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """Return the largest logits of each row in descending order, and where they are."""
    rows, vocabulary = logits_RV.shape
    whole = vocabulary // _BLOCK
    if not logits_RV.is_cuda or whole <= 2 * num_kept:
        return logits_RV.topk(num_kept)
    blocks_RGE = logits_RV[:, : whole * _BLOCK].unflatten(1, (whole, _BLOCK))
    chosen_RK = blocks_RGE.amax(-1).topk(num_kept, sorted=False).indices
    ids_RC = (chosen_RK[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=logits_RV.device)).flatten(1)
    rest_Q = torch.arange(whole * _BLOCK, vocabulary, device=logits_RV.device)
    ids_RC = torch.cat([ids_RC, rest_Q.expand(rows, -1)], dim=1)
    logits_RK, place_RK = logits_RV.gather(1, ids_RC).topk(num_kept)
    return logits_RK, ids_RC.gather(1, place_RK)
