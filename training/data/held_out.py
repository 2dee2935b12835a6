"""Held-out images: the samples that a run does not train on, read for its validation."""

import contextlib
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from torch import Tensor

from pipeline.corpus.records import Records
from pipeline.images.decode import ImageError
from pipeline.images.preprocess import resize
from pipeline.storage.storage import Storage
from schemas.pretrain import DataConfig, PretrainConfig
from training.data.shard_index import open_shard
from training.data.snapshot import Snapshot
from training.data.transforms import NoCaptionError, decode, usable_captions


class HeldOut(NamedTuple):
    """A held-out image, resized to a square, and its captions, cleaned, best first."""

    pixels_CHW: Tensor
    captions: list[str]
    uid: str


def held_out_samples(config: PretrainConfig, snapshot: Snapshot, limit: int | None = None) -> list[HeldOut]:
    """Return the images of ``data.held_out``, or the first ``limit`` of them; unusable ones are left out.

    Reads the few shards that hold them, each checked against its record.
    """
    return list(islice(_held_out(config.data, snapshot), limit))


def _held_out(data: DataConfig, snapshot: Snapshot) -> Iterator[HeldOut]:
    size_px = (data.image_size_px, data.image_size_px)
    for source in snapshot.sources:
        for shard in filter(lambda shard: shard.held_out, source.shards):
            with open_shard(Records(Storage(shard.corpus)), shard) as opened:
                for sample in opened.held_out():
                    with contextlib.suppress(ImageError, NoCaptionError):
                        captions = usable_captions(
                            sample.captions, source.first_captions(data), data.max_words
                        )
                        pixels_CHW = resize(decode(sample.image), size_px).contiguous()
                        yield HeldOut(pixels_CHW, captions, sample.uid)
