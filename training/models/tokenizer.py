"""Captions as tokens for the Q-Former: BERT's word pieces between [CLS] or [DEC] and [SEP], padded to one length.

The legend of the names: B captions, L tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import BertTokenizer

from pipeline.models.transformers_loader import load_tokenizer
from schemas.errors import CapfiltError
from schemas.pretrain import BertShape

_BEGIN_CAPTION = "[DEC]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Token ids, the first one [CLS]; the mask is true where there is a token, padding comes last."""

    ids_BL: Tensor
    mask_BL: Tensor

    @classmethod
    def full(cls, count: int, length: int, device: torch.device | str = "cpu") -> Self:
        """Return texts without padding, to count what they cost; their tokens say nothing."""
        ids_BL = torch.zeros(count, length, dtype=torch.long, device=device)
        return cls(ids_BL=ids_BL, mask_BL=torch.ones_like(ids_BL, dtype=torch.bool))

    def __getitem__(self, rows: slice | Tensor) -> "Texts":
        """Return some rows."""
        return Texts(ids_BL=self.ids_BL[rows], mask_BL=self.mask_BL[rows])

    def to(self, device: torch.device) -> "Texts":
        """Return the texts on a device."""
        return Texts(
            ids_BL=self.ids_BL.to(device, non_blocking=True),
            mask_BL=self.mask_BL.to(device, non_blocking=True),
        )

    def beginning_with(self, token: int) -> "Texts":
        """Return the texts with another first token."""
        ids_BL = self.ids_BL.clone()
        ids_BL[:, 0] = token
        return replace(self, ids_BL=ids_BL)


class CaptionTokenizer:
    """BERT's tokenizer with [DEC], the first token of a caption that is generated (BLIP-2, section 3.2).

    Args:
        folder: of BERT's tokenizer.
        config: the model's shape.
        section: of the config, for messages.
        num_added: tokens that the model has beside BERT's: [DEC]; BLIP's text encoder also [ENC], the last one.
        exact: the model has no further ones.
    """

    def __init__(
        self,
        folder: Path,
        config: BertShape,
        section: str = "qformer",
        num_added: int = 1,
        exact: bool = True,
    ) -> None:
        self.tokenizer = load_tokenizer(folder, f"{section}.tokenizer", BertTokenizer)
        self.tokenizer.add_special_tokens({"bos_token": _BEGIN_CAPTION})
        # [DEC] may be among the words of the folder already, in any place.
        vocab_size = len(self.tokenizer) + num_added - 1
        if config.vocab_size < vocab_size or (exact and config.vocab_size > vocab_size):
            raise CapfiltError(
                f"{section}.tokenizer = {config.tokenizer!r} has {vocab_size} words with {_BEGIN_CAPTION}"
                f"{' and [ENC]' if num_added > 1 else ''}; set {section}.vocab_size = {vocab_size}"
            )
        self.max_length = config.max_text_tokens

    @property
    def begin_id(self) -> int:
        """Return the id of [DEC]."""
        return self.tokenizer.bos_token_id

    def __call__(self, captions: Sequence[str], max_length: int | None = None) -> Texts:
        """Tokenise, cut and pad to ``max_length``, that of the config if it is not given."""
        encoded = self.tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=max_length or self.max_length,
            return_tensors="pt",
        )
        return Texts(ids_BL=encoded.input_ids, mask_BL=encoded.attention_mask.bool())
