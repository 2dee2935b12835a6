"""Captions: the same whatever the batch, the order and the worker; distributed as transformers samples."""

import dataclasses
import itertools
import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from raw_shards import commit_crawl, config_of, encoded, picture, task_of
from tiny_models import END_ID, START_ID, WORDS, save_captioner
from transformers import (
    BlipForConditionalGeneration,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.corpus.records import Records
from pipeline.digests import sha256_file
from pipeline.images.preprocess import normalise
from pipeline.models.blip.captioner import BlipCaptioner, RawCaption
from pipeline.models.blip.nucleus import Nucleus, draw, nucleus
from pipeline.models.weights import captioner_weights
from pipeline.rng import stream_seed, uniforms
from pipeline.stages.caption import CaptionWorker
from pipeline.storage.storage import Storage
from pipeline.text import clean_caption
from schemas.config import CaptionConfig
from schemas.errors import CapfiltError, CorruptShardError
from schemas.records import OutputFile
from schemas.tables import CAPTIONS

NUM_IMAGES = 20
UIDS = [f"{index:032x}" for index in range(NUM_IMAGES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_captioner(tmp_path_factory.mktemp("captioner"))


@pytest.fixture(scope="module")
def images() -> list:
    return [encoded(picture(seed)) for seed in range(NUM_IMAGES)]


def captioner(folder: Path, seed: int = 0, **values: object) -> BlipCaptioner:
    config = CaptionConfig(model=str(folder), **values)
    return BlipCaptioner(config, captioner_weights(config), seed)


def in_batches(
    engine: BlipCaptioner, images: list, order: list[int], size: int
) -> dict[str, list[RawCaption]]:
    captions = {}
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        result = engine([images[index] for index in batch], [UIDS[index] for index in batch])
        captions |= {UIDS[index]: row for index, row in zip(batch, result, strict=True)}
    return captions


def test_the_same_at_any_batch_size_and_in_any_order(folder: Path, images: list) -> None:
    engine = captioner(folder)
    order = list(range(NUM_IMAGES))
    reference = in_batches(engine, images, order, 1)
    assert in_batches(engine, images, order, 3) == reference
    assert in_batches(engine, images, order, 16) == reference
    random.Random(1).shuffle(order)
    assert in_batches(captioner(folder), images, order, 16) == reference
    # And the test can fail: the captions differ between images, samples and seeds.
    texts = [caption.text for row in reference.values() for caption in row]
    assert len(set(texts)) > len(texts) / 2
    assert in_batches(captioner(folder, seed=1), images, order, 16) != reference


def test_captions_follow_the_image(folder: Path, images: list) -> None:
    engine = captioner(folder)
    first, second = engine([images[0], images[1]], [UIDS[0], UIDS[0]])
    assert [caption.seed for caption in first] == [caption.seed for caption in second]
    assert [caption.text for caption in first] != [caption.text for caption in second]


def test_more_samples_extend_what_is_there(folder: Path, images: list) -> None:
    few = captioner(folder, num_captions=3)(images[:2], UIDS[:2])
    many = captioner(folder, num_captions=12)(images[:2], UIDS[:2])
    assert [row[:3] for row in many] == few


def test_lengths_seeds_and_vocabulary(folder: Path, images: list) -> None:
    rows = captioner(folder, seed=9, min_length=6, max_length=12)(images, UIDS)
    for uid, row in zip(UIDS, rows, strict=True):
        assert [caption.seed for caption in row] == [stream_seed(9, uid, index) for index in range(10)]
        for caption in row:
            # The start counts to both lengths; the end is sampled once min_length tokens are there.
            assert 6 <= caption.num_tokens <= 11
            assert len(caption.text.replace(".", " . ").split()) <= 11
    lengths = {caption.num_tokens for row in rows for caption in row}
    assert len(lengths) > 3


def test_the_prompt_begins_every_caption_and_is_cut_off(folder: Path, images: list) -> None:
    rows = captioner(folder, prompt="a picture of ", max_length=15)(images[:4], UIDS[:4])
    for caption in itertools.chain.from_iterable(rows):
        assert caption.text.startswith("a picture of")
        assert caption.num_tokens <= 11
        assert not clean_caption(caption.text, "a picture of ").startswith("a picture of ")
    with pytest.raises(CapfiltError, match=r"caption\.max_length = 4 .*'a picture of '"):
        captioner(folder, prompt="a picture of ", max_length=4, min_length=0)


def random_logits(rows: int, vocabulary: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, vocabulary, generator=generator) * 2


KNOBS = [
    {"top_p": 0.9, "top_k": 0, "repetition_penalty": 1.0},
    {"top_p": 0.9, "top_k": 10, "repetition_penalty": 1.1},
    {"top_p": 1.0, "top_k": 50, "repetition_penalty": 1.5, "temperature": 0.7},
    {"top_p": 0.5, "top_k": 0, "repetition_penalty": 0.8, "temperature": 2.0, "min_length": 9},
    {"top_p": 0.01, "top_k": 3},
]


@pytest.mark.parametrize("knobs", KNOBS, ids=range(len(KNOBS)))
def test_the_distribution_is_that_of_transformers(knobs: dict) -> None:
    config = CaptionConfig(**knobs)
    logits_RV = random_logits(4)
    tokens_RL = torch.randint(0, 50, (4, 5), generator=torch.Generator().manual_seed(4))
    reference = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(config.repetition_penalty),
            MinLengthLogitsProcessor(config.min_length, END_ID),
            TemperatureLogitsWarper(config.temperature),
            *([TopKLogitsWarper(config.top_k)] if config.top_k else []),
            TopPLogitsWarper(config.top_p),
        ]
    )
    expected_RV = reference(tokens_RL, logits_RV.clone()).softmax(-1)
    # A grid of uniform numbers measures each token's share to 1 / draws.
    num_draws = 20_000
    grid = torch.arange(num_draws, dtype=torch.float64) / num_draws
    for row in range(4):
        choice = nucleus(logits_RV[row : row + 1].clone(), tokens_RL[row : row + 1], 5, END_ID, config)
        chosen = draw(Nucleus(*(part.expand(num_draws, -1) for part in choice)), grid)
        assert (chosen.diff() >= 0).all(), "vocabulary order: a larger number, a later token"
        shares_V = torch.bincount(chosen, minlength=50) / num_draws
        assert torch.allclose(shares_V, expected_RV[row], atol=2 / num_draws)


def test_extreme_numbers_choose_tokens_that_may_be_chosen() -> None:
    config = CaptionConfig(top_p=0.6, top_k=20, repetition_penalty=1.0, min_length=0)
    logits_RV = random_logits(200)
    allowed_RV = torch.isfinite(TopPLogitsWarper(0.6)(None, TopKLogitsWarper(20)(None, logits_RV)))
    start_RL = torch.full((200, 1), 0)
    first_R, last_R = allowed_RV.int().argmax(-1), 49 - allowed_RV.flip(-1).int().argmax(-1)
    for number, expected_R in ((0.0, first_R), (1 - 2**-53, last_R)):
        number_R = torch.full((200,), number, dtype=torch.float64)
        choice = nucleus(logits_RV.clone(), start_RL, 1, END_ID, config)
        assert (draw(choice, number_R) == expected_R).all()


def test_greedy_limit_equals_greedy_generation(folder: Path, images: list) -> None:
    engine = captioner(folder, top_k=1, repetition_penalty=1.0, min_length=0, num_captions=2)
    pixels = normalise(
        torch.stack([engine.prepare(image) for image in images]), engine.preprocess, torch.float32
    )
    model = BlipForConditionalGeneration.from_pretrained(folder)
    greedy = model.generate(pixels, do_sample=False, max_length=20, min_length=0, repetition_penalty=1.0)
    for row, tokens in zip(engine(images, UIDS), greedy.tolist(), strict=True):
        spoken = tokens[1 : tokens.index(END_ID)] if END_ID in tokens else tokens[1:]
        for caption in row:
            assert caption.text == engine._decode(spoken)


def test_generation_settings_of_the_files_are_ignored(folder: Path, images: list, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    settings = {"num_beams": 3, "do_sample": True, "max_length": 7, "repetition_penalty": 5.0, "top_k": 2}
    (other / "generation_config.json").write_text(json.dumps(settings | {"no_repeat_ngram_size": 1}))
    assert captioner(other)(images[:3], UIDS[:3]) == captioner(folder)(images[:3], UIDS[:3])


def test_lower_precision_samples_the_same_way(folder: Path, images: list) -> None:
    rows = captioner(folder, precision="bf16")(images[:4], UIDS[:4])
    assert rows == captioner(folder, precision="bf16")(images[:4], UIDS[:4])
    assert all(caption.text and caption.num_tokens > 1 for row in rows for caption in row)


def test_unknown_outputs_leave_no_trace_in_the_text(folder: Path) -> None:
    engine = captioner(folder)
    word = 5 + WORDS.index("dog")
    assert engine._decode([word, START_ID, START_ID + 1, END_ID]) == "dog"


# -- the worker ----------------------------------------------------------------------------------------------


@pytest.fixture
def shard(tmp_path: Path, folder: Path) -> tuple:
    config = config_of(
        tmp_path / "corpus", caption={"model": str(folder), "batch_size": 3, "num_captions": 4}
    )
    images = {f"00000{index:04d}": {"jpg": encoded(picture(index))} for index in (3, 0, 7, 5, 1)}
    images["000000009"] = {"png": encoded(picture(9), "PNG")}
    images["000000008"] = {"webp": encoded(picture(8), "WEBP"), "txt": b"other members are not images"}
    return config, commit_crawl(config, images, {}, failed=("000000002", "000000004"))


def captions_of(config, record) -> list[dict]:
    storage = Storage(config.corpus.path)
    return pq.read_table(storage.url(record.outputs["parquet"].path)).to_pylist()


def test_worker_commits_captions_of_every_stored_image(shard: tuple) -> None:
    config, crawl = shard
    record = CaptionWorker(config, Records(Storage(config.corpus.path)))(
        task_of(config, "caption", crawl=crawl)
    )
    rows = captions_of(config, record)
    keys = sorted({row["key"] for row in rows})
    assert keys == [f"00000000{index}" for index in (0, 1, 3, 5, 7, 8, 9)]
    assert [(row["key"], row["candidate"]) for row in rows] == [
        (key, index) for key in keys for index in range(4)
    ]
    assert (record.rows_in, record.rows_out, record.images) == (7, 28, 7)
    assert record.counts == {"ok": 7, "duplicate": sum(row["duplicate_of"] is not None for row in rows)}
    assert record.device == "cpu" and record.models == (captioner_weights(config.caption).digest,)
    assert (
        sum(record.histograms["caption_words"].counts)
        == sum(record.histograms["caption_tokens"].counts)
        == 28
    )
    assert {"read", "decode", "gpu", "write", "total"} <= record.seconds.keys()
    for row in rows:
        assert row["seed"] == stream_seed(config.corpus.seed, row["uid"], row["candidate"])
        assert row["text"] == clean_caption(row["raw_text"])
        assert row["origin"] == "synthetic"
    assert pq.read_schema(Storage(config.corpus.path).url(record.outputs["parquet"].path)).equals(CAPTIONS)


def test_workers_and_batch_sizes_commit_the_same_bytes(shard: tuple, tmp_path: Path) -> None:
    config, crawl = shard
    digests = set()
    for batch_size in (1, 3, 16):
        worker = CaptionWorker(
            config.model_copy(
                update={"caption": config.caption.model_copy(update={"batch_size": batch_size})}
            ),
            Records(Storage(str(tmp_path / f"other-{batch_size}"))),
        )
        tar, parquet = crawl.outputs["tar"], crawl.outputs["parquet"]
        storage = Storage(config.corpus.path)
        # Absolute paths, as an imported shard has them.
        outside = dataclasses.replace(
            crawl,
            outputs={
                "tar": dataclasses.replace(tar, path=storage.url(tar.path)),
                "parquet": dataclasses.replace(parquet, path=storage.url(parquet.path)),
            },
        )
        digests.add(worker(task_of(config, "caption", crawl=outside)).outputs["parquet"].sha256)
    assert len(digests) == 1


def test_a_call_that_fails_leaves_nothing_on_the_device(
    shard: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the next call would share the engine's buffers with it."""
    config, crawl = shard
    worker = CaptionWorker(config, Records(Storage(config.corpus.path)))
    begun, ended, generate = [], [], worker.captioner.generate

    def slow(batch: object) -> object:
        begun.append(batch)
        time.sleep(0.05)
        tokens = generate(batch)
        ended.append(batch)
        return tokens

    def fail(_: object) -> None:
        raise ValueError("no text")

    monkeypatch.setattr(worker.captioner, "generate", slow)
    monkeypatch.setattr(worker.captioner, "decode_text", fail)
    with pytest.raises(ValueError, match="no text") as failure:
        worker(task_of(config, "caption", crawl=crawl))
    done = len(ended)
    assert len(begun) == done and not worker.gpu_lock.locked()
    time.sleep(0.1)
    # ``failure`` holds the frames of the call, as an actor that tries again does.
    assert len(begun) == done and failure.tb is not None


def test_an_image_that_does_not_decode_is_counted_and_passed_over(tmp_path: Path, folder: Path) -> None:
    config = config_of(tmp_path / "corpus", caption={"model": str(folder), "batch_size": 2})
    whole = encoded(picture(1))
    images = {
        "a": {"jpg": whole},
        "b": {"jpg": whole[: len(whole) // 2]},
        "c": {"jpg": b""},
        "d": {"jpg": whole},
    }
    crawl = commit_crawl(config, images, {})
    record = CaptionWorker(config, Records(Storage(config.corpus.path)))(
        task_of(config, "caption", crawl=crawl)
    )
    assert {row["key"] for row in captions_of(config, record)} == {"a", "d"}
    assert record.counts["failed/undecodable"] == 2 and record.counts["ok"] == 2
    assert (record.rows_in, record.images, record.rows_out) == (4, 2, 20)


def test_a_shard_without_images_has_no_captions(tmp_path: Path, folder: Path) -> None:
    config = config_of(tmp_path / "corpus", caption={"model": str(folder)})
    crawl = commit_crawl(config, {}, {}, failed=("a", "b"))
    record = CaptionWorker(config, Records(Storage(config.corpus.path)))(
        task_of(config, "caption", crawl=crawl)
    )
    assert (record.rows_in, record.rows_out, record.outputs["parquet"].rows) == (0, 0, 0)


@pytest.mark.parametrize(
    "damage", ["cut at a member", "cut inside", "one byte", "gone", "another sample", "record"]
)
def test_torn_shards_are_refused(shard: tuple, damage: str) -> None:
    config, crawl = shard
    storage = Storage(config.corpus.path)
    path = Path(storage.url(crawl.outputs["tar"].path))
    data = path.read_bytes()
    changed = crawl
    match damage:
        case "cut at a member":
            # A tar's blocks of 512: header and content of the first member; the rest reads as an early end.
            path.write_bytes(data[: 512 + -(-len(encoded(picture(3))) // 512) * 512])
            changed = _as_recorded(crawl, path)
        case "cut inside":
            path.write_bytes(data[:700])
            changed = _as_recorded(crawl, path)
        case "one byte":
            path.write_bytes(data[:600] + bytes([data[600] ^ 1]) + data[601:])
        case "gone":
            path.unlink()
        case "another sample":
            path.write_bytes(data.replace(b"000000003.jpg", b"000000006.jpg"))
            changed = _as_recorded(crawl, path)
        case "record":
            changed = dataclasses.replace(
                crawl, outputs=crawl.outputs | {"tar": dataclasses.replace(crawl.outputs["tar"], rows=6)}
            )
    worker = CaptionWorker(config, Records(storage))
    with pytest.raises(CorruptShardError, match=crawl.outputs["tar"].path):
        worker(task_of(config, "caption", crawl=changed))
    assert Records(storage).read("caption", "tiny", "00000") is None


def _as_recorded(crawl, path: Path):
    """Return a record that vouches for the damaged bytes: counting alone must find it out."""
    tar = crawl.outputs["tar"]
    file = OutputFile(path=tar.path, bytes=path.stat().st_size, sha256=sha256_file(path), rows=tar.rows)
    return dataclasses.replace(crawl, outputs=crawl.outputs | {"tar": file})


def test_seeds_of_the_table_draw_the_same_numbers_again(shard: tuple) -> None:
    config, crawl = shard
    record = CaptionWorker(config, Records(Storage(config.corpus.path)))(
        task_of(config, "caption", crawl=crawl)
    )
    row = captions_of(config, record)[5]
    key_uid = row["uid"]
    drawn = uniforms(np.array(row["seed"], np.uint64), 5)
    assert (drawn == uniforms(np.array(stream_seed(7, key_uid, row["candidate"]), np.uint64), 5)).all()
