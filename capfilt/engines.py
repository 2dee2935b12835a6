"""The captioner and the ranker by themselves: for a script, or a worker of ``ray.data.Dataset.map_batches``.

The engines, defaults and pixels are those of the stages, so that the same image, uid and seed give the caption that a
corpus has. Images are given as paths, encoded bytes (JPEG, PNG or WebP), PIL images or uint8 arrays (H, W, 3).
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice, zip_longest
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from torch import Tensor

from capfilt.image_input import ImageInput, encoded, require_several
from pipeline.images.preprocess import decode_pixels, stack_pinned
from pipeline.models.blip import captioner as blip
from pipeline.models.clip import ranker as clip
from pipeline.models.weights import captioner_weights, ranker_weights
from pipeline.prefetch import decode_threads, prefetch_map
from pipeline.text import clean_caption
from schemas.config import CaptionConfig, RankConfig
from schemas.errors import CapfiltError, did_you_mean

S = TypeVar("S", bound=BaseModel)


def caption(
    images: Iterable[ImageInput], *, uids: Iterable[str] | None = None, seed: int = 0, **options: Any
) -> list[list[str] | None]:
    """Return the captions of each image, sampled as the caption stage samples them.

    The model is loaded at the first call, and kept until a call names other options.

    Args:
        images: paths, encoded bytes, PIL images or uint8 arrays (H, W, 3).
        uids: an identity for each image, which decides its random numbers together with ``seed``. By default a digest
            of its pixels: the same image has the same captions, whatever it is captioned with.
        seed: as ``corpus.seed``.
        options: keys of ``[caption]`` (docs/config.md) with their defaults: ``model``, ``num_captions``, ``top_p``...

    Returns:
        ``num_captions`` texts for each image, cleaned as in the table ``candidates``; None for an image that does not
        decode.

    Raises:
        CapfiltError: an option is wrong, the model cannot be loaded, or a path is not there.
    """
    require_several(images)
    return _loaded_captioner(_section(CaptionConfig, "caption", options), seed).caption(images, uids)


def rank(
    images: Iterable[ImageInput], texts: Iterable[Sequence[str] | None], **options: Any
) -> list[list[float] | None]:
    """Return the cosine similarity of each image with each of its texts, as the rank stage scores them.

    The model is loaded at the first call, and kept until a call names other options.

    Args:
        images: as in ``caption``.
        texts: of each image, a list of texts; None where there is none, as for an image without captions.
        options: keys of ``[rank]`` but for ``rerank``: ``model``, ``pretrained``, ...; ``pretrained`` is "" by default
            for a model of ``hf-hub:`` or ``local-dir:``.

    Returns:
        The scores of each image's texts, in their order; None for an image that does not decode.

    Raises:
        CapfiltError: an option is wrong, the model cannot be loaded, a path is not there, or the numbers of images and
            texts differ.
    """
    require_several(images)
    return _loaded_ranker(_rank_section(options)).rank(images, texts)


class Captioner:
    """BLIP, loaded once. In Ray Data, on two GPUs::

    images.map_batches(capfilt.Captioner, fn_constructor_kwargs={"num_captions": 5}, batch_size=64,
                       num_gpus=1, compute=ray.data.ActorPoolStrategy(size=2))
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        image_column: str = "image",
        uid_column: str | None = None,
        captions_column: str = "captions",
        **options: Any,
    ) -> None:
        """Load the model.

        Args:
            seed: as ``corpus.seed``.
            image_column: of a batch, for ``__call__``.
            uid_column: of a batch; None: as ``uids`` of ``caption``.
            captions_column: that ``__call__`` adds.
            options: as in ``capfilt.caption``.
        """
        self.config = _section(CaptionConfig, "caption", options)
        self._columns = image_column, uid_column, captions_column
        self._engine = blip.BlipCaptioner(self.config, captioner_weights(self.config), seed)

    def caption(
        self, images: Iterable[ImageInput], uids: Iterable[str] | None = None
    ) -> list[list[str] | None]:
        """Return the captions of each image; see ``capfilt.caption``."""
        prepared = _prepare(images, self._engine.prepare, self.config.batch_size, self._engine.device.type)
        return list(_answers(_with_uids(prepared, uids), self.config.batch_size, self._caption_batch))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch of Ray Data (a dict of columns) with a column of captions more."""
        images, uid_column, captions = self._columns
        uids = None if uid_column is None else map(str, batch[uid_column])
        return {**batch, captions: self.caption(batch[images], uids)}

    def _caption_batch(self, batch: Sequence[tuple[Tensor, str]]) -> list[list[str]]:
        pixels, uids = zip(*batch, strict=True)
        raw = self._engine.decode_text(self._engine.generate(self._engine.load(pixels, uids)))
        return [[clean_caption(caption.text, self.config.prompt) for caption in captions] for captions in raw]


class Ranker:
    """CLIP, loaded once; for Ray Data as ``Captioner``."""

    def __init__(
        self,
        *,
        image_column: str = "image",
        captions_column: str = "captions",
        scores_column: str = "scores",
        **options: Any,
    ) -> None:
        """Load the model.

        Args:
            image_column: of a batch, for ``__call__``.
            captions_column: of a batch: the texts of each image.
            scores_column: that ``__call__`` adds.
            options: as in ``capfilt.rank``.
        """
        self.config = _rank_section(options)
        self._columns = image_column, captions_column, scores_column
        weights = ranker_weights(self.config.model, self.config.pretrained)
        self._engine = clip.ClipRanker(weights, self.config.precision, self.config.batch_size)

    def rank(
        self, images: Iterable[ImageInput], texts: Iterable[Sequence[str] | None]
    ) -> list[list[float] | None]:
        """Return the scores of each image's texts; see ``capfilt.rank``."""
        prepared = _prepare(images, self._pixels, self.config.batch_size, self._engine.device.type)
        pairs = _paired(prepared, map(_text_list, texts), "texts")
        return list(_answers(pairs, self.config.batch_size, self._score_batch))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch of Ray Data (a dict of columns) with a column of scores more."""
        images, captions, scores = self._columns
        # As lists again: of NumPy's arrays of texts Ray makes no column of Arrow's.
        texts = [None if row is None else list(row) for row in batch[captions]]
        return {**batch, captions: texts, scores: self.rank(batch[images], texts)}

    def _pixels(self, data: bytes) -> Tensor | None:
        pixels = decode_pixels(data, [self._engine.preprocess], self.config.pixels)
        return None if pixels is None else pixels[0]

    def _score_batch(self, batch: Sequence[tuple[Tensor, list[str]]]) -> list[list[float]]:
        pixels, texts = zip(*batch, strict=True)
        scores = self._engine.score_pixels(stack_pinned(pixels), texts)
        return [[score.similarity for score in row] for row in scores]


@lru_cache(maxsize=1)
def _loaded_captioner(config: CaptionConfig, seed: int) -> Captioner:
    return Captioner(seed=seed, **config.model_dump())


@lru_cache(maxsize=1)
def _loaded_ranker(config: RankConfig) -> Ranker:
    return Ranker(**config.model_dump(exclude={"rerank"}))


# -- options -------------------------------------------------------------------------------------------------


def _section(kind: type[S], where: str, options: Mapping[str, Any]) -> S:
    """Return a section of the config with these keys. Raises CapfiltError that names every wrong one."""
    values = {
        name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in options.items()
    }
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = []
        for detail in error.errors():
            name = ".".join(map(str, detail["loc"]))
            if detail["type"] == "extra_forbidden":
                lines.append(f"{where} has no option {name!r}{did_you_mean(name, kind.model_fields)}")
            else:
                lines.append(f"{where}: {name} = {detail['input']!r}: {detail['msg']}")
        raise CapfiltError("\n".join(lines)) from None


def _rank_section(options: Mapping[str, Any]) -> RankConfig:
    if options.get("rerank") is not None:
        raise CapfiltError("rank: a second CLIP (rerank) is the stage's: score with two calls")
    is_folder = str(options.get("model", "")).startswith(("hf-hub:", "local-dir:"))
    return _section(RankConfig, "rank", ({"pretrained": ""} if is_folder else {}) | dict(options))


# -- batches -------------------------------------------------------------------------------------------------

_MISSING: Any = object()
Item = TypeVar("Item")
Answer = TypeVar("Answer")


def _prepare(
    images: Iterable[ImageInput], pixels: Callable[[bytes], Tensor | None], size: int, device: str
) -> Iterator[Tensor | None]:
    """Yield the pixels of each image as the model takes them, decoded ahead of it; None where it does not decode."""
    threads = decode_threads(1, feeds_gpu=device == "cuda")
    return prefetch_map(lambda image: pixels(encoded(image)), images, ahead=2 * size, threads=threads)


def _with_uids(
    prepared: Iterator[Tensor | None], uids: Iterable[str] | None
) -> Iterator[tuple[Tensor | None, str]]:
    if uids is not None:
        return _paired(prepared, uids, "uids")
    return ((pixels, "" if pixels is None else _digest(pixels)) for pixels in prepared)


def _digest(pixels_CHW: Tensor) -> str:
    """Return an identity in the form of a corpus's: of the pixels that the model sees, in whatever form they came."""
    return hashlib.sha256(pixels_CHW.numpy().tobytes()).hexdigest()[:32]


def _text_list(texts: Sequence[str] | None) -> list[str]:
    """Return the texts of one image; None, the captions of an image that does not decode, has none."""
    if isinstance(texts, str):
        raise CapfiltError(f"texts: of each image a list of texts is expected, not {texts[:40]!r} alone")
    texts = [] if texts is None else list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise CapfiltError(f"texts: {text!r} is not a text")
    return texts


def _paired(
    images: Iterable[Tensor | None], others: Iterable[Item], name: str
) -> Iterator[tuple[Tensor | None, Item]]:
    for pixels, other in zip_longest(images, others, fillvalue=_MISSING):
        if pixels is _MISSING or other is _MISSING:
            raise CapfiltError(f"images and {name}: their numbers differ")
        yield pixels, other


def _answers(
    items: Iterator[tuple[Tensor | None, Item]],
    size: int,
    work: Callable[[Sequence[tuple[Tensor, Item]]], Sequence[Answer]],
) -> Iterator[Answer | None]:
    """Yield the model's answer for each image, batch by batch; None for those without pixels, which it does not see."""
    while batch := list(islice(items, size)):
        decoded = [(pixels, item) for pixels, item in batch if pixels is not None]
        answers = iter(work(decoded) if decoded else ())
        yield from [None if pixels is None else next(answers) for pixels, _ in batch]
