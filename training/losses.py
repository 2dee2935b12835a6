"""The losses of image-text training, ITC, ITM and ITG, and the hard negatives of ITM (BLIP-2, section 3.2).

Each loss is a *sum* over some rows; the caller divides it by the size of the whole step. Sums over micro-batches and
ranks then add up to the global batch's mean loss and gradient. The reference is LAVIS's
``lavis/models/blip2_models/blip2_qformer.py``.

The legend of the names: N images of the step over all ranks, and as many texts; B rows of them; Q queries, C width of
the contrastive embeddings; L text tokens, T of them with a label, V tokens of the vocabulary, D the model's width.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# The label that cross-entropy ignores.
IGNORED = -100

# Rows of logits in memory at once: with 30,523 tokens in float32, 250 MB.
_ROWS_OF_LOGITS = 2048
# Images compared with all texts at once, for the negatives.
_ROWS_OF_SIMILARITIES = 256
# The logit of a pair that must not be drawn, as in LAVIS: its probability is 0 unless all of its row are such.
MASKED_LOGIT = -1e4


def similarity(image_BQC: Tensor, text_NC: Tensor) -> Tensor:
    """Return the cosine similarity of each image's best query with each text: (B, N). Embeddings are normalised."""
    # s(b, n) = max_q <image(b, q), text(n)>
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
        temperature: what similarities are divided by.
        own_B: each row's own index in N.
        smoothing: of the labels.
    """
    # logits(b, n) = s(b, n) / temperature; the label of row b is the index of its own partner.
    to_text_BN = similarity(image_BQC, all_text_NC) / temperature
    # The same similarity, computed row by text so that the gradient reaches text_BC.
    to_image_BN = torch.einsum("bc,nqc->bnq", text_BC, all_image_NQC).amax(dim=2) / temperature
    return sum(
        F.cross_entropy(logits_BN, own_B, label_smoothing=smoothing, reduction="sum")
        for logits_BN in (to_text_BN, to_image_BN)
    ).div(2)


@torch.no_grad()
def draw_negatives(
    all_image_NQC: Tensor,
    all_text_NC: Tensor,
    temperature: Tensor,
    same_NN: Tensor,
    uniforms_2N: Tensor,
    apart_NN: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw hard negatives from the whole step with probability softmax(similarity / temperature).

    Args:
        all_image_NQC, all_text_NC: the embeddings of the step.
        temperature: of ITC.
        same_NN: True where image i and text j belong together, so that they are not negatives: at least i = j.
        uniforms_2N: a number of [0, 1) for each draw; the result depends on no other random number.
        apart_NN: True where they are not compared at all; symmetric.

    Returns:
        A text for each image and an image for each text, as indices of N; and ``false_share`` of these draws.
    """
    similarity_NN = torch.cat(
        [similarity(rows, all_text_NC) for rows in all_image_NQC.split(_ROWS_OF_SIMILARITIES)]
    )
    logits_NN = similarity_NN / temperature
    if apart_NN is not None:
        logits_NN = logits_NN.masked_fill(apart_NN, MASKED_LOGIT)
    of_images, of_texts = uniforms_2N
    share = (
        false_share(logits_NN.softmax(dim=1), same_NN) + false_share(logits_NN.T.softmax(dim=1), same_NN.T)
    ) / 2
    logits_NN = logits_NN.masked_fill(same_NN, MASKED_LOGIT)
    return (
        draw_columns(logits_NN.softmax(dim=1), of_images),
        draw_columns(logits_NN.T.softmax(dim=1), of_texts),
        share,
    )


def false_share(weights_NN: Tensor, same_NN: Tensor) -> Tensor:
    """Return which share of negatives, drawn by weights from all other samples, would belong together after all."""
    others_NN = weights_NN.clone().fill_diagonal_(0)
    # Of row i: sum of the weights of j != i that belong to i / sum of the weights of j != i; then the mean over rows.
    shares_N = (others_NN * same_NN).sum(dim=1) / others_NN.sum(dim=1).clamp(
        min=torch.finfo(others_NN.dtype).tiny
    )
    return shares_N.mean()


def draw_columns(weights_NN: Tensor, uniforms_N: Tensor) -> Tensor:
    """Draw one column of each row with a probability proportional to its weight, the same on every device."""
    # Inverse of the distribution function: the first column j with P(column <= j) > u. In float64, so that the sum of
    # many small probabilities is exact enough; u is scaled by the last sum, which rounding keeps from being 1.
    cumulative_NN = weights_NN.double().cumsum(dim=1)
    target_N1 = uniforms_N.to(cumulative_NN)[:, None] * cumulative_NN[:, -1:]
    return torch.searchsorted(cumulative_NN, target_N1, right=True)[:, 0].clamp(max=weights_NN.shape[1] - 1)


def matching_loss(logits_BQ2: Tensor, labels_B: Tensor, weights_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return ITM summed over some pairs, and how many were classified correctly.

    Args:
        logits_BQ2: of each query; those of a pair are their mean.
        labels_B: 1 where image and text belong together.
        weights_B: 0 for rows that only pad the batch, else 1.
    """
    # Section 3.2: a two-class classifier on each query's output, averaged over the queries.
    logits_B2 = logits_BQ2.mean(dim=1)
    loss_B = F.cross_entropy(logits_B2, labels_B, reduction="none")
    correct_B = logits_B2.detach().argmax(dim=1) == labels_B
    weights_B = weights_B.to(loss_B.dtype)
    return (loss_B * weights_B).sum(), (correct_B * weights_B).sum()


def next_tokens(ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Return the label of each token: the next token, the end of text included; ``IGNORED`` where none follows."""
    labels_BL = ids_BL.masked_fill(~mask_BL, IGNORED).roll(-1, dims=1)
    # The roll has put the first token behind the last one.
    labels_BL[:, -1] = IGNORED
    return labels_BL


def target_positions(labels_BL: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the positions, in (B, L) flattened, that have a label, and their labels; computed on the CPU.

    The result's size depends on the data: a device would have to be waited for.
    """
    labels = labels_BL.flatten()
    positions_T = (labels != IGNORED).nonzero()[:, 0]
    return positions_T.to(device, non_blocking=True), labels[positions_T].to(device, non_blocking=True)


def captioning_loss(
    logits_of: Callable[[Tensor], Tensor],
    hidden_TD: Tensor,
    labels_T: Tensor,
    smoothing: float = 0.0,
    rows_at_once: int = _ROWS_OF_LOGITS,
) -> Tensor:
    """Return ITG, the smoothed cross-entropy of the next tokens, summed over tokens.

    The logits are computed for ``rows_at_once`` tokens at a time, and again for the gradient: whole, they would be the
    largest tensor of the step.

    Args:
        logits_of: the model's head.
        hidden_TD: of the tokens that have a label.
        labels_T: their labels.
        smoothing: of the labels.
        rows_at_once: tokens whose logits are in memory.
    """

    def part_loss(hidden_TD: Tensor, labels_T: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(hidden_TD), labels_T, label_smoothing=smoothing, reduction="sum")

    parts = zip(hidden_TD.split(rows_at_once), labels_T.split(rows_at_once), strict=True)
    return sum(checkpoint(part_loss, *part, use_reentrant=False, preserve_rng_state=False) for part in parts)
