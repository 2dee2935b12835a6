"""Micro-batches of a stage 1 step, and the image-text pairs that each computes ITM on.

The legend of the names: N images of the step over all ranks; B of a micro-batch; R pairs; Q queries, L text tokens, T
of them with a label, P tokens of an image, E its width, C the contrastive one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.models.tokenizer import Texts


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The images and texts of one backward pass, on the device.

    ``labels_T`` are the next tokens of the tokens at ``target_positions_T``, which index (B, L) flattened; ``first`` is
    the first image's index in N; ``seed`` sets dropout.
    """

    features_BPE: Tensor
    texts: Texts
    target_positions_T: Tensor
    labels_T: Tensor
    first: int
    seed: int

    @property
    def size(self) -> int:
        """Return B."""
        return len(self.features_BPE)


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalBatch:
    """What each rank knows of the whole step: embeddings, tokens and drawn negatives. None of it has a gradient.

    ``image_of_text_N`` is on the CPU, where the pairs are formed.
    """

    image_NQC: Tensor
    text_NC: Tensor
    texts: Texts
    text_of_image_N: Tensor
    image_of_text_N: np.ndarray
    num_tokens: Tensor

    @property
    def size(self) -> int:
        """Return N."""
        return len(self.text_NC)


@dataclass(frozen=True, slots=True, kw_only=True)
class ItmPairs:
    """Pairs for ITM. Without ``rows_R``: all images of the micro-batch with two texts each; else one text each."""

    rows_R: Tensor | None
    texts: Texts
    labels_R: Tensor
    weights_R: Tensor


def itm_pairs(micro_batch: MicroBatch, global_batch: GlobalBatch) -> Iterator[ItmPairs]:
    """Yield the pairs of ITM whose image is in the micro-batch.

    First each image with its own text and with its negative text; then the images that were drawn as negatives, with
    the texts, of any rank, that they were drawn for. The number of those differs from step to step, so they come in
    parts of two sizes, the last one padded with pairs of weight 0: compiled code then meets known shapes only.
    """
    device, dtype = global_batch.text_NC.device, global_batch.text_NC.dtype
    own_B = torch.arange(micro_batch.first, micro_batch.first + micro_batch.size, device=device)
    # Rows 2 i and 2 i + 1 are image i's own text (label 1) and its negative text (label 0).
    yield ItmPairs(
        rows_R=None,
        texts=global_batch.texts[torch.stack((own_B, global_batch.text_of_image_N[own_B]), dim=1).flatten()],
        labels_R=torch.tensor([1, 0], device=device).repeat(micro_batch.size),
        weights_R=torch.ones(2 * micro_batch.size, device=device, dtype=dtype),
    )
    # For each text of the step: the row of its negative image in this micro-batch, outside 0 .. B - 1 if it has none.
    rows = global_batch.image_of_text_N - micro_batch.first
    texts = ((rows >= 0) & (rows < micro_batch.size)).nonzero()[0]
    for part in padded_parts(len(texts), micro_batch.size):
        # np.resize repeats the part's texts up to its length.
        padded_texts = np.resize(texts[part], part.stop - part.start)
        weights = np.arange(part.start, part.stop) < len(texts)
        yield ItmPairs(
            rows_R=torch.from_numpy(rows[padded_texts]).to(device),
            texts=global_batch.texts[torch.from_numpy(padded_texts).to(device)],
            labels_R=torch.zeros(len(padded_texts), device=device, dtype=torch.long),
            weights_R=torch.from_numpy(weights).to(device, dtype),
        )


def padded_parts(count: int, size: int) -> Iterator[slice]:
    """Yield slices of ``size``, then of a quarter of it, that cover ``count``; the last may reach beyond."""
    start, quarter = 0, max(1, size // 4)
    while start < count:
        length = size if count - start >= size else quarter
        yield slice(start, start + length)
        start += length
