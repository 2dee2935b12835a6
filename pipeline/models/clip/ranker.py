"""CLIP's ranker on one device: the cosine similarity between an image and each of its texts.

The legend of the names: B images, T distinct texts, P (image, text) pairs, L tokens, E width of the embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from math import isfinite

import torch
from torch import Tensor

from pipeline.images.preprocess import Preprocess, normalise
from pipeline.models.checks import not_finite, require_finite_weights
from pipeline.models.clip.loader import load_clip, load_clip_tokenizer
from pipeline.models.clip.tokenizer import ClipTokenizer
from pipeline.models.clip.towers import Encoder, ImageTower, image_encoder, text_encoder
from pipeline.models.device import compute_dtype, worker_device
from pipeline.models.device_batch import DeviceBatch
from pipeline.models.fp8 import quantise, require_fp8
from pipeline.models.weights import Weights
from schemas.config import InferencePrecision
from schemas.errors import CapfiltError


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The similarity of one text to an image, and whether the text was cut to CLIP's context for it."""

    similarity: float
    truncated: bool


class ClipRanker:
    """A CLIP of open_clip's with its preprocessing and tokenizer, on the device of this process."""

    def __init__(
        self,
        weights: Weights,
        precision: InferencePrecision,
        batch_size: int = 64,
        where: str = "rank.model",
    ) -> None:
        """Load the weights.

        Args:
            weights: of the model, its files verified.
            precision: ``auto`` is bfloat16 on a GPU and float32 on a CPU; ``fp8`` needs a tower of plain blocks.
            batch_size: images encoded at once on a GPU.
            where: the config key that names the model, for messages.
        """
        self.name = weights.name
        self.device = worker_device()
        self.dtype = compute_dtype(precision, self.device)
        if precision == "fp8":
            require_fp8("rank", self.device)
        # Loaded on the CPU in float32; then open_clip lowers the precision of what it lowers.
        model = load_clip(weights, where, "bf16" if self.dtype == torch.bfloat16 else "fp32")
        require_finite_weights(model.state_dict(), f"{where} = {weights.name!r} in {weights.path}")
        model = model.to(self.device).eval()
        on_gpu = self.device.type == "cuda"
        self.encode_image = image_encoder(model, compiled_batch=batch_size if on_gpu else None)
        if precision == "fp8":
            if not isinstance(self.encode_image, ImageTower):
                raise CapfiltError(
                    f'rank.precision = "fp8": the image tower of {weights.name!r} is not of plain transformer '
                    'blocks; set "bf16"'
                )
            quantise(self.encode_image.blocks)
        self.batch = DeviceBatch(self._take_at_most)
        self._encode_text = text_encoder(model, compiled=on_gpu)
        self._tokenize = ClipTokenizer(load_clip_tokenizer(weights, where))
        self.preprocess = Preprocess.of_open_clip(model.visual.preprocess_cfg)

    def _take_at_most(self, images: int) -> None:
        if isinstance(self.encode_image, ImageTower):
            self.encode_image.take_at_most(images)

    @torch.inference_mode()
    def score_pixels(self, pixels_BCHW: Tensor, texts: Sequence[Sequence[str]]) -> list[list[Score]]:
        """Return the score of each prepared image's texts; a text is encoded once a call.

        Args:
            pixels_BCHW: uint8 as ``self.preprocess`` makes them.
            texts: of each image.

        Raises:
            NotFiniteError: a score is NaN or infinite.
        """
        parts = self.batch.map(lambda rows: self._score_pixels(pixels_BCHW[rows], texts[rows]), len(texts))
        return [scores for part in parts for scores in part]

    def _score_pixels(self, pixels_BCHW: Tensor, texts: Sequence[Sequence[str]]) -> list[list[Score]]:
        distinct = list(dict.fromkeys(text for row in texts for text in row))
        if not distinct:
            return [[] for _ in texts]
        pixels_BCHW = pixels_BCHW.to(self.device, non_blocking=True)
        # A GPU computes the images while this process tokenizes.
        image_BE = self._embed(self.encode_image, normalise(pixels_BCHW, self.preprocess, self.dtype))
        tokens_TL, truncated = self._tokenize(distinct)
        text_TE = self._embed(self._encode_text, tokens_TL)
        index = {text: position for position, text in enumerate(distinct)}
        pairs = [(image, index[text]) for image, row in enumerate(texts) for text in row]
        images_P, texts_P = torch.tensor(pairs, device=self.device).T
        similarity_P = (image_BE[images_P] * text_TE[texts_P]).sum(-1).tolist()
        if not all(map(isfinite, similarity_P)):
            raise not_finite(f"the scores of rank.model = {self.name!r}")
        scores = (
            Score(similarity=similarity, truncated=truncated[text])
            for similarity, (_, text) in zip(similarity_P, pairs, strict=True)
        )
        return [list(islice(scores, len(row))) for row in texts]

    @staticmethod
    def _embed(encode: Encoder, inputs: Tensor) -> Tensor:
        embedding = encode(inputs).float()
        length = torch.linalg.vector_norm(embedding, dim=-1, keepdim=True)
        # As ``normalize``, but for an embedding whose length overflows: divided by infinity it would score 0.
        return embedding / length.clamp_min(1e-12).masked_fill(length.isinf(), torch.nan)
