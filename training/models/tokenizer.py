"""Captions as tokens for the Q-Former: BERT's word pieces between [CLS] or [DEC] and [SEP], padded to one length.

The legend of the names: B captions, L tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertTokenizer

from pipeline.models.transformers_loader import load_tokenizer
from schemas.errors import CapfiltError
from schemas.pretrain import QFormerConfig

_BEGIN_CAPTION = "[DEC]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Token ids, the first one [CLS]; the mask is true where there is a token, padding comes last."""

    ids_BL: Tensor
    mask_BL: Tensor

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
    """BERT's tokenizer with [DEC], the first token of a caption that is generated (BLIP-2, section 3.2)."""

    def __init__(self, folder: Path, config: QFormerConfig) -> None:
        self.tokenizer = load_tokenizer(folder, "qformer.tokenizer", BertTokenizer)
        self.tokenizer.add_special_tokens({"bos_token": _BEGIN_CAPTION})
        if len(self.tokenizer) != config.vocab_size:
            raise CapfiltError(
                f"qformer.tokenizer = {config.tokenizer!r} has {len(self.tokenizer)} words with {_BEGIN_CAPTION}; "
                f"set qformer.vocab_size = {len(self.tokenizer)}"
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
