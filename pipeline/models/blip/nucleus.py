"""Nucleus sampling (Holtzman et al. 2020) as BLIP uses it: which tokens may follow, and which one is drawn.

The legend of the names: R rows of logits, S samples drawn from them, L tokens so far, V vocabulary, K tokens
that may be chosen.

The order is transformers': repetition penalty, minimum length, temperature, top-k, top-p. The token is the inverse
of the cumulative distribution *in vocabulary order* at a given uniform number: one number a step decides, and two
logits that swap places in a sort by rounding alone do not change the outcome. Nothing here copies a value to the
host, so that all of it can be captured in a CUDA graph.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from schemas.config import CaptionConfig

# The K largest values of a row lie in the K blocks with the largest maxima: two small top-k (over block maxima, over
# those blocks) replace one over 30,524 values, which takes several passes over memory.
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
        tokens_RL: the tokens so far, start and prompt included; as in BLIP, the penalty is on all of them.
            A token that occurs twice, as padding may, counts once.
        length: number of tokens so far; the end is excluded while it is under ``config.min_length``.
        end_id: the token that ends a caption.
        config: the sampling settings; none is read from the model's files.
    """
    if config.repetition_penalty != 1:
        # CTRL (Keskar et al. 2019, section 4.1): the logit x of a token that occurred becomes x / penalty, and
        # x * penalty where it is negative, as in transformers: smaller in both cases.
        used_RL = logits_RV.gather(1, tokens_RL)
        penalised_RL = torch.where(
            used_RL < 0, used_RL * config.repetition_penalty, used_RL / config.repetition_penalty
        )
        logits_RV.scatter_(1, tokens_RL, penalised_RL)
    if length < config.min_length:
        logits_RV[:, end_id] = -torch.inf
    # top-k before the temperature, which does not change the order: the nucleus of 50 values needs no sort of 30,524.
    logits_RK, ids_RK = _largest(logits_RV, min(config.top_k or logits_RV.shape[1], logits_RV.shape[1]))
    # p_i = exp(x_i / temperature) / sum_j exp(x_j / temperature), in descending order.
    probabilities_RK = (logits_RK / config.temperature).double().softmax(-1)
    # The nucleus is the smallest set of likeliest tokens with a mass of at least top_p: a token is in it while the
    # likelier ones hold less than top_p. The likeliest always is.
    before_RK = probabilities_RK.cumsum(-1) - probabilities_RK
    probabilities_RK = probabilities_RK.masked_fill(before_RK >= config.top_p, 0)
    # Cumulative distribution in vocabulary order; not divided by its total, which ``draw`` does.
    ids_RK, order_RK = ids_RK.sort(-1)
    return Nucleus(ids_RK, probabilities_RK.gather(1, order_RK).cumsum(-1))


def draw(nucleus: Nucleus, uniforms_S: Tensor) -> Tensor:
    """Return the token that each uniform number (float64 in [0, 1)) picks from its row: int64 of shape (S,)."""
    total_S1 = nucleus.mass_RK[:, -1:]
    # u * total < total, also after rounding: the largest double below the total bounds it, so that the index below
    # stays in range and a token of no mass is never drawn.
    target_S1 = torch.minimum(uniforms_S[:, None] * total_S1, total_S1.nextafter(torch.zeros_like(total_S1)))
    # Inverse transform sampling: the first token whose cumulative mass exceeds the target.
    return nucleus.ids_RK.gather(1, (nucleus.mass_RK <= target_S1).sum(-1, keepdim=True))[:, 0]


def is_finite(nucleus: Nucleus) -> Tensor:
    """Tell for each row whether its logits were finite: NaN or infinity among them makes all of its mass NaN."""
    return nucleus.mass_RK[:, -1].isfinite()


def _largest(logits_RV: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """Return the largest logits of each row in descending order, and where they are."""
    if not logits_RV.is_cuda or logits_RV.shape[1] // _BLOCK <= 2 * num_kept:
        return logits_RV.topk(num_kept)
    return largest_by_blocks(logits_RV, num_kept)


def largest_by_blocks(logits_RV: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """Return what ``topk`` does, for rows of at least ``num_kept`` blocks; equal values may be ordered otherwise."""
    rows, vocabulary = logits_RV.shape
    whole = vocabulary // _BLOCK
    # G blocks of E values; the values behind the last whole block are always candidates.
    blocks_RGE = logits_RV[:, : whole * _BLOCK].unflatten(1, (whole, _BLOCK))
    chosen_RK = blocks_RGE.amax(-1).topk(num_kept, sorted=False).indices
    ids_RC = (chosen_RK[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=logits_RV.device)).flatten(1)
    rest_Q = torch.arange(whole * _BLOCK, vocabulary, device=logits_RV.device)
    ids_RC = torch.cat([ids_RC, rest_Q.expand(rows, -1)], dim=1)
    logits_RK, place_RK = logits_RV.gather(1, ids_RC).topk(num_kept)
    return logits_RK, ids_RC.gather(1, place_RK)
