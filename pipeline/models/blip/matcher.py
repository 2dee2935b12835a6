"""BLIP's filter on one device: the probability that a text matches an image, by the image-text matching (ITM) head.

The image-grounded text encoder reads the text and, in every layer, the image; the head reads its first token. Here an
image is encoded once for all of its texts, its keys and values are projected once, and the texts are packed: what
concerns a token alone is computed without padding.

The legend of the names: B images, P image positions, E their width, T texts, R rows (tokens of all texts), L tokens of
the longest text, Q rows of an image, D width, H heads, d their width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import BlipForImageTextRetrieval

from pipeline.images.preprocess import Preprocess, decode_pixels, normalise
from pipeline.models.blip.text_layers import TextLayers, join_heads
from pipeline.models.blip.vision import VisionTower
from pipeline.models.checks import require_finite
from pipeline.models.device import compute_dtype, worker_device
from pipeline.models.device_batch import DeviceBatch
from pipeline.models.transformers_loader import load_image_processor, load_model, load_tokenizer
from pipeline.models.weights import Weights
from schemas.config import FilterConfig
from schemas.errors import CapfiltError


@dataclass(frozen=True, slots=True)
class _Packing:
    """Where the tokens of texts of unequal length lie: one below another, and padded by text and by image.

    Attributes:
        position_R: of each row in its text.
        first_T: the row of each text's first token.
        slots_TL: for each place of the texts padded to one length, its row; any row where ``is_token_TL`` is false.
        places_R: for each row, its place among the flattened ``slots_TL``.
        slots_BQ, places_by_image_R: the same, padded by image.
    """

    position_R: Tensor
    first_T: Tensor
    slots_TL: Tensor
    is_token_TL: Tensor
    places_R: Tensor
    slots_BQ: Tensor
    places_by_image_R: Tensor

    @classmethod
    def of(cls, lengths_T: Tensor, texts_B: Tensor) -> "_Packing":
        """Return the packing of texts of these lengths, ``texts_B`` of them for each image in turn."""
        rows_B = torch.stack([part.sum() for part in lengths_T.split(texts_B.tolist())])
        position_R, slots_TL, places_R = _padded(lengths_T)
        _, slots_BQ, places_by_image_R = _padded(rows_B)
        return cls(
            position_R=position_R,
            first_T=lengths_T.cumsum(0) - lengths_T,
            slots_TL=slots_TL,
            is_token_TL=torch.arange(slots_TL.shape[1], device=lengths_T.device) < lengths_T[:, None],
            places_R=places_R,
            slots_BQ=slots_BQ,
            places_by_image_R=places_by_image_R,
        )


def _padded(lengths_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's position in its group, the row of each padded place, and the padded place of each row."""
    first_N = lengths_N.cumsum(0) - lengths_N
    place_M = torch.arange(int(lengths_N.max()), device=lengths_N.device)
    num_rows = int(lengths_N.sum())
    # Places behind a group's end get another group's row: computed and never read.
    slots_NM = (first_N[:, None] + place_M).clamp_max(num_rows - 1)
    group_R = torch.repeat_interleave(torch.arange(len(lengths_N), device=lengths_N.device), lengths_N)
    position_R = torch.arange(num_rows, device=lengths_N.device) - first_N[group_R]
    return position_R, slots_NM, group_R * len(place_M) + position_R


class MatchEncoder(nn.Module):
    """The image-grounded text encoder of a BLIP retrieval model with its ITM head; for inference alone."""

    def __init__(self, model: BlipForImageTextRetrieval) -> None:
        super().__init__()
        self.text = TextLayers(model.text_encoder)
        self.head = model.itm_head

    @torch.inference_mode()
    def forward(self, image_BPE: Tensor, tokens: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """Return the logits (no match, match) of every text, in float32: (T, 2), image by image.

        Args:
            image_BPE: of the vision tower.
            tokens: of each text of each image; every image has a text.
        """
        device = image_BPE.device
        texts = [ids for of_image in tokens for ids in of_image]
        tokens_R = torch.tensor([token for ids in texts for token in ids], device=device)
        lengths_T = torch.tensor([len(ids) for ids in texts], device=device)
        packing = _Packing.of(lengths_T, torch.tensor([len(of_image) for of_image in tokens]))
        # (layers, 2, B, H, P, d)
        image_kv = self.text.image_keys_values(image_BPE)

        def attend_self(_: int, projected_RM: Tensor) -> Tensor:
            # Padded by text for the attention alone: (T, L, 3D) to three of (T, H, L, d).
            padded_TLM = projected_RM[packing.slots_TL]
            q_THLd, k_THLd, v_THLd = padded_TLM.unflatten(-1, (3, self.text.num_heads, -1)).permute(
                2, 0, 3, 1, 4
            )
            context_THLd = scaled_dot_product_attention(
                q_THLd, k_THLd, v_THLd, packing.is_token_TL[:, None, None]
            )
            return join_heads(context_THLd)[packing.places_R]

        def attend_image(layer: int, query_RD: Tensor) -> Tensor:
            # All rows of an image, padded by image: (B * Q, D).
            padded_KD = query_RD[packing.slots_BQ.flatten()]
            return self.text.attend_grid(padded_KD, *image_kv[layer])[packing.places_by_image_R]

        hidden_RD = self.text.embed(tokens_R, packing.position_R)
        hidden_RD = self.text.hidden(hidden_RD, attend_self, attend_image)
        return self.head(hidden_RD[packing.first_T]).float()


class Matcher:
    """BLIP's retrieval model with its preprocessing and tokenizer, on the device of this process."""

    def __init__(self, config: FilterConfig, weights: Weights) -> None:
        """Load the weights. Raises CapfiltError where they are not a BLIP retrieval model's."""
        self.config = config
        self.name = weights.name
        self.device = worker_device()
        self.dtype = compute_dtype(config.precision, self.device)
        folder = Path(weights.path)
        self._tokenizer = load_tokenizer(folder, "filter.model")
        model = load_model(
            BlipForImageTextRetrieval, folder, "filter.model", weights.name, dtype=torch.float32
        )
        self.preprocess = Preprocess.of_blip(
            load_image_processor(folder, model.config.vision_config.image_size, "filter.model")
        )
        text = model.config.text_config
        if config.max_tokens > text.max_position_embeddings:
            raise CapfiltError(
                f"filter.max_tokens = {config.max_tokens}: the model ends at {text.max_position_embeddings} tokens"
            )
        # A word beyond the table would end a shard that has it, and on a GPU the worker.
        if (words := max(self._tokenizer.get_vocab().values()) + 1) > text.vocab_size:
            raise CapfiltError(
                f"filter.model = {weights.name!r}: its tokenizer has {words} words, and the model embeddings of "
                f"{text.vocab_size}; put the tokenizer there that the model was trained with"
            )
        self._first_id = self._first_token(config.first_token, text.bos_token_id, text.vocab_size)
        model = model.to(self.device, self.dtype).eval()
        self.vision = VisionTower(
            model.vision_model, config.batch_size if self.device.type == "cuda" else None
        )
        self.encode = MatchEncoder(model)
        self.batch = DeviceBatch(self.vision.take_at_most)

    def _first_token(self, name: Literal["encoder", "cls"], start_id: int, vocabulary: int) -> int:
        """Return the token at position 0: [ENC], which BLIP adds behind its start token [DEC], or [CLS]."""
        if name == "cls":
            return int(self._tokenizer.cls_token_id)
        if start_id + 1 >= vocabulary:
            raise CapfiltError(
                f'filter.first_token = "encoder": {self.name!r} has {vocabulary} tokens, and no [ENC] behind its '
                f'start token {start_id}; set "cls"'
            )
        return start_id + 1

    def prepare(self, data: bytes) -> Tensor | None:
        """Return the pixels of an encoded image, uint8 (C, H, W), or None where it does not decode."""
        pixels = decode_pixels(data, [self.preprocess], self.config.pixels)
        return None if pixels is None else pixels[0]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts, the first one replaced, cut to ``filter.max_tokens``."""
        if not texts:
            return []
        ids = self._tokenizer(list(texts), truncation=True, max_length=self.config.max_tokens).input_ids
        return [[self._first_id, *row[1:]] for row in ids]

    @torch.inference_mode()
    def match(self, pixels_BCHW: Tensor, texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """Return for each prepared image the probability that each of its texts matches it.

        Args:
            pixels_BCHW: uint8 as ``prepare`` makes them.
            texts: of each image; an image may have none.

        Raises:
            NotFiniteError: a probability is NaN or infinite.
        """
        parts = self.batch.map(lambda rows: self._match(pixels_BCHW[rows], texts[rows]), len(texts))
        return [probabilities for part in parts for probabilities in part]

    def _match(self, pixels_BCHW: Tensor, texts: Sequence[Sequence[str]]) -> list[list[float]]:
        with_texts = [image for image, row in enumerate(texts) if row]
        if not with_texts:
            return [[] for _ in texts]
        pixels_BCHW = pixels_BCHW[with_texts].to(self.device, non_blocking=True)
        image_BPE = self.vision(normalise(pixels_BCHW, self.preprocess, self.dtype))
        logits_T2 = self.encode(image_BPE, [self.tokenize(texts[image]) for image in with_texts])
        probability_T = logits_T2.softmax(-1)[:, 1]
        require_finite(probability_T, f"the match probabilities of filter.model = {self.name!r}")
        values = iter(probability_T.tolist())
        return [list(islice(values, len(row))) for row in texts]
