"""Caption a shard: N nucleus samples of BLIP for each image that the crawl stored.

A caption is a function of (run seed, uid, sample index, image, weights, ``[caption]``): batch size, order and
worker do not enter. What remains is floating-point rounding, which depends on the shape of the batch and on
the device: a token falls the other way where its uniform number lies within it of a boundary. In float32 that
is rarer than one token in 90,000 (none of so many differed between batch sizes 1, 3, 16, 32 and 64); bfloat16
is coarser, so a corpus that must come out the same again keeps its batch size.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipImageProcessorPil, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from pipeline.attempt import Attempt, Tally
from pipeline.committed import CrawledShard, open_crawled
from pipeline.decoding import sample_captions
from pipeline.device import compute_dtype, device_name, worker_device
from pipeline.histograms import LENGTH_EDGES, histogram
from pipeline.images import Image
from pipeline.lookahead import look_ahead
from pipeline.records import Records
from pipeline.sampling import caption_seeds, uniforms
from pipeline.shards import rows_to_table, write_parquet
from pipeline.texts import clean_caption, count_words, mark_duplicates
from pipeline.weights import Weights, captioner_weights
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


class Captioner:
    """BLIP with its preprocessing and tokenizer, on the device of this process."""

    def __init__(self, config: CaptionConfig, weights: Weights, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.device = worker_device()
        self.dtype = compute_dtype(config.precision, self.device)
        # Pillow's resize, as BLIP was trained with; the torchvision one differs by up to a level.
        self._processor = BlipImageProcessorPil.from_pretrained(weights.path, local_files_only=True)
        self._tokenizer = AutoTokenizer.from_pretrained(
            weights.path, local_files_only=True, trust_remote_code=False
        )
        self._model = _load_model(weights).to(self.device, self.dtype).eval()
        self._prompt_ids = self._encode_prompt()

    def prepare(self, image: Image.Image) -> Tensor:
        """Return the pixels of one RGB image as the model takes them: float32 of shape (C, H, W)."""
        return self._processor(image, return_tensors="pt").pixel_values[0]

    def __call__(self, images: Sequence[Image.Image], uids: Sequence[str]) -> list[list[RawCaption]]:
        """Return ``num_captions`` captions for each image."""
        return self.caption_pixels(torch.stack([self.prepare(image) for image in images]), uids)

    def caption_pixels(self, pixels_BCHW: Tensor, uids: Sequence[str]) -> list[list[RawCaption]]:
        """Return ``num_captions`` captions for each prepared image."""
        seeds_BN = caption_seeds(self.seed, uids, self.config.num_captions)
        uniforms_BNT = torch.from_numpy(uniforms(seeds_BN, self.config.max_length - len(self._prompt_ids)))
        tokens = sample_captions(
            self._model,
            pixels_BCHW.to(self.device, self.dtype),
            self._prompt_ids,
            uniforms_BNT.to(self.device),
            self.config,
        )
        return [
            [
                RawCaption(text=self._decode(row), seed=int(seed), num_tokens=len(row))
                for row, seed in zip(rows, seeds_N, strict=True)
            ]
            for rows, seeds_N in zip(tokens, seeds_BN, strict=True)
        ]

    def _encode_prompt(self) -> list[int]:
        """Return start token and prompt: BLIP puts its start in the place of [CLS] and drops the [SEP]."""
        prompt = self._tokenizer(self.config.prompt).input_ids[1:-1]
        ids = [self._model.config.text_config.bos_token_id, *prompt]
        limit = self._model.config.text_config.max_position_embeddings
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
    disable_progress_bar()
    try:
        model, info = BlipForConditionalGeneration.from_pretrained(
            weights.path,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CapfiltError(
            f"caption.model = {weights.name!r} in {weights.path} does not load: {error}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise CapfiltError(
            f"caption.model = {weights.name!r} in {weights.path} is no BLIP captioner: {len(missing)} "
            f"tensors are missing, {missing[0]} first"
        )
    # Generation settings that came with the files must not fill what a call leaves open.
    model.text_decoder.generation_config = GenerationConfig()
    return model


class CaptionWorker:
    """Caption one shard per call; the weights are loaded once."""

    def __init__(self, config: CapfiltConfig, records: Records) -> None:
        self.config = config
        self.records = records
        self.weights = captioner_weights(config.caption)
        self.models = (self.weights.digest,)
        self.captioner = Captioner(config.caption, self.weights, config.corpus.seed)

    def __call__(self, task: ShardTask) -> ShardRecord:
        """Make and commit the shard's captions; return the record that stands."""
        with Attempt(self.records, task) as attempt, ExitStack() as stack:
            tally = attempt.tally
            tally.models = self.models
            tally.device = device_name(self.captioner.device)
            with tally.timed("read"):
                shard = stack.enter_context(open_crawled(self.records, task.inputs["crawl"]))
            rows = [row for batch in self._batches(shard, tally) for row in self._caption(batch, tally)]
            self._count(rows, shard.samples.num_rows, tally)
            path = attempt.folder / "captions.parquet"
            with tally.timed("write"):
                written = write_parquet(path, rows_to_table(rows, CAPTIONS), CAPTIONS)
            return attempt.commit({"parquet": (path, written)})

    def _batches(self, shard: CrawledShard, tally: Tally) -> Iterator[list[tuple[dict[str, Any], Tensor]]]:
        """Yield batches of (sample, pixels) in order of key; images that do not decode are left out."""

        def prepare(sample: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
            image = shard.image(sample["key"])
            return sample, None if image is None else self.captioner.prepare(image)

        size = self.config.caption.batch_size
        samples = shard.samples.select(["uid", "source", "shard", "key"]).to_pylist()
        threads = int(self.config.cluster.caption.cpus)
        prepared = look_ahead(prepare, samples, ahead=2 * size, threads=threads)
        decodable = ((sample, pixels) for sample, pixels in prepared if pixels is not None)
        while True:
            with tally.timed("decode"):
                batch = list(islice(decodable, size))
            if not batch:
                return
            yield batch

    def _caption(self, batch: list[tuple[dict[str, Any], Tensor]], tally: Tally) -> list[dict[str, Any]]:
        """Return the rows of one batch of images."""
        samples = [sample for sample, _ in batch]
        with tally.timed("gpu"):
            captions = self.captioner.caption_pixels(
                torch.stack([pixels for _, pixels in batch]), [sample["uid"] for sample in samples]
            )
        rows = []
        for sample, raw in zip(samples, captions, strict=True):
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

    def _count(self, rows: list[dict[str, Any]], num_images: int, tally: Tally) -> None:
        num_captions = self.config.caption.num_captions
        duplicates = sum(row["duplicate_of"] is not None for row in rows)
        tally.rows_in = num_images
        tally.rows_out = len(rows)
        tally.images = len(rows) // num_captions
        tally.count("ok", rows=tally.images)
        if undecodable := num_images - tally.images:
            tally.count("failed", "undecodable", rows=undecodable)
        assert tally.images * num_captions == len(rows), (
            "an image has more or fewer captions than the config says"
        )
        tally.counts["duplicate"] = duplicates
        tally.histograms = {
            "caption_words": histogram(np.array([count_words(row["text"]) for row in rows]), LENGTH_EDGES),
            "caption_tokens": histogram(np.array([row["num_tokens"] for row in rows]), LENGTH_EDGES),
        }
