"""The filter on one device: the probability that a text matches an image, by the image-text matching (ITM) head.

The model is BLIP's retrieval model, or a stage 1 of BLIP-2 (``qformer_matcher``). Of BLIP, the image-grounded text
encoder reads the text and, in every layer, the image; the head reads its first token. Here an image is encoded once for
all of its texts, its keys and values are projected once, and the texts are packed: what concerns a token alone is
computed without padding.

The legend of the names: B images, P image positions, E their width, T texts, R rows (tokens of all texts), L tokens of
the longest text, Q rows of an image, D width, H heads, d their width.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Blip2ForImageTextRetrieval, BlipForImageTextRetrieval

from pipeline.images.preprocess import decode_pixels, normalise
from pipeline.models.blip.packing import Packing
from pipeline.models.blip.qformer_matcher import QFormerMatchEncoder
from pipeline.models.blip.text_layers import TextLayers, join_heads
from pipeline.models.blip.vision import VisionTower
from pipeline.models.checks import require_finite
from pipeline.models.device import compute_dtype, worker_device
from pipeline.models.device_batch import DeviceBatch
from pipeline.models.files.model_files import read_object
from pipeline.models.transformers_loader import load_model, load_preprocess, load_tokenizer
from pipeline.models.weights import Weights
from schemas.config import FilterConfig
from schemas.errors import CapfiltError


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
        packing = Packing.of(tokens, image_BPE.device)
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

        hidden_RD = self.text.embed(packing.tokens_R, packing.position_R)
        hidden_RD = self.text.hidden(hidden_RD, attend_self, attend_image)
        return self.head(hidden_RD[packing.first_T]).float()


# That transformers' processor of BLIP-2 adds to the tokenizer, for language models: the Q-Former has no row for it.
_IMAGE_TOKEN = "<image>"


class Matcher:
    """A filter with its preprocessing and tokenizer, on the device of this process."""

    def __init__(self, config: FilterConfig, weights: Weights) -> None:
        """Load the weights. Raises CapfiltError where they are of neither kind of model."""
        self.config = config
        self.name = weights.name
        self.device = worker_device()
        self.dtype = compute_dtype(config.precision, self.device)
        folder = Path(weights.path)
        self._tokenizer = load_tokenizer(folder, "filter.model")
        is_blip2 = read_object(folder / "config.json", "filter.model").get("model_type") == "blip-2"
        model = load_model(
            Blip2ForImageTextRetrieval if is_blip2 else BlipForImageTextRetrieval,
            folder,
            "filter.model",
            weights.name,
        )
        self.preprocess = load_preprocess(folder, model.config.vision_config.image_size, "filter.model")
        text = model.config.qformer_config if is_blip2 else model.config.text_config
        self._require_words(text.vocab_size, {_IMAGE_TOKEN} if is_blip2 else set())
        self._first_id = int(self._tokenizer.cls_token_id)
        if config.first_token == "encoder" and not is_blip2:
            self._first_id = self._encoder_token(text.bos_token_id, text.vocab_size)
        model = model.to(self.device, self.dtype).eval()
        self.vision = VisionTower(
            model.vision_model, config.batch_size if self.device.type == "cuda" else None
        )
        self.encode = QFormerMatchEncoder(model) if is_blip2 else MatchEncoder(model)
        self.batch = DeviceBatch(self.vision.take_at_most)

    def _require_words(self, embeddings: int, unread: set[str]) -> None:
        """Refuse a tokenizer with words beyond the table: they would end a shard, and on a GPU the worker."""
        words = {word: token for word, token in self._tokenizer.get_vocab().items() if word not in unread}
        if (count := max(words.values()) + 1) > embeddings:
            raise CapfiltError(
                f"filter.model = {self.name!r}: its tokenizer has {count} words, and the model embeddings of "
                f"{embeddings}; put the tokenizer there that the model was trained with"
            )
        self._num_words = count

    def _encoder_token(self, start_id: int, vocabulary: int) -> int:
        """Return [ENC], which BLIP adds behind its start token [DEC]."""
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
        unknown = self._tokenizer.unk_token_id
        # A text of the web may have the image token's letters.
        return [
            [self._first_id, *(token if token < self._num_words else unknown for token in row[1:])]
            for row in ids
        ]

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
