"""The training stream over real curated shards: the same from any position, on any ranks, threads or storage."""

import contextlib
import json
import logging
import os
import pickle
import tracemalloc
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from corpora import Corpus, make_corpus
from raw_shards import encoded, picture
from runs import with_values

from pipeline.corpus.records import Records
from pipeline.shards.shard_files import write_tar
from pipeline.storage.storage import Storage
from schemas.config import SourceConfig
from schemas.errors import CapfiltError, CorruptShardError
from schemas.pretrain import PretrainConfig
from training.data.held_out import held_out_samples
from training.data.loader import Batch, TrainingData
from training.data.shard_index import open_shard
from training.data.snapshot import Snapshot, take_snapshot
from training.trainer.lineage import LineageWriter

BATCH_SIZE = 8
SIZE_PX = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two sources of three shards, nine images a shard."""
    root = str(tmp_path_factory.mktemp("data") / "corpus")
    make_corpus(root, ("cc", "sbu"), shards=3)
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the index of third-party folders out of the developer's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def config_of(path: str | Path, batch_size: int = BATCH_SIZE, **data: Any) -> PretrainConfig:
    slice_keys = {"snapshot", "sources", "weights", "captions"}
    corpus_slice = {"path": str(path)} | {key: data.pop(key) for key in slice_keys & data.keys()}
    return PretrainConfig.model_validate(
        {
            "run": {"name": "test", "stage": 1, "seed": 3},
            "data": {"corpus": [corpus_slice], "image_size_px": SIZE_PX, "shuffle_shards": 2, "read_ahead": 1}
            | data,
            "optim": {"batch_size": batch_size},
        }
    )


def batches(config: PretrainConfig, number: int, **where: int) -> list[Batch]:
    return list(islice(TrainingData(config, take_snapshot(config.data), **where), number))


def weights_of(snapshot: Snapshot) -> dict[str, float]:
    return {source.name: source.weight for source in snapshot.sources}


def uids(read_batches: list[Batch]) -> list[str]:
    return [uid for batch in read_batches for uid in batch.uids]


def require_equal(read_batches: list[Batch], expected: list[Batch]) -> None:
    assert [batch.position for batch in read_batches] == [batch.position for batch in expected]
    for actual, wanted in zip(read_batches, expected, strict=True):
        assert (actual.uids, actual.captions) == (wanted.uids, wanted.captions)
        assert actual.image_hashes == wanted.image_hashes and actual.kept_captions == wanted.kept_captions
        assert torch.equal(actual.pixels_BCHW, wanted.pixels_BCHW)


# -- determinism -----------------------------------------------------------------------------------------------


def test_a_batch_is_what_the_trainer_takes(corpus: str) -> None:
    first, second = batches(config_of(corpus), 2)
    assert first.pixels_BCHW.shape == (BATCH_SIZE, 3, SIZE_PX, SIZE_PX)
    assert first.pixels_BCHW.dtype == torch.uint8 and first.pixels_BCHW.is_contiguous()
    assert len(first.captions) == len(set(first.uids)) == BATCH_SIZE
    assert (first.position, second.position) == (BATCH_SIZE, 2 * BATCH_SIZE)
    # Of a later epoch the images are the same, and so are their keys.
    hashes: dict[str, int] = {}
    for batch in batches(config_of(corpus, captions_per_image=1), 20):
        for caption, kept, uid, image in zip(
            batch.captions, batch.kept_captions, batch.uids, batch.image_hashes, strict=True
        ):
            assert caption == kept[0]
            assert hashes.setdefault(uid, image) == image
    assert len(set(hashes.values())) == len(hashes) == 54


def test_resumed_anywhere_is_uninterrupted(corpus: str) -> None:
    config = config_of(corpus)
    whole = batches(config, 17)
    for step in range(16):
        require_equal(batches(config, 2, consumed=step * BATCH_SIZE), whole[step : step + 2])


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_share_the_same_sequence(corpus: str, world_size: int) -> None:
    config = config_of(corpus, workers=2)
    whole = batches(config_of(corpus, workers=1), 8)
    ranks = [batches(config, 8, rank=rank, world_size=world_size) for rank in range(world_size)]
    joined = [
        Batch(
            pixels_BCHW=torch.cat([share.pixels_BCHW for share in shares]),
            captions=[caption for share in shares for caption in share.captions],
            uids=[uid for share in shares for uid in share.uids],
            image_hashes=[number for share in shares for number in share.image_hashes],
            kept_captions=[captions for share in shares for captions in share.kept_captions],
            position=shares[0].position,
        )
        for shares in zip(*ranks, strict=True)
    ]
    require_equal(joined, whole)


def test_ranks_agree_over_many_turns_and_groups(corpus: str) -> None:
    """Shards are opened, left and opened again all the time."""
    config = config_of(corpus, batch_size=4, shuffle_shards=1, workers=3, weights={"cc": 100})
    whole = batches(config, 120)
    for rank in (0, 3):
        require_equal(batches(config, 120, rank=rank, world_size=4), shares(whole, rank, 4))


def test_threads_and_reading_ahead_change_nothing(corpus: str) -> None:
    expected = batches(config_of(corpus), 10)
    require_equal(batches(config_of(corpus, workers=5, read_ahead=9), 10), expected)


def test_s3_is_as_local(corpus: str, s3_root: str) -> None:
    here, there = Storage(corpus), Storage(s3_root)
    for info in here.list(""):
        there.write(info.path, here.read(info.path))
    local, remote = config_of(corpus, held_out=3), config_of(s3_root, held_out=3)
    assert take_snapshot(local.data).digest == take_snapshot(remote.data).digest
    require_equal(batches(remote, 9), batches(local, 9))
    actual, wanted = (held_out_samples(side, take_snapshot(side.data)) for side in (local, remote))
    assert [(side.uid, side.captions) for side in actual] == [(side.uid, side.captions) for side in wanted]


def test_another_seed_is_another_sequence(corpus: str) -> None:
    config = config_of(corpus)
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 4})})
    assert uids(batches(config, 3)) != uids(batches(other, 3))


def test_a_snapshot_pickles_and_trains_on_what_it_says(corpus: str) -> None:
    config = config_of(corpus)
    snapshot = take_snapshot(config.data)
    assert snapshot.num_images == 54 and weights_of(snapshot) == {"cc": 27, "sbu": 27}
    copy = pickle.loads(pickle.dumps(snapshot))
    assert copy == snapshot
    require_equal(list(islice(TrainingData(config, copy), 2)), batches(config, 2))


# -- what a turn holds -----------------------------------------------------------------------------------------


def test_every_image_comes_once_in_a_turn_with_one_of_its_captions(corpus: str) -> None:
    config = config_of(corpus, batch_size=9)
    kept = curated_captions(corpus)
    assert len(kept) == 54
    drawn: dict[str, set[str]] = {uid: set() for uid in kept}
    for epoch in range(12):
        read_batches = batches(config, 6, consumed=epoch * 54)
        assert sorted(uids(read_batches)) == sorted(kept)
        for batch in read_batches:
            for uid, caption in zip(batch.uids, batch.captions, strict=True):
                drawn[uid].add(caption)
    # Twelve draws of two captions: one image in two thousand never shows one of them.
    missed = 0
    for uid, captions in kept.items():
        cleaned = {caption.lower() for caption in captions}
        assert drawn[uid] <= cleaned
        missed += len(cleaned) - len(drawn[uid])
    assert missed <= 2


def test_crops_differ_from_turn_to_turn(tmp_path: Path) -> None:
    third_party_folder(tmp_path / "folder", 1, 8)
    config = config_of(tmp_path / "folder")
    seen = {}
    for batch in batches(config, 4):
        for uid, pixels_CHW in zip(batch.uids, batch.pixels_BCHW, strict=True):
            seen.setdefault(uid, set()).add(pixels_CHW.numpy().tobytes())
    assert len(seen) == 8 and all(len(crops) == 4 for crops in seen.values())


def test_captions_per_image_counts_from_the_best(corpus: str) -> None:
    best = {uid: captions[0].lower() for uid, captions in curated_captions(corpus).items()}
    for batch in batches(config_of(corpus, captions_per_image=1), 8):
        assert batch.captions == [best[uid] for uid in batch.uids]


def test_weights_of_the_config_and_of_the_corpus_set_the_mix(tmp_path: Path) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"), ("cc", "sbu"), shards=2)

    source = source_of(corpus.root)

    def share_of_cc(**data: Any) -> float:
        read_batches = batches(config_of(corpus.root, **data), 36)
        names = [source[uid] for uid in uids(read_batches)]
        return Counter(names)["cc"] / len(names)

    assert share_of_cc() == 0.5
    assert share_of_cc(weights={"cc": 54}) == 0.75
    # The corpus's own config, as of its last run.
    weigh(corpus, sbu=162.0)
    assert weights_of(take_snapshot(config_of(corpus.root).data)) == {"cc": 18, "sbu": 162.0}
    assert share_of_cc() == pytest.approx(0.1, abs=0.004)
    assert share_of_cc(weights={"sbu": 18}) == 0.5
    assert share_of_cc(sources=["cc"]) == 1


def test_a_human_source_draws_any_of_its_captions(tmp_path: Path) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"), ("coco",), shards=1)
    few = {
        caption
        for batch in batches(config_of(corpus.root, captions_per_image=1), 9)
        for caption in batch.captions
    }
    weigh(corpus, kind="human", coco=None)
    many = {
        caption
        for batch in batches(config_of(corpus.root, captions_per_image=1), 9)
        for caption in batch.captions
    }
    assert len(few) == 9 and len(many) > 12


def test_corpora_are_mixed(corpus: str, tmp_path: Path) -> None:
    third_party_folder(tmp_path / "folder", 2, 9)
    config = config_of(corpus)
    two = config.data.model_copy(
        update={"corpus": (*config.data.corpus, *config_of(tmp_path / "folder").data.corpus)}
    )
    config = config.model_copy(update={"data": two})
    snapshot = take_snapshot(config.data)
    assert weights_of(snapshot) == {"cc": 27, "sbu": 27, "folder": 18}
    assert len({snapshot.digest, take_snapshot(config_of(corpus).data).digest}) == 2
    assert len(set(uids(batches(config, 9)))) == 72


# -- held out --------------------------------------------------------------------------------------------------


def test_held_out_images_are_never_trained_on(corpus: str) -> None:
    config = config_of(corpus, batch_size=4, held_out=10)
    snapshot = take_snapshot(config.data)
    assert (snapshot.num_images, snapshot.num_held_out) == (44, 10)
    held_out = held_out_samples(config, snapshot)
    trained = uids(list(islice(TrainingData(config, snapshot), 11)))
    assert len(set(trained)) == 44
    assert {sample.uid for sample in held_out} | set(trained) == set(curated_captions(corpus))
    for sample in held_out:
        assert sample.pixels_CHW.shape == (3, SIZE_PX, SIZE_PX)
        assert sample.captions == [caption.lower() for caption in curated_captions(corpus)[sample.uid]]
    assert [sample.uid for sample in held_out_samples(config, snapshot, 4)] == [
        sample.uid for sample in held_out[:4]
    ]


def test_held_out_images_are_of_few_shards_and_the_same_under_any_seed(corpus: str) -> None:
    config = config_of(corpus, held_out=4)
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 99})})
    # Two shards of nine hold four times four images.
    assert sum(bool(shard.held_out) for shard in take_snapshot(config.data).shards) <= 2
    uids_held = [
        sorted(sample.uid for sample in held_out_samples(c, take_snapshot(c.data))) for c in (config, other)
    ]
    assert uids_held[0] == uids_held[1] and len(uids_held[0]) == 4


# -- others' shards --------------------------------------------------------------------------------------------


def third_party_folder(folder: Path, shards: int, images: int, **members: bytes) -> None:
    """Write shards as LAVIS's users have them: jpg and a json list, or what ``members`` replace."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        write_tar(
            folder / f"{shard:05d}.tar",
            (
                (
                    f"{shard}{index:04d}",
                    {
                        "jpg": encoded(picture(100 * shard + index)),
                        "json": json.dumps([f"best {shard} {index}", f"second {shard} {index}"]).encode(),
                    }
                    | members,
                )
                for index in range(images)
            ),
        )


def test_a_folder_of_others_shards_trains(tmp_path: Path) -> None:
    third_party_folder(tmp_path / "laion", 3, 9)
    config = config_of(tmp_path / "laion", batch_size=9)
    read_batches = batches(config, 3)
    assert len(set(uids(read_batches))) == 27 and all(len(uid) == 32 for uid in uids(read_batches))
    assert weights_of(take_snapshot(config.data)) == {"laion": 27}
    assert {caption.split()[0] for batch in read_batches for caption in batch.captions} == {"best", "second"}
    require_equal(batches(config, 3, rank=1, world_size=3), shares(read_batches, 1, 3))


def test_a_folder_that_takes_no_commits_trains(tmp_path: Path) -> None:
    third_party_folder(tmp_path / "laion", 2, 9)
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path / "laion"), "/served/laion", recursive=True)
    served = config_of("memory://served/laion", held_out=2)
    require_equal(batches(served, 3), batches(config_of(tmp_path / "laion", held_out=2), 3))
    assert len(held_out_samples(served, take_snapshot(served.data))) == 2
    assert LineageWriter(served.data).corpora == []


def test_img2datasets_folders_train_on_their_txt(tmp_path: Path) -> None:
    third_party_folder(tmp_path / "f", 1, 8, json=b'{"caption": "no"}', txt="Ein Hörnchen.".encode())
    assert set(batches(config_of(tmp_path / "f"), 1)[0].captions) == {"ein hörnchen"}


def test_the_index_is_made_once_for_the_same_bytes(tmp_path: Path, cache: Path) -> None:
    third_party_folder(tmp_path / "f", 2, 8)
    config = config_of(tmp_path / "f")
    first = take_snapshot(config.data)
    assert len(list(cache.rglob("*.json"))) == 2
    tar = tmp_path / "f" / "00000.tar"
    stat, data = tar.stat(), bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    # Taken for the same: what was not read again is found out before it is used.
    assert take_snapshot(config.data) == first
    with pytest.raises(CorruptShardError, match=r"00000\.tar has another sha256"):
        batches(config, 2)
    os.utime(tar)
    again = take_snapshot(config.data)
    assert again.digest != first.digest and len(list(cache.rglob("*.json"))) == 3
    assert len(batches(config, 2)) == 2


def test_samples_without_image_or_captions_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jpg, text = encoded(picture(1)), b"a dog"
    samples = [
        ("a", {"jpg": jpg, "txt": text}),
        ("b", {"jpg": jpg}),
        ("c", {"txt": text}),
        ("d", {"cls": b"1"}),
    ]
    samples += [("e", {"png": encoded(picture(2), "PNG"), "txt": text}), ("a", {"jpg": jpg, "txt": text})]
    (tmp_path / "f").mkdir()
    write_tar(tmp_path / "f" / "x.tar", samples)
    with caplog.at_level(logging.WARNING):
        snapshot = take_snapshot(config_of(tmp_path / "f").data)
    assert snapshot.num_images == 2
    assert "1 with a key seen before, 1 with no captions, 2 with no image" in caplog.text


def test_unusable_samples_are_replaced_and_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jpg = encoded(picture(1))
    samples = [(f"k{index}", {"jpg": jpg, "txt": f"fine {index}".encode()}) for index in range(6)]
    samples[2] = ("k2", {"jpg": jpg[:200], "txt": b"cut"})
    samples[4] = ("k4", {"jpg": jpg, "txt": b"!!!"})
    (tmp_path / "f").mkdir()
    write_tar(tmp_path / "f" / "x.tar", samples)
    config = config_of(tmp_path / "f", batch_size=6)
    with caplog.at_level(logging.WARNING):
        read_batches = batches(config, 3)
    for batch in read_batches:
        # The next in the shard stands in.
        assert Counter(batch.captions) == {"fine 0": 1, "fine 1": 1, "fine 3": 2, "fine 5": 2}
    assert len(caplog.records) == 2
    assert "image_truncated" in caplog.text and "no caption has a word in it" in caplog.text
    require_equal(batches(config, 3, rank=1, world_size=2), shares(read_batches, 1, 2))


# -- bad input -------------------------------------------------------------------------------------------------


def test_a_shard_that_is_not_as_its_record_says_is_named(tmp_path: Path) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"), shards=2)
    tar = tmp_path / "corpus" / "curated" / "cc" / "00001.tar"
    good = tar.read_bytes()
    config = config_of(corpus.root, batch_size=9)
    flipped = bytearray(good)
    flipped[700] ^= 1
    # Cut at a member's boundary, a tar reads without any error.
    for bad in (bytes(flipped), good[: 3 * 2048] + bytes(1024), good + bytes(512)):
        tar.write_bytes(bad)
        with pytest.raises(CorruptShardError, match=r"curated/cc/00001\.tar"):
            batches(config, 2)
    tar.unlink()
    with pytest.raises(CorruptShardError, match=r"curated/cc/00001\.tar is missing"):
        batches(config, 2)
    tar.write_bytes(good)
    assert len(batches(config, 2)) == 2
    parquet = tar.with_suffix(".parquet")
    parquet.write_bytes(parquet.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptShardError, match=r"curated/cc/00001\.parquet"):
        batches(config, 2)


def test_a_pinned_snapshot_is_refused_once_the_corpus_is_another(tmp_path: Path) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"), shards=1)
    digest = take_snapshot(config_of(corpus.root).data).digest
    pinned = config_of(corpus.root, snapshot=digest)
    assert take_snapshot(pinned.data).digest == digest
    corpus.add_urls("cc", ["00001"], 12, batch=1)
    corpus.make("cc", "00001")
    now_there = take_snapshot(config_of(corpus.root).data).digest
    with pytest.raises(
        CapfiltError, match=rf"pinned snapshot.*{now_there}.*{digest}.*snapshot = \"{now_there}\""
    ):
        take_snapshot(pinned.data)


def test_a_digest_says_nothing_of_place_or_time(corpus: str, tmp_path: Path) -> None:
    again = make_corpus(str(tmp_path / "elsewhere"), ("cc", "sbu"), shards=3)
    assert take_snapshot(config_of(corpus).data).digest == take_snapshot(config_of(again.root).data).digest


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"sources": ["laion"]}, "data.corpus.sources: .* no source 'laion' .* cc, sbu"),
        ({"weights": {"laion": 1.0}}, "data.corpus.weights: .* no source 'laion'"),
        ({"weights": {"cc": 0.0}}, "data.corpus.weights: cc = 0: a weight must be over 0"),
        ({"weights": {"cc": float("nan")}}, "data.corpus.weights: cc = nan"),
        ({"held_out": 28}, "data.held_out: 28 of 54 images are more than half"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_read(
    corpus: str, data: dict[str, Any], words: str
) -> None:
    with pytest.raises(CapfiltError, match=words):
        take_snapshot(config_of(corpus, **data).data)


def test_what_cannot_be_trained_on_is_said(tmp_path: Path) -> None:
    with pytest.raises(CapfiltError, match="nothing to train on at"):
        take_snapshot(config_of(tmp_path / "nowhere").data)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CapfiltError, match="neither a corpus .* nor tars"):
        take_snapshot(config_of(tmp_path / "empty").data)
    crawled = make_corpus(str(tmp_path / "crawled"), shards=1, stages=("crawl",))
    with pytest.raises(CapfiltError, match="has no curated shards.*capfilt run"):
        take_snapshot(config_of(crawled.root).data)
    refused = make_corpus(str(tmp_path / "refused"), shards=1, stages=("crawl", "caption", "rank"))
    refused.config = with_values(refused.config, select={"min_score": 1.0})
    refused.make("cc", "00000", ("select",))
    with pytest.raises(CapfiltError, match="no image is kept in the 1 curated shards of .*capfilt stats"):
        take_snapshot(config_of(refused.root).data)
    listed = make_corpus(str(tmp_path / "listed"), shards=1, stages=())
    with pytest.raises(CapfiltError, match="has no crawled shards.*capfilt run"):
        take_snapshot(config_of(listed.root, captions="web").data)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(CapfiltError, match=r"x\.tar is not a readable tar"):
        take_snapshot(config_of(tmp_path / "broken").data)


def test_a_shard_without_one_usable_sample_is_said(tmp_path: Path) -> None:
    third_party_folder(tmp_path / "f", 1, 8, jpg=b"no image")
    with pytest.raises(CapfiltError, match=r"00000\.tar of .*: no sample has both"):
        batches(config_of(tmp_path / "f"), 1)


def test_ranks_and_positions_must_fit_the_batch(corpus: str) -> None:
    config = config_of(corpus)
    snapshot = take_snapshot(config.data)
    with pytest.raises(CapfiltError, match="optim.batch_size: 8 images are too few for 9 ranks"):
        TrainingData(config, snapshot, 0, 9)
    with pytest.raises(CapfiltError, match="optim.batch_size: 12 samples consumed"):
        TrainingData(config, snapshot, consumed=12)


# -- bounds ----------------------------------------------------------------------------------------------------


def test_few_shards_are_open_at_once_and_none_afterwards(tmp_path: Path, s3_root: str, monkeypatch) -> None:
    corpus = make_corpus(s3_root, shards=12)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr("tempfile.tempdir", None)
    config = config_of(corpus.root, batch_size=3, shuffle_shards=2, read_ahead=2, workers=1)
    stream = iter(TrainingData(config, take_snapshot(config.data)))
    copies, opened = [], []
    for _ in range(72):
        next(stream)
        copies.append(sum(is_copy(name) for *_, names in os.walk(scratch) for name in names))
        opened.append(copies_open_under(scratch))
    # Those of the batches under way (12 batches of 3 images, at most three groups of two) and of read_ahead.
    assert 2 <= max(copies) <= 10
    assert 1 <= max(opened) <= 10
    stream.close()
    assert [name for *_, names in os.walk(scratch) for name in names] == []
    assert copies_open_under(scratch) == 0


def test_an_open_shard_takes_little_memory(tmp_path: Path) -> None:
    third_party_folder(tmp_path / "f", 1, 2000, jpg=encoded(picture(1)))
    [shard] = take_snapshot(config_of(tmp_path / "f").data).shards
    records = Records(Storage(shard.corpus))
    with open_shard(records, shard):
        pass  # what is imported on the way does not count
    tracemalloc.start()
    with open_shard(records, shard) as opened:
        taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(opened) == 2000 and taken < 200 * 2000


# -- what the tests look things up with ------------------------------------------------------------------------


def is_copy(name: str) -> bool:
    """Tell whether a file in the scratch space is a shard's, not one of its locks."""
    return not name.endswith((".use", ".fetch", ".checked"))


def copies_open_under(folder: Path) -> int:
    """Count the shards below a folder that this process has open; one that is being checked is opened twice."""
    targets = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since the folder was listed
            targets.add(str(descriptor.readlink()))
    return sum(target.startswith(f"{folder}/") and is_copy(target) for target in targets)


def shares(read_batches: list[Batch], rank: int, world_size: int) -> list[Batch]:
    """Return one rank's share of whole batches."""
    rows = [
        slice(rank * len(batch.uids) // world_size, (rank + 1) * len(batch.uids) // world_size)
        for batch in read_batches
    ]
    return [
        Batch(
            pixels_BCHW=batch.pixels_BCHW[row],
            captions=batch.captions[row],
            uids=batch.uids[row],
            image_hashes=batch.image_hashes[row],
            kept_captions=batch.kept_captions[row],
            position=batch.position,
        )
        for batch, row in zip(read_batches, rows, strict=True)
    ]


def curated_captions(root: str) -> dict[str, list[str]]:
    corpus = Corpus(root)
    return {
        row["uid"]: row["captions"]
        for _, source, shard in corpus.records.shards(("select",))
        for row in corpus.read("select", source, shard)
        if row["status"] == "kept"
    }


def source_of(root: str) -> dict[str, str]:
    corpus = Corpus(root)
    return {
        row["uid"]: source
        for _, source, shard in corpus.records.shards(("select",))
        for row in corpus.read("select", source, shard)
    }


def weigh(corpus: Corpus, kind: str = "web", **weights: float | None) -> None:
    """Record a later run of the corpus whose sources have a kind and weights."""
    sources = tuple(
        SourceConfig(name=name, input=("x.csv",), kind=kind, weight=weight)
        for name, weight in weights.items()
    )
    corpus.config = corpus.config.model_copy(update={"source": sources})
    corpus.start_run("20270101T000000-later")
