"""Score captions: the cosine similarity of CLIP between an image and each of its candidates.

The legend of the names: B images, T distinct texts, P (image, text) pairs, L tokens,
E width of the embedding.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from math import isfinite
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.corpus.commit import SCORE_EDGES, ShardCommit, ShardStats, histogram
from pipeline.corpus.records import Records
from pipeline.corpus.shard_files import rows_to_table, write_parquet
from pipeline.corpus.shard_reader import CrawledShard, committed_table, open_crawled
from pipeline.images.preprocess import PixelRecipe, decode_pixels, normalise, stack_pinned
from pipeline.models.clip.loader import load_clip, load_clip_tokenizer
from pipeline.models.clip.tokenizer import ClipTokenizer
from pipeline.models.clip.towers import Encoder, ImageTower, image_encoder, text_encoder
from pipeline.models.device import compute_dtype, device_name, device_turn, worker_device
from pipeline.models.finite import not_finite, require_finite_weights
from pipeline.models.fp8 import quantise, require_fp8
from pipeline.models.weights import Weights, ranker_weights
from pipeline.prefetch import decode_threads, look_ahead
from pipeline.text import clean_caption, mark_duplicates, same_text_key
from schemas.config import CapfiltConfig, InferencePrecision
from schemas.errors import CapfiltError
from schemas.records import ShardRecord, ShardTask
from schemas.tables import CANDIDATES, CAPTIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The similarity of one text to an image, and whether the text was cut to CLIP's context for it."""

    similarity: float
    truncated: bool


class Ranker:
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
        model = _load_model(weights, self.dtype, where).to(self.device).eval()
        on_gpu = self.device.type == "cuda"
        self.encode_image = image_encoder(model, compiled_batch=batch_size if on_gpu else None)
        if precision == "fp8":
            if not isinstance(self.encode_image, ImageTower):
                raise CapfiltError(
                    f'rank.precision = "fp8": the image tower of {weights.name!r} is not of plain transformer '
                    'blocks; set "bf16"'
                )
            quantise(self.encode_image.blocks)
        self._encode_text = text_encoder(model, compiled=on_gpu)
        self._tokenize = ClipTokenizer(load_clip_tokenizer(weights, where))
        self.recipe = PixelRecipe.of_open_clip(model.visual.preprocess_cfg)

    @torch.inference_mode()
    def score_pixels(self, pixels_BCHW: Tensor, texts: Sequence[Sequence[str]]) -> list[list[Score]]:
        """Return the score of each prepared image's texts; a text is encoded once a call.

        Args:
            pixels_BCHW: uint8 as ``self.recipe`` makes them.
            texts: of each image.

        Raises:
            NotFiniteError: a score is NaN or infinite.
        """
        distinct = list(dict.fromkeys(text for row in texts for text in row))
        if not distinct:
            return [[] for _ in texts]
        pixels_BCHW = pixels_BCHW.to(self.device, non_blocking=True)
        # A GPU computes the images while this process tokenizes.
        image_BE = self._embed(self.encode_image, normalise(pixels_BCHW, self.recipe, self.dtype))
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


def _load_model(weights: Weights, dtype: torch.dtype, where: str = "rank.model") -> torch.nn.Module:
    """Load on the CPU in float32, then lower the precision of what open_clip lowers."""
    model = load_clip(weights, where, "bf16" if dtype == torch.bfloat16 else "fp32")
    require_finite_weights(model.state_dict(), f"{where} = {weights.name!r} in {weights.path}")
    return model


@dataclass(slots=True)
class _Image:
    """One image on its way: the sample's identity, its candidates' rows, the pixels for each CLIP."""

    candidates: list[dict[str, Any]]
    pixels: tuple[Tensor, ...] | None

    def texts(self) -> list[str]:
        """Return the distinct texts that can be scored."""
        return list(dict.fromkeys(row["text"] for row in self.candidates if row["text"]))


class RankWorker:
    """Score one shard per call; the weights are loaded once.

    Two calls may run at once: one has the device while the other reads, decodes or writes.
    """

    def __init__(self, config: CapfiltConfig, records: Records) -> None:
        self.config = config
        self.records = records
        rank = config.rank
        weights = [ranker_weights(rank.model, rank.pretrained)]
        if rank.rerank is not None:
            weights.append(ranker_weights(rank.rerank.model, rank.rerank.pretrained, "rank.rerank"))
        self.models = tuple(one.digest for one in weights)
        self.rankers = [
            Ranker(one, rank.precision, rank.batch_size, where)
            for one, where in zip(weights, ("rank.model", "rank.rerank.model"), strict=False)
        ]
        self._turn = Lock()

    def __call__(self, task: ShardTask) -> ShardRecord:
        """Make and commit the shard's scores; return the record that stands."""
        with ShardCommit(self.records, task) as commit, ExitStack() as stack:
            stats = commit.stats
            stats.models = self.models
            stats.device = device_name(self.rankers[0].device)
            with stats.timed("read"):
                shard = stack.enter_context(open_crawled(self.records, task.inputs["crawl"]))
                candidates = self._candidates(shard, task)
            batches = self._batches(shard, candidates, stats)
            # Decoded while another shard has the device, so that nothing waits at a shard's edge.
            first = list(islice(batches, 1))
            with device_turn(self._turn, stats):
                scored = look_ahead(partial(self._score, stats), chain(first, batches), ahead=1, threads=1)
                # A batch is read back, as Python objects, while the device scores the next.
                rows = [row for batch in scored for image in batch for row in image.candidates]
            _count(rows, shard.samples.num_rows, task.kind, stats)
            path = commit.folder / "scores.parquet"
            with stats.timed("write"):
                written = write_parquet(path, rows_to_table(rows, CANDIDATES), CANDIDATES)
            return commit.publish({"parquet": (path, written)})

    def _candidates(self, shard: CrawledShard, task: ShardTask) -> dict[str, list[dict[str, Any]]]:
        """Return the rows of each key: the synthetic captions, then those that the source's list gave."""
        rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        if "caption" in task.inputs:
            captions = committed_table(
                self.records, task.inputs["caption"].outputs["parquet"], CAPTIONS.names
            )
            for row in captions.sort_by([("key", "ascending"), ("candidate", "ascending")]).to_pylist():
                rows[row["key"]].append(row)
        samples = shard.samples.select(["uid", "source", "shard", "key", "captions"])
        for sample in samples.to_pylist():
            given = sample.pop("captions") or []
            rows[sample["key"]].extend(_given_rows(sample, given, task.kind))
        return rows

    def _batches(
        self, shard: CrawledShard, candidates: Mapping[str, list[dict[str, Any]]], stats: ShardStats
    ) -> Iterator[list[_Image]]:
        """Yield batches of images in order of key, those that do not decode included."""

        recipes = [ranker.recipe for ranker in self.rankers]

        def prepare(key: str) -> _Image:
            # Decoded once for both CLIPs.
            return _Image(
                candidates[key], decode_pixels(shard.image_bytes(key), recipes, self.config.rank.pixels)
            )

        size = self.config.rank.batch_size
        on_gpu = self.rankers[0].device.type == "cuda"
        threads = decode_threads(self.config.cluster.rank.cpus, feeds_gpu=on_gpu)
        prepared = look_ahead(prepare, shard.keys, ahead=2 * size, threads=threads)
        while True:
            with stats.timed("decode"):
                batch = list(islice(prepared, size))
            if not batch:
                return
            yield batch

    def _score(self, stats: ShardStats, batch: list[_Image]) -> list[_Image]:
        """Write score, truncated and, for the best of them, rerank_score into the candidates' rows."""
        images = [image for image in batch if image.pixels is not None]
        if not images:
            return batch
        with stats.timed("gpu"):
            self._score_with(0, "score", images, [image.texts() for image in images])
            rerank = self.config.rank.rerank
            if rerank is not None:
                best = [_best(image.candidates, rerank.first) for image in images]
                self._score_with(1, "rerank_score", images, best)
        return batch

    def _score_with(self, position: int, column: str, images: list[_Image], texts: list[list[str]]) -> None:
        pixels_BCHW = stack_pinned([image.pixels[position] for image in images])
        scores = self.rankers[position].score_pixels(pixels_BCHW, texts)
        for image, image_texts, image_scores in zip(images, texts, scores, strict=True):
            by_text = dict(zip(image_texts, image_scores, strict=True))
            for row in image.candidates:
                score = by_text.get(row["text"])
                if score is not None:
                    row[column] = score.similarity
                    row["truncated"] = row.get("truncated", False) or score.truncated


def _given_rows(sample: dict[str, Any], given: Sequence[str], origin: str) -> list[dict[str, Any]]:
    """Return the rows of the captions that came with the URL."""
    texts = [clean_caption(raw) for raw in given]
    return [
        sample
        | {"origin": origin, "candidate": index, "raw_text": raw, "text": text, "duplicate_of": earlier}
        for index, (raw, text, earlier) in enumerate(zip(given, texts, mark_duplicates(texts), strict=True))
    ]


def _best(candidates: Sequence[Mapping[str, Any]], first: int) -> list[str]:
    """Return the ``first`` distinct texts by score; the earlier candidate where scores are equal."""
    scored = sorted(
        (row for row in candidates if row.get("score") is not None), key=lambda row: -row["score"]
    )
    distinct: dict[str, str] = {}
    for row in scored:
        distinct.setdefault(same_text_key(row["text"]), row["text"])
    return list(distinct.values())[:first]


def _count(rows: Sequence[Mapping[str, Any]], num_images: int, kind: str, stats: ShardStats) -> None:
    scored = [row for row in rows if row.get("score") is not None]
    empty = sum(not row["text"] for row in rows)
    stats.rows_in = len(rows)
    stats.rows_out = len(scored)
    stats.images = num_images
    stats.count("scored", rows=len(scored))
    if empty:
        stats.count("unscored", "empty", rows=empty)
    if undecodable := len(rows) - len(scored) - empty:
        stats.count("unscored", "undecodable", rows=undecodable)
    stats.counts["truncated"] = sum(bool(row.get("truncated")) for row in scored)
    scores: dict[str, list[float]] = {"score": [], f"{kind}_score": []}
    best: dict[str, float] = {}
    for row in scored:
        scores["score" if row["origin"] == "synthetic" else f"{kind}_score"].append(row["score"])
        best[row["key"]] = max(row["score"], best.get(row["key"], -np.inf))
    stats.histograms = {
        name: histogram(values, SCORE_EDGES)
        for name, values in (scores | {"score_best": list(best.values())}).items()
    }
