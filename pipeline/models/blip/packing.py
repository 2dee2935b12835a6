"""Where the rows of texts of unequal length lie: one below another, and padded for the attentions.

The legend of the names: B images, T texts, R rows (tokens of all texts), L tokens of the longest text, Q rows of an
image, N groups of rows, M rows of the longest group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the tokens of texts of unequal length lie: one below another, and padded by text and by image.

    Attributes:
        tokens_R: of all texts.
        texts_B: how many texts each image has.
        position_R: of each row in its text.
        first_T: the row of each text's first token.
        slots_TL: for each place of the texts padded to one length, its row; any row where ``is_token_TL`` is false.
        places_R: for each row, its place among the flattened ``slots_TL``.
        slots_BQ, places_by_image_R: the same, padded by image.
    """

    tokens_R: Tensor
    texts_B: Tensor
    position_R: Tensor
    first_T: Tensor
    slots_TL: Tensor
    is_token_TL: Tensor
    places_R: Tensor
    slots_BQ: Tensor
    places_by_image_R: Tensor

    @classmethod
    def of(cls, tokens: Sequence[Sequence[Sequence[int]]], device: torch.device) -> "Packing":
        """Return the packing of the tokens of each text of each image; every image has a text."""
        texts = [ids for of_image in tokens for ids in of_image]
        lengths_T = torch.tensor([len(ids) for ids in texts], device=device)
        texts_B = torch.tensor([len(of_image) for of_image in tokens])
        rows_B = torch.stack([part.sum() for part in lengths_T.split(texts_B.tolist())])
        position_R, slots_TL, places_R = padded(lengths_T)
        _, slots_BQ, places_by_image_R = padded(rows_B)
        return cls(
            tokens_R=torch.tensor([token for ids in texts for token in ids], device=device),
            texts_B=texts_B,
            position_R=position_R,
            first_T=lengths_T.cumsum(0) - lengths_T,
            slots_TL=slots_TL,
            is_token_TL=torch.arange(slots_TL.shape[1], device=lengths_T.device) < lengths_T[:, None],
            places_R=places_R,
            slots_BQ=slots_BQ,
            places_by_image_R=places_by_image_R,
        )


def padded(lengths_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad groups of rows to the longest one.

    Args:
        lengths_N: rows of each group.

    Returns:
        Each row's position in its group (R,); the row of each padded place (N, M), any one where there is none; and
        the place of each row among the flattened ones (R,).
    """
    first_N = lengths_N.cumsum(0) - lengths_N
    place_M = torch.arange(int(lengths_N.max()), device=lengths_N.device)
    num_rows = int(lengths_N.sum())
    # Places behind a group's end get another group's row: computed and never read.
    slots_NM = (first_N[:, None] + place_M).clamp_max(num_rows - 1)
    group_R = torch.repeat_interleave(torch.arange(len(lengths_N), device=lengths_N.device), lengths_N)
    position_R = torch.arange(num_rows, device=lengths_N.device) - first_N[group_R]
    return position_R, slots_NM, group_R * len(place_M) + position_R
