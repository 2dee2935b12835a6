"""The three losses of stage 1 (BLIP-2, section 3.2; lavis/models/blip2_models/blip2_qformer.py), and their negatives.

Each loss is a *sum* over some rows, which the caller divides by what the whole step has: shares of a batch, over
micro-batches and ranks, then add up to the batch's mean loss and gradient.

The legend of the names: N images of the step over all ranks, and as many texts; B rows of them; Q queries, C width of
the contrastive embeddings; L text tokens, T of them to be predicted, V words, D the Q-Former's width.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# What the cross-entropy passes over.
IGNORED = -100

# Rows of logits in memory at once: of 30,523 words in float32, 250 MB.
_ROWS_OF_LOGITS = 2048
# Images compared with all texts at once, for the negatives.
_ROWS_OF_SIMILARITIES = 256
# LAVIS's: as good as never drawn, unless there is nothing else.
_NEVER = -1e4


def similarities(image_BQC: Tensor, text_NC: Tensor) -> Tensor:
    """Return the cosine similarity of each image's best query with each text: (B, N)."""
    return torch.einsum("bqc,nc->bqn", image_BQC, text_NC).amax(dim=1)


def contrastive_loss(
    image_BQC: Tensor,
    text_BC: Tensor,
    all_image_NQC: Tensor,
    all_text_NC: Tensor,
    temperature: Tensor,
    own_B: Tensor,
    smoothing: float,
) -> Tensor:
    """Return ITC summed over some rows, the mean of both directions.

    Args:
        image_BQC, text_BC: the rows, with gradient.
        all_image_NQC, all_text_NC: what they are compared with. Without gradient, as in LAVIS: images learn from
            image-to-text, texts from text-to-image.
        own_B: each row's own index in N.
        smoothing: of the labels.
    """
    to_text_BN = similarities(image_BQC, all_text_NC) / temperature
    to_image_BN = torch.einsum("bc,nqc->bnq", text_BC, all_image_NQC).amax(dim=2) / temperature
    return sum(
        F.cross_entropy(logits_BN, own_B, label_smoothing=smoothing, reduction="sum")
        for logits_BN in (to_text_BN, to_image_BN)
    ).div(2)


@torch.no_grad()
def draw_negatives(
    all_image_NQC: Tensor, all_text_NC: Tensor, temperature: Tensor, same_NN: Tensor, uniforms_2N: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw hard negatives of the whole step, the more similar the more likely.

    Args:
        same_NN: True where image i and text j belong together, and are no negatives: at least i = j.
        uniforms_2N: a number of [0, 1) for each draw; the result depends on nothing else that is random.

    Returns:
        A text for each image and an image for each text, as indices of N.
    """
    similarity_NN = torch.cat(
        [similarities(rows, all_text_NC) for rows in all_image_NQC.split(_ROWS_OF_SIMILARITIES)]
    )
    logits_NN = (similarity_NN / temperature).masked_fill(same_NN, _NEVER)
    return _draw(logits_NN, uniforms_2N[0]), _draw(logits_NN.T, uniforms_2N[1])


def _draw(logits_NN: Tensor, uniforms_N: Tensor) -> Tensor:
    """Draw one column a row by inverting the distribution function, which is the same on every device."""
    cumulative_NN = logits_NN.softmax(dim=1).double().cumsum(dim=1)
    target_N1 = uniforms_N.to(cumulative_NN)[:, None] * cumulative_NN[:, -1:]
    return torch.searchsorted(cumulative_NN, target_N1, right=True)[:, 0].clamp(max=len(logits_NN) - 1)


def matching_loss(logits_BQ2: Tensor, labels_B: Tensor, weights_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return ITM summed over some pairs, and how many were judged rightly.

    Args:
        logits_BQ2: of each query; a pair's are their mean.
        labels_B: 1 where image and text belong together.
        weights_B: 0 for rows that only fill up the batch, else 1.
    """
    logits_B2 = logits_BQ2.mean(dim=1)
    loss_B = F.cross_entropy(logits_B2, labels_B, reduction="none")
    right_B = logits_B2.detach().argmax(dim=1) == labels_B
    return (loss_B * weights_B).sum(), (right_B * weights_B).sum()


def next_words(ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Return what each token has to predict: the next one, its end included; ``IGNORED`` where none follows."""
    following_BL = ids_BL.masked_fill(~mask_BL, IGNORED).roll(-1, dims=1)
    following_BL[:, -1] = IGNORED
    return following_BL


def captioning_loss(
    logits_of: Callable[[Tensor], Tensor], hidden_TD: Tensor, words_T: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Return the smoothed cross-entropy of the next words, summed over tokens.

    The logits are computed a part at a time, and again for the gradient: whole, they would be the largest tensor of
    the step.

    Args:
        logits_of: the model's head.
        hidden_TD: of the tokens that predict something.
        words_T: what they predict.
    """

    def part(hidden_TD: Tensor, words_T: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(hidden_TD), words_T, label_smoothing=smoothing, reduction="sum")

    parts = zip(hidden_TD.split(_ROWS_OF_LOGITS), words_T.split(_ROWS_OF_LOGITS), strict=True)
    return sum(checkpoint(part, *rows, use_reentrant=False, preserve_rng_state=False) for rows in parts)
