"""Caption a shard: N nucleus samples of BLIP for each image that the crawl stored.

A caption is a function of (run seed, uid, sample index, image, weights, ``[caption]``): batch size, order and
worker do not enter. What remains is floating-point rounding, which depends on the shape of the batch and on
the device: a token falls the other way where its uniform number lies within it of a boundary. In float32 that
is rarer than one token in 90,000 (none of so many differed between batch sizes 1, 3, 16, 32 and 64); bfloat16
is coarser, so a corpus that must come out the same again keeps its batch size.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BlipForConditionalGeneration, GenerationConfig

from pipeline.corpus.commit import LENGTH_EDGES, ShardCommit, ShardStats, histogram
from pipeline.corpus.records import Records
from pipeline.corpus.shard_files import rows_to_table, write_parquet
from pipeline.corpus.shard_reader import CrawledShard, open_crawled
from pipeline.images.preprocess import PixelRecipe, decode_pixels, normalise, stack_pinned
from pipeline.models.blip.decoder import Decoder
from pipeline.models.blip.generation import NOT_FINITE, NOTHING, GridSampler, RowSampler
from pipeline.models.blip.vision import VisionTower
from pipeline.models.device import compute_dtype, device_name, device_turn, worker_device
from pipeline.models.finite import not_finite
from pipeline.models.fp8 import quantise, require_fp8
from pipeline.models.transformers_loader import load_image_processor, load_model, load_tokenizer
from pipeline.models.weights import Weights, captioner_weights
from pipeline.prefetch import decode_threads, look_ahead
from pipeline.rng import caption_seeds, uniforms
from pipeline.text import clean_caption, count_words, mark_duplicates
from schemas.config import CapfiltConfig, CaptionConfig
from schemas.errors import CapfiltError
from schemas.records import ShardRecord, ShardTask
from schemas.tables import CAPTIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class RawCaption:
    """A sampled caption: text with prompt, seed of its stream, number of tokens sampled (end included)."""

    text: str
    seed: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """A batch as the device fetches it: stacked levels and the uniform numbers of their captions."""

    pixels_BCHW: Tensor
    uniforms_BNT: Tensor
    seeds_BN: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A batch's captions as the model says them, on the CPU; NOTHING follows each end."""

    tokens_BNT: Tensor
    seeds_BN: np.ndarray


class Captioner:
    """BLIP with its preprocessing and tokenizer, on the device of this process."""

    def __init__(self, config: CaptionConfig, weights: Weights, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.name = weights.name
        self.device = worker_device()
        self.dtype = compute_dtype(config.precision, self.device)
        if config.precision == "fp8":
            require_fp8("caption", self.device)
        on_gpu = self.device.type == "cuda"
        self._tokenizer = load_tokenizer(Path(weights.path), "caption.model")
        model = _load_model(weights)
        self.recipe = PixelRecipe.of_blip(
            load_image_processor(Path(weights.path), model.config.vision_config.image_size, "caption.model")
        )
        model = model.to(self.device, self.dtype).eval()
        self._start_id = model.config.text_config.bos_token_id
        self._prompt_ids = self._encode_prompt(model.config.text_config.max_position_embeddings)
        self.vision = VisionTower(model.vision_model, config.batch_size if on_gpu else None)
        if config.precision == "fp8":
            quantise(self.vision.blocks)
        decoder = Decoder(model.text_decoder, compiled=on_gpu).eval()
        self._sample = (
            GridSampler(decoder, self._prompt_ids, config, config.batch_size)
            if on_gpu
            else RowSampler(decoder, self._prompt_ids, config)
        )

    def prepare(self, data: bytes) -> Tensor | None:
        """Return the pixels of an encoded image, uint8 (C, H, W), or None where it does not decode."""
        pixels = decode_pixels(data, [self.recipe], self.config.pixels)
        return None if pixels is None else pixels[0]

    def __call__(self, images: Sequence[bytes], uids: Sequence[str]) -> list[list[RawCaption]]:
        """Return ``num_captions`` captions for each encoded image; all of them must decode."""
        return self.texts(self.sample([self.prepare(data) for data in images], uids))

    def sample(self, pixels: Sequence[Tensor], uids: Sequence[str]) -> Sampled:
        """Sample the captions of prepared images, at most ``batch_size`` of them."""
        return self.compute(self.gather(pixels, uids))

    def gather(self, pixels: Sequence[Tensor], uids: Sequence[str]) -> Gathered:
        """Bring prepared images together, at most ``batch_size``: some 50 ms of a CPU core for 256."""
        seeds_BN = caption_seeds(self.seed, uids, self.config.num_captions)
        num_steps = self.config.max_length - len(self._prompt_ids)
        return Gathered(
            pixels_BCHW=stack_pinned(pixels),
            uniforms_BNT=torch.from_numpy(uniforms(seeds_BN, num_steps)),
            seeds_BN=seeds_BN,
        )

    def compute(self, batch: Gathered) -> Sampled:
        """Sample a batch's captions. What the device does, and nothing else.

        Raises NotFiniteError where logits are NaN or infinite.
        """
        # Not from pinned memory, so that this waits for the device: before the tower it has nothing to do.
        uniforms_BNT = batch.uniforms_BNT.to(self.device)
        pixels_BCHW = batch.pixels_BCHW.to(self.device, non_blocking=True)
        image_BPE = self.vision(normalise(pixels_BCHW, self.recipe, self.dtype))
        tokens_BNT = self._sample(image_BPE, uniforms_BNT).cpu()
        if bool((tokens_BNT == NOT_FINITE).any()):
            raise not_finite(f"the logits of caption.model = {self.name!r}")
        return Sampled(tokens_BNT=tokens_BNT, seeds_BN=batch.seeds_BN)

    def texts(self, sampled: Sampled) -> list[list[RawCaption]]:
        """Return sampled captions as text. What the device does not do."""
        return [
            [self._raw_caption(*caption) for caption in zip(tokens_NT, seeds_N, strict=True)]
            for tokens_NT, seeds_N in zip(sampled.tokens_BNT.tolist(), sampled.seeds_BN.tolist(), strict=True)
        ]

    def _raw_caption(self, tokens: list[int], seed: int) -> RawCaption:
        said = [token for token in tokens if token != NOTHING]
        return RawCaption(text=self._decode(said), seed=seed, num_tokens=len(said))

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


def _load_model(weights: Weights) -> BlipForConditionalGeneration:
    """Load in float32 on the CPU; refuse files that leave a part of the model untrained."""
    model = load_model(
        BlipForConditionalGeneration, Path(weights.path), "caption.model", weights.name, dtype=torch.float32
    )
    # Generation settings that came with the files must not fill what a call leaves open.
    model.text_decoder.generation_config = GenerationConfig()
    return model


Batch = tuple[list[dict[str, Any]], Gathered]


class CaptionWorker:
    """Caption one shard per call; the weights are loaded once.

    Two calls may run at once: one has the device while the other reads, decodes or writes.
    """

    def __init__(self, config: CapfiltConfig, records: Records) -> None:
        self.config = config
        self.records = records
        self.weights = captioner_weights(config.caption)
        self.models = (self.weights.digest,)
        self.captioner = Captioner(config.caption, self.weights, config.corpus.seed)
        self._turn = Lock()

    def __call__(self, task: ShardTask) -> ShardRecord:
        """Make and commit the shard's captions; return the record that stands."""
        with ShardCommit(self.records, task) as commit, ExitStack() as stack:
            stats = commit.stats
            stats.models = self.models
            stats.device = device_name(self.captioner.device)
            with stats.timed("read"):
                shard = stack.enter_context(open_crawled(self.records, task.inputs["crawl"]))
            batches = self._batches(shard, stats)
            # Decoded while another shard has the device, so that nothing waits at a shard's edge.
            first = list(islice(batches, 1))
            with (
                device_turn(self._turn, stats),
                # Closed before the turn ends, however it ends: the engine's buffers are one batch's at a time.
                closing(
                    look_ahead(partial(self._sample, stats), chain(first, batches), ahead=2, threads=1)
                ) as sampled,
            ):
                # Batches are gathered, and texts made, while the device samples another.
                rows = [row for batch in sampled for row in self._rows(*batch)]
            self._count(rows, shard.samples.num_rows, stats)
            path = commit.folder / "captions.parquet"
            with stats.timed("write"):
                written = write_parquet(path, rows_to_table(rows, CAPTIONS), CAPTIONS)
            return commit.publish({"parquet": (path, written)})

    def _batches(self, shard: CrawledShard, stats: ShardStats) -> Iterator[Batch]:
        """Yield batches in order of key; images that do not decode are left out."""

        def prepare(sample: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
            return sample, self.captioner.prepare(shard.image_bytes(sample["key"]))

        size = self.config.caption.batch_size
        samples = shard.samples.select(["uid", "source", "shard", "key"]).to_pylist()
        threads = decode_threads(
            self.config.cluster.caption.cpus, feeds_gpu=self.captioner.device.type == "cuda"
        )
        prepared = look_ahead(prepare, samples, ahead=2 * size, threads=threads)
        decodable = ((sample, pixels) for sample, pixels in prepared if pixels is not None)
        while True:
            with stats.timed("decode"):
                batch = list(islice(decodable, size))
                if not batch:
                    return
                kept, pixels = zip(*batch, strict=True)
                gathered = self.captioner.gather(pixels, [sample["uid"] for sample in kept])
            yield list(kept), gathered

    def _sample(self, stats: ShardStats, batch: Batch) -> tuple[list[dict[str, Any]], Sampled]:
        samples, gathered = batch
        with stats.timed("gpu"):
            return samples, self.captioner.compute(gathered)

    def _rows(self, samples: list[dict[str, Any]], sampled: Sampled) -> list[dict[str, Any]]:
        """Return the rows of one batch of images."""
        rows = []
        for sample, raw in zip(samples, self.captioner.texts(sampled), strict=True):
            texts = [clean_caption(caption.text, self.config.caption.prompt) for caption in raw]
            for index, (caption, text, earlier) in enumerate(
                zip(raw, texts, mark_duplicates(texts), strict=True)
            ):
                rows.append(
                    sample
                    | {
                        "origin": "synthetic",
                        "candidate": index,
                        "raw_text": caption.text,
                        "text": text,
                        "seed": caption.seed,
                        "num_tokens": caption.num_tokens,
                        "duplicate_of": earlier,
                    }
                )
        return rows

    def _count(self, rows: list[dict[str, Any]], num_images: int, stats: ShardStats) -> None:
        num_captions = self.config.caption.num_captions
        duplicates = sum(row["duplicate_of"] is not None for row in rows)
        stats.rows_in = num_images
        stats.rows_out = len(rows)
        stats.images = len(rows) // num_captions
        stats.count("ok", rows=stats.images)
        if undecodable := num_images - stats.images:
            stats.count("failed", "undecodable", rows=undecodable)
        assert stats.images * num_captions == len(rows), (
            "an image has more or fewer captions than the config says"
        )
        stats.counts["duplicate"] = duplicates
        stats.histograms = {
            "caption_words": histogram(np.array([count_words(row["text"]) for row in rows]), LENGTH_EDGES),
            "caption_tokens": histogram(np.array([row["num_tokens"] for row in rows]), LENGTH_EDGES),
        }
