"""BLIP's contrastive loss with soft targets, and its hard negatives (section 3.2; ALBEF, section 3.3).

BLIP computes both among the samples of one GPU. Here these are the samples of a group, and those of other groups are
masked, so that any rank can compute any row.

The legend of the names: B rows of the step's N samples, K embeddings of the queue, M = N + K candidates, C width.
"""

import torch
from torch import Tensor

from training.losses import MASKED_LOGIT, draw_columns, false_share

# What every negative's probability has at least (blip_pretrain.py).
_LEAST_WEIGHT = 1e-4


def soft_contrastive_loss(
    own_BC: Tensor,
    momentum_BC: Tensor,
    candidates_MC: Tensor,
    temperature: Tensor,
    same_BM: Tensor,
    apart_BM: Tensor,
    alpha: float,
) -> Tensor:
    """Return one direction of ITC, summed over the rows.

    Args:
        own_BC: embeddings of the rows, with gradient.
        momentum_BC: the momentum encoders' embeddings of the same samples.
        candidates_MC: what they are compared with: the momentum encoders' of the other modality, then the queue's.
        temperature: what similarities are divided by.
        same_BM: where a candidate belongs to the row's image.
        apart_BM: where a candidate is of another group, so that it is not one.
        alpha: the share of the targets that the momentum encoders give.
    """
    with torch.no_grad():
        momentum_logits_BM = _logits(momentum_BC, candidates_MC, temperature, apart_BM)
        targets_BM = soft_targets(momentum_logits_BM, same_BM, alpha)
    # -sum_m y(b, m) log softmax(s(b, m) / tau) (ALBEF, equation 7).
    logits_BM = _logits(own_BC, candidates_MC, temperature, apart_BM)
    return -(targets_BM * logits_BM.log_softmax(dim=1)).sum()


def soft_targets(momentum_logits_BM: Tensor, same_BM: Tensor, alpha: float) -> Tensor:
    """Return ITC's targets: alpha of the momentum encoders' distribution, the rest even over true pairs."""
    # y = alpha softmax(s_m / tau) + (1 - alpha) 1[same] / number of same (ALBEF, equation 6; BLIP, blip_retrieval.py).
    true_BM = same_BM.to(momentum_logits_BM.dtype)
    true_BM = true_BM / true_BM.sum(dim=1, keepdim=True)
    return alpha * momentum_logits_BM.softmax(dim=1) + (1 - alpha) * true_BM


def draw_negatives(
    own_NC: Tensor,
    momentum_NC: Tensor,
    temperature: Tensor,
    same_NN: Tensor,
    apart_NN: Tensor,
    uniforms_N: Tensor,
) -> tuple[Tensor, Tensor]:
    """Draw a negative for each sample with probability softmax(similarity / temperature) + 1e-4 among its group.

    Returns the drawn ones, as indices of N, and ``false_share`` of these draws.

    This is the rule of pretraining (blip_pretrain.py); a filter's is that of ``training.losses.draw_negatives``.

    Args:
        own_NC: embeddings of images or texts.
        momentum_NC: the momentum encoders' of the other modality, from which is drawn.
        temperature: of ITC.
        same_NN: True where row i and candidate j belong together, so that they are not negatives: at least i = j.
        apart_NN: True where they are of different groups.
        uniforms_N: a number of [0, 1) for each draw; the result depends on no other random number.
    """
    weights_NN = _logits(own_NC, momentum_NC, temperature, apart_NN).softmax(dim=1) + _LEAST_WEIGHT
    weights_NN = weights_NN.masked_fill(apart_NN, 0.0)
    drawn_N = draw_columns(weights_NN.masked_fill(same_NN, 0.0), uniforms_N)
    return drawn_N, false_share(weights_NN, same_NN)


def _logits(own_BC: Tensor, candidates_MC: Tensor, temperature: Tensor, apart_BM: Tensor) -> Tensor:
    return (own_BC @ candidates_MC.T / temperature).masked_fill(apart_BM, MASKED_LOGIT)
