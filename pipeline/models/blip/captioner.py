"""BLIP's captioner on one device: images in, sampled captions out.

A caption is a function of (run seed, uid, sample index, image, weights, ``[caption]``): batch size, order and
worker do not enter. What remains is floating-point rounding, which depends on the shape of the batch and on
the device: another token is picked where its uniform number lies within that rounding of a boundary. In float32
that is rarer than one token in 90,000 (none of so many differed between batch sizes 1, 3, 16, 32 and 64); bfloat16
is coarser, so keep the batch size to reproduce a corpus.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import BlipForConditionalGeneration, GenerationConfig

from pipeline.images.preprocess import decode_pixels, normalise, stack_pinned
from pipeline.models.blip.decoder import BlipDecoder
from pipeline.models.blip.generation import NO_TOKEN, NOT_FINITE, GridSampler, RowSampler
from pipeline.models.blip.vision import VisionTower
from pipeline.models.checks import not_finite
from pipeline.models.device import compute_dtype, worker_device
from pipeline.models.device_batch import DeviceBatch
from pipeline.models.fp8 import quantise, require_fp8
from pipeline.models.transformers_loader import load_model, load_preprocess, load_tokenizer
from pipeline.models.weights import Weights
from pipeline.rng import caption_seeds, uniforms
from schemas.config import CaptionConfig
from schemas.errors import CapfiltError


@dataclass(frozen=True, slots=True, kw_only=True)
class RawCaption:
    """A sampled caption: text with prompt, seed of its stream, number of tokens sampled (end included)."""

    text: str
    seed: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBatch:
    """Images in host memory, ready for the device: stacked uint8 pixels and the uniform numbers of their captions."""

    pixels_BCHW: Tensor
    uniforms_BNT: Tensor
    seeds_BN: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """The sampled tokens of an image batch, on the CPU; NO_TOKEN fills the places after each end."""

    tokens_BNT: Tensor
    seeds_BN: np.ndarray


class BlipCaptioner:
    """BLIP with its preprocessing and tokenizer, on the device of this process."""

    def __init__(self, config: CaptionConfig, weights: Weights, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.name = weights.name
        self.device = worker_device()
        self.dtype = compute_dtype(config.precision, self.device)
        if config.precision == "fp8":
            require_fp8("caption", self.device)
        on_gpu, folder = self.device.type == "cuda", Path(weights.path)
        self._tokenizer = load_tokenizer(folder, "caption.model")
        model = load_model(BlipForConditionalGeneration, folder, "caption.model", weights.name)
        # Generation settings that came with the files must not fill what a call leaves open.
        model.text_decoder.generation_config = GenerationConfig()
        self.preprocess = load_preprocess(folder, model.config.vision_config.image_size, "caption.model")
        model = model.to(self.device, self.dtype).eval()
        self._start_id = model.config.text_config.bos_token_id
        self._prompt_ids = self._encode_prompt(model.config.text_config.max_position_embeddings)
        self.vision = VisionTower(model.vision_model, config.batch_size if on_gpu else None)
        if config.precision == "fp8":
            quantise(self.vision.blocks)
        decoder = BlipDecoder(model.text_decoder, compiled=on_gpu).eval()
        self._sample: GridSampler | RowSampler = (
            GridSampler(decoder, self._prompt_ids, config, config.batch_size)
            if on_gpu
            else RowSampler(decoder, self._prompt_ids, config)
        )
        self.batch = DeviceBatch(self._take_at_most)

    def prepare(self, data: bytes) -> Tensor | None:
        """Return the pixels of an encoded image, uint8 (C, H, W), or None where it does not decode."""
        pixels = decode_pixels(data, [self.preprocess], self.config.pixels)
        return None if pixels is None else pixels[0]

    def __call__(self, images: Sequence[bytes], uids: Sequence[str]) -> list[list[RawCaption]]:
        """Return ``num_captions`` captions for each encoded image; all of them must decode."""
        pixels = [self.prepare(data) for data in images]
        return self.decode_text(self.generate(self.load(pixels, uids)))

    def load(self, pixels: Sequence[Tensor], uids: Sequence[str]) -> ImageBatch:
        """Stack prepared images, at most ``batch_size``, and draw their uniform numbers: 50 ms of a core for 256."""
        seeds_BN = caption_seeds(self.seed, uids, self.config.num_captions)
        num_steps = self.config.max_length - len(self._prompt_ids)
        return ImageBatch(
            pixels_BCHW=stack_pinned(pixels),
            uniforms_BNT=torch.from_numpy(uniforms(seeds_BN, num_steps)),
            seeds_BN=seeds_BN,
        )

    def generate(self, batch: ImageBatch) -> TokenBatch:
        """Sample the captions of a batch: all of the work of the device, and nothing else.

        Raises NotFiniteError where logits are NaN or infinite.
        """
        parts = self.batch.map(partial(self._sample_rows, batch), len(batch.seeds_BN))
        tokens_BNT = torch.cat(parts)
        if bool((tokens_BNT == NOT_FINITE).any()):
            raise not_finite(f"the logits of caption.model = {self.name!r}")
        return TokenBatch(tokens_BNT=tokens_BNT, seeds_BN=batch.seeds_BN)

    def _sample_rows(self, batch: ImageBatch, rows: slice) -> Tensor:
        # Copied from pageable memory on purpose: this waits until the device has finished the batch before.
        uniforms_BNT = batch.uniforms_BNT[rows].to(self.device)
        pixels_BCHW = batch.pixels_BCHW[rows].to(self.device, non_blocking=True)
        image_BPE = self.vision(normalise(pixels_BCHW, self.preprocess, self.dtype))
        return self._sample(image_BPE, uniforms_BNT).cpu()

    def _take_at_most(self, images: int) -> None:
        """Give the shapes that are fixed on a GPU, and their buffers, another size."""
        if isinstance(self._sample, GridSampler):
            self.vision.take_at_most(images)
            decoder = self._sample.decoder
            del self._sample  # its buffers, before others are made
            self._sample = GridSampler(decoder, self._prompt_ids, self.config, images)

    def decode_text(self, batch: TokenBatch) -> list[list[RawCaption]]:
        """Return the captions of each image as text; needs no device."""
        return [
            [self._raw_caption(*caption) for caption in zip(tokens_NT, seeds_N, strict=True)]
            for tokens_NT, seeds_N in zip(batch.tokens_BNT.tolist(), batch.seeds_BN.tolist(), strict=True)
        ]

    def _raw_caption(self, tokens: list[int], seed: int) -> RawCaption:
        sampled = [token for token in tokens if token != NO_TOKEN]
        return RawCaption(text=self._decode(sampled), seed=seed, num_tokens=len(sampled))

    def _encode_prompt(self, limit: int) -> list[int]:
        """Return start token and prompt: BLIP puts its start in the place of [CLS] and drops the [SEP]."""
        ids = [self._start_id, *self._tokenizer(self.config.prompt).input_ids[1:-1]]
        if self.config.max_length > limit:
            raise CapfiltError(
                f"caption.max_length = {self.config.max_length}: the model ends at {limit} tokens"
            )
        if len(ids) >= self.config.max_length:
            raise CapfiltError(
                f"caption.max_length = {self.config.max_length} leaves no token after the start token and "
                f"caption.prompt = {self.config.prompt!r} ({len(ids)} tokens)"
            )
        return ids

    def _decode(self, tokens: list[int]) -> str:
        # The published vocabulary has 30,522 words, the model two more outputs: start and encoder tokens.
        ids = [token for token in (*self._prompt_ids[1:], *tokens) if token < len(self._tokenizer)]
        # BLIP's own code joins "man ' s" and "dog ." again.
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)
