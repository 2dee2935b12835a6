"""Shards shared by the processes of a machine: fetched and checked by one of them, removed after the last."""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from corpora import Corpus, make_corpus

from jobs.bench.fixtures.s3 import S3Server
from jobs.bench.training.shard_reads import bytes_read
from pipeline.corpus.records import Records
from pipeline.storage.scratch import shared_folder
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError, CorruptShardError
from schemas.pretrain import DataConfig
from schemas.records import SnapshotShard
from training.data.node_files import node_file, remove_unused
from training.data.shard_cache import require_scratch
from training.data.shard_index import OpenShard, index_tar, open_shard
from training.data.snapshot import take_snapshot

_fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a scratch space of its own."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(str(tmp_path / "corpus"), shards=1)


def shard_of(root: str) -> tuple[Records, SnapshotShard]:
    """Return the one curated shard of a corpus."""
    [shard] = take_snapshot(DataConfig.model_validate({"corpus": [{"path": root}]})).shards
    return Records(Storage(root)), shard


def files_in(folder: Path) -> list[str]:
    return [name for *_, names in os.walk(folder) for name in names]


@contextlib.contextmanager
def held_elsewhere(records: Records, shard: SnapshotShard) -> Iterator[Callable[[], None]]:
    """Have another process open a shard; yield what kills it."""
    ready = _fork.Event()

    def hold() -> None:
        with open_shard(records, shard):
            ready.set()
            _fork.Event().wait()

    process = _fork.Process(target=hold, daemon=True)
    process.start()
    assert ready.wait(30)

    def kill() -> None:
        process.kill()
        process.join()

    yield kill
    kill()


def contents(shard: OpenShard) -> list[tuple[str, bytes, tuple[str, ...]]]:
    samples = (shard.sample(number) for number in range(len(shard)))
    return [(sample.uid, sample.image, tuple(sample.captions)) for sample in samples]


def test_a_shard_that_another_process_has_open_is_not_fetched_again(
    s3_root: str, s3_server: S3Server, scratch: Path
) -> None:
    make_corpus(s3_root, shards=1)
    records, shard = shard_of(s3_root)
    with open_shard(records, shard) as opened:
        alone = contents(opened)
    assert files_in(scratch) == []
    with open_shard(records, shard):
        s3_server.requests.clear()
        with open_shard(records, shard) as again:
            assert contents(again) == alone
        assert not any(request.key.endswith(shard.tar.path) for request in s3_server.requests)
    assert files_in(scratch) == []


def test_the_copy_outlives_the_process_that_fetched_it_and_is_removed_after_the_last(
    corpus: Corpus, scratch: Path
) -> None:
    records, shard = shard_of(corpus.root)
    with held_elsewhere(records, shard) as kill:
        assert files_in(scratch)
        with open_shard(records, shard) as opened:
            kill()
            remove_unused()
            assert len(contents(opened)) == shard.samples
            assert files_in(scratch)
    assert files_in(scratch) == []


def test_what_a_killed_process_left_is_removed(corpus: Corpus, scratch: Path) -> None:
    records, shard = shard_of(corpus.root)
    with held_elsewhere(records, shard) as kill:
        kill()
    assert files_in(scratch)
    remove_unused()
    assert files_in(scratch) == []


def test_a_file_that_changed_after_another_process_checked_it_is_checked_again(corpus: Corpus) -> None:
    records, shard = shard_of(corpus.root)
    path = Path(records.storage.url(shard.tar.path))
    with open_shard(records, shard):
        damaged = bytearray(path.read_bytes())
        damaged[600] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CorruptShardError, match="another sha256"), node_file(records, shard.tar):
            pass


def test_a_scratch_folder_of_somebody_else_is_not_used(corpus: Corpus, scratch: Path) -> None:
    records, shard = shard_of(corpus.root)
    folder = shared_folder()
    assert folder is not None
    folder.rmdir()
    folder.symlink_to(scratch.parent)
    assert shared_folder() is None
    with open_shard(records, shard) as opened:
        assert len(contents(opened)) == shard.samples
    assert files_in(scratch) == []


def test_the_places_in_the_parquet_give_the_samples_that_walking_the_tar_gives(corpus: Corpus) -> None:
    records, shard = shard_of(corpus.root)
    walked = index_tar(Path(records.storage.url(shard.tar.path)), adjacent=True)
    with open_shard(records, shard) as opened:
        by_parquet = contents(opened)
        as_walked = OpenShard(shard, walked.places_NM2, opened.uids, opened._descriptor)
        assert by_parquet == contents(as_walked)
    assert all(captions for *_, captions in by_parquet)


def test_a_scratch_space_that_is_too_small_is_named_before_anything_is_fetched(
    s3_root: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_corpus(s3_root, shards=2)
    snapshot = take_snapshot(DataConfig.model_validate({"corpus": [{"path": s3_root}]}))
    require_scratch(snapshot, shuffle_shards=8, read_ahead=2)
    shards = [replace(shard, tar=replace(shard.tar, bytes=10**15)) for shard in snapshot.shards]
    large = replace(snapshot, sources=(replace(snapshot.sources[0], shards=tuple(shards)),))
    with pytest.raises(CapfiltError, match=r"TMPDIR: .* up to 4,000,000\.0 GB"):
        require_scratch(large, shuffle_shards=8, read_ahead=2)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "at_most"), [(8, 1.3), (64, 2.0)])
def test_a_node_reads_few_bytes_that_it_does_not_use(ranks: int, at_most: float) -> None:
    figures = bytes_read(ranks, 2_000_000)
    assert 1 <= figures["bytes_read_per_byte_used"] <= at_most
    assert figures["by_each_rank_alone"] > figures["bytes_read_per_byte_used"]
