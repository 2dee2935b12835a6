"""What a step of stage 1 is divided into: shares of a rank's images and texts, and the pairs of ITM that go with each.

The legend of the names: N images of the step over all ranks; B of a share; R pairs; Q queries, L text tokens, T words
to predict, P tokens of an image, E its width, C the contrastive one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.models.tokenizer import Texts


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one backward pass is about, on the device.

    ``words_T`` are the words that the tokens ``predicting_T``, counted through (B, L), have to predict; ``first`` is
    the first image's index in N.
    """

    features_BPE: Tensor
    texts: Texts
    predicting_T: Tensor
    words_T: Tensor
    first: int
    seed: int

    @property
    def size(self) -> int:
        """Return B."""
        return len(self.features_BPE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Everyone:
    """What each rank knows of the whole step. None of it has a gradient.

    ``image_of_text_N`` is on the CPU, where the pairs are arranged.
    """

    image_NQC: Tensor
    text_NC: Tensor
    texts: Texts
    text_of_image_N: Tensor
    image_of_text_N: np.ndarray
    num_words: Tensor

    @property
    def size(self) -> int:
        """Return N."""
        return len(self.text_NC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Images and texts for ITM. Without ``rows_R``, all images of the share, two texts each; else one text each."""

    rows_R: Tensor | None
    texts: Texts
    labels_R: Tensor
    weights_R: Tensor


def arrange_pairs(share: Share, everyone: Everyone) -> Iterator[Pairs]:
    """Yield the pairs of ITM whose image is in the share.

    First each image with its own text and with its negative text; then, with the texts of any rank that drew them,
    the images that are negatives. How many those are differs, so they come in parts of few sizes, the last one
    filled up with pairs of no weight: compiled code knows its shapes.
    """
    device, dtype = everyone.text_NC.device, everyone.text_NC.dtype
    own_B = torch.arange(share.first, share.first + share.size, device=device)
    yield Pairs(
        rows_R=None,
        texts=everyone.texts[torch.stack((own_B, everyone.text_of_image_N[own_B]), dim=1).flatten()],
        labels_R=torch.tensor([1, 0], device=device).repeat(share.size),
        weights_R=torch.ones(2 * share.size, device=device, dtype=dtype),
    )
    rows = everyone.image_of_text_N - share.first
    texts = ((rows >= 0) & (rows < share.size)).nonzero()[0]
    for part in _parts(len(texts), share.size):
        chosen = np.resize(texts[part], part.stop - part.start)
        weights = np.arange(part.start, part.stop) < len(texts)
        yield Pairs(
            rows_R=torch.from_numpy(rows[chosen]).to(device),
            texts=everyone.texts[torch.from_numpy(chosen).to(device)],
            labels_R=torch.zeros(len(chosen), device=device, dtype=torch.long),
            weights_R=torch.from_numpy(weights).to(device, dtype),
        )


def _parts(count: int, size: int) -> Iterator[slice]:
    """Yield slices of ``size``, then of a quarter of it, that cover ``count``; the last may reach beyond."""
    start, quarter = 0, max(1, size // 4)
    while start < count:
        length = size if count - start >= size else quarter
        yield slice(start, start + length)
        start += length
