"""A device without memory for a whole batch: it is halved until there is room, and what comes out is the same."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.corpus.records import Records
from pipeline.images.preprocess import decode_pixels, stack_pinned
from pipeline.models.blip.captioner import BlipCaptioner
from pipeline.models.blip.matcher import Matcher
from pipeline.models.clip.ranker import ClipRanker
from pipeline.models.device_batch import DeviceBatch
from pipeline.models.weights import captioner_weights, filter_weights, ranker_weights
from pipeline.stages.caption import CaptionWorker
from pipeline.storage.storage import Storage
from schemas.config import CaptionConfig, FilterConfig
from tests.raw_shards import commit_crawl, config_of, encoded, picture, task_of
from tests.tiny_models import save_captioner, save_matcher, save_ranker

NUM_IMAGES = 20
IMAGES = [encoded(picture(seed)) for seed in range(NUM_IMAGES)]
UIDS = [f"{number:032x}" for number in range(NUM_IMAGES)]
TEXTS = [[f"a photo of {number}", "a cat"] for number in range(NUM_IMAGES)]


class Full(nn.Module):
    """A tower on a device that holds so many images."""

    def __init__(self, tower: Callable[[Tensor], Tensor], room: int) -> None:
        super().__init__()
        self.tower, self.room = tower, room
        self.batches: list[int] = []

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        self.batches.append(len(pixels_BCHW))
        if len(pixels_BCHW) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.tower(pixels_BCHW)

    def take_at_most(self, images: int) -> None:
        self.tower.take_at_most(images)


def test_every_row_comes_once_in_order_in_the_parts_that_fit() -> None:
    parts, sizes = [], []

    def compute(rows: slice) -> list[int]:
        if rows.stop - rows.start > 8:
            raise torch.OutOfMemoryError
        parts.append(rows.stop - rows.start)
        return list(range(50))[rows]

    batch = DeviceBatch(sizes.append)
    assert [row for part in batch.map(compute, 50) for row in part] == list(range(50))
    assert sizes == [25, 12, 6] and set(parts[:-1]) == {6} and batch.images == 6
    # It stays so: what did not fit is not tried again.
    batch.map(compute, 7)
    assert parts[-2:] == [6, 1] and sizes == [25, 12, 6]


def test_no_room_for_one_image_is_an_error() -> None:
    def compute(_: slice) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    batch = DeviceBatch(lambda _: None)
    with pytest.raises(torch.OutOfMemoryError):
        batch.map(compute, 5)
    assert batch.images == 1


def captions(folder: Path, room: int) -> tuple[Any, BlipCaptioner]:
    config = CaptionConfig(model=str(folder), num_captions=3)
    engine = BlipCaptioner(config, captioner_weights(config), seed=0)
    engine.vision = Full(engine.vision, room)
    return engine(IMAGES, UIDS), engine


def scores(folder: Path, room: int) -> tuple[Any, ClipRanker]:
    engine = ClipRanker(ranker_weights(f"local-dir:{folder}", ""), "fp32")
    engine.encode_image = Full(engine.encode_image, room)
    pixels = stack_pinned([decode_pixels(image, [engine.preprocess], "exact")[0] for image in IMAGES])
    return engine.score_pixels(pixels, TEXTS), engine


def probabilities(folder: Path, room: int) -> tuple[Any, Matcher]:
    config = FilterConfig(model=str(folder))
    engine = Matcher(config, filter_weights(config))
    engine.vision = Full(engine.vision, room)
    pixels = stack_pinned([engine.prepare(image) for image in IMAGES])
    return engine.match(pixels, TEXTS), engine


@pytest.mark.parametrize(
    ("save", "results"),
    [(save_captioner, captions), (save_ranker, scores), (save_matcher, probabilities)],
    ids=["captioner", "ranker", "filter"],
)
def test_each_model_gives_the_same_on_a_device_with_less_room(
    tmp_path: Path, save: Callable[[Path], Path], results: Callable[[Path, int], tuple[Any, Any]]
) -> None:
    folder = save(tmp_path)
    expected, roomy = results(folder, NUM_IMAGES)
    actual, crowded = results(folder, 8)
    assert (roomy.batch.images, crowded.batch.images) == (None, 5)
    if results is captions:
        assert actual == expected
    elif results is scores:
        for row, expected_row in zip(actual, expected, strict=True):
            assert [score.similarity for score in row] == pytest.approx(
                [score.similarity for score in expected_row], abs=1e-6
            )
    else:
        for row, expected_row in zip(actual, expected, strict=True):
            assert row == pytest.approx(expected_row, abs=1e-6)


def test_the_batch_that_had_room_is_noted_in_the_record_and_kept_for_the_worker(tmp_path: Path) -> None:
    model = save_captioner(tmp_path)
    config = config_of(
        tmp_path / "corpus", caption={"model": str(model), "batch_size": 16, "num_captions": 2}
    )
    crawl = commit_crawl(
        config, {f"{number:09d}": {"jpg": IMAGES[number]} for number in range(NUM_IMAGES)}, {}
    )
    records = Records(Storage(config.corpus.path))
    worker = CaptionWorker(config, records)
    assert "device_batch" not in worker(task_of(config, "caption", crawl=crawl)).counts
    worker.captioner.vision = full = Full(worker.captioner.vision, 8)
    for number in (1, 2):
        task = replace(task_of(config, "caption", crawl=crawl), shard=f"{number:05d}")
        record = worker(task)
        assert (record.images, record.counts["device_batch"]) == (NUM_IMAGES, 8)
    assert full.batches == [16, 8, 8, 4, 8, 8, 4], "the second shard begins with what had room"
