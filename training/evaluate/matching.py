"""A stage 1 model as retrieval asks it: embeddings of images and texts, and logits of pairs.

The legend of the names: B images, M texts, R texts of one image, L tokens, Q queries, C channels of an embedding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.models.finite import require_finite
from training.blip2.stage1 import Stage1
from training.data.captions import blip_caption
from training.models.qformer import KeyValue
from training.models.tokenizer import Texts

# LAVIS's retrieval reads three tokens more than its training.
MAX_TEXT_TOKENS = 35
_TEXTS_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadTexts:
    """Texts as tokens: on the device, their lengths on the CPU."""

    tokens: Texts
    lengths_M: Tensor

    def by_length(self, rows_R: Tensor) -> Iterator[tuple[Tensor, Texts]]:
        """Yield texts in parts of like length, padded no further than their longest, with their places in ``rows_R``.

        A caption of COCO has about a third of the tokens that there is room for.
        """
        for places in self.lengths_M[rows_R].argsort(stable=True).split(_TEXTS_AT_ONCE):
            rows = rows_R[places]
            longest = int(self.lengths_M[rows[-1]])
            rows = rows.to(self.tokens.ids_BL.device)
            yield (
                places,
                Texts(ids_BL=self.tokens.ids_BL[rows, :longest], mask_BL=self.tokens.mask_BL[rows, :longest]),
            )


class Stage1Matcher:
    """The contrastive and the matching side of a stage 1 model, in evaluation mode and without gradients.

    Its methods raise NotFiniteError where the model computes NaN or infinity.

    Args:
        stage: the model; put in evaluation mode.
        max_text_tokens: of a caption, special tokens included.
    """

    def __init__(self, stage: Stage1, max_text_tokens: int = MAX_TEXT_TOKENS) -> None:
        self.stage = stage.eval()
        self.device = stage.temp.device
        self.max_text_tokens = min(max_text_tokens, stage.config.qformer.max_positions)

    def read(self, texts: Sequence[str]) -> ReadTexts:
        """Clean texts as in training and tokenise them, once for all."""
        tokens = self.stage.tokenizer([blip_caption(text) for text in texts], self.max_text_tokens)
        return ReadTexts(tokens=tokens.to(self.device), lengths_M=tokens.mask_BL.sum(dim=1))

    @torch.no_grad()
    def embed_texts(self, texts: ReadTexts) -> Tensor:
        """Return the normalised embeddings (M, C)."""
        embeddings_MC = self._in_place(
            (places, self.stage.embed_texts(part))
            for places, part in texts.by_length(torch.arange(len(texts.lengths_M)))
        )
        require_finite(embeddings_MC, "the model's embeddings of texts")
        return embeddings_MC

    @torch.no_grad()
    def embed_images(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the normalised embeddings (B, Q, C) of uint8 pixels."""
        embeddings_BQC = self.stage.embed_images(self.stage.encode_pixels(pixels_BCHW.to(self.device)))[0]
        require_finite(embeddings_BQC, "the model's embeddings of images")
        return embeddings_BQC

    @torch.no_grad()
    def match(self, pixels_BCHW: Tensor, texts: ReadTexts, rows: Sequence[Tensor]) -> list[Tensor]:
        """Return, for each image, the logits of its ``rows`` of the texts, (R, 2): index 1 for "they belong together".

        The logits are means over the queries.
        """
        images = self.stage.encode_pixels(pixels_BCHW.to(self.device))
        return [
            self._match_one(
                [
                    None if one is None else (one[0][index : index + 1], one[1][index : index + 1])
                    for one in images
                ],
                texts,
                rows_R,
            )
            for index, rows_R in enumerate(rows)
        ]

    def _match_one(self, image: list[KeyValue | None], texts: ReadTexts, rows_R: Tensor) -> Tensor:
        if not len(rows_R):
            return torch.empty(0, 2, device=self.device)
        logits_R2 = self._in_place(
            (places, self.stage.match(image, part).mean(dim=1)) for places, part in texts.by_length(rows_R)
        )
        require_finite(logits_R2, "the model's matching logits")
        return logits_R2

    def _in_place(self, parts: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """Join rows that were computed in another order."""
        places, values = zip(*parts, strict=True)
        joined = torch.cat(values)
        order = torch.cat(places).to(joined.device)
        return torch.empty_like(joined).index_copy_(0, order, joined)
