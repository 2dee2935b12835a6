"""Verification: a sound corpus is clean, and every kind of damage is named."""

import contextlib
import io
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.bench.fixtures.corpus import list_config
from pipeline.digests import sha256_file
from pipeline.manifest.verify.corpus import check_shard, read_here, verify
from pipeline.manifest.verify.doubled_uids import CheckedShard, doubled_uids
from pipeline.manifest.verify.progress import ShardFindings, VerifyProgress, shard_name, verify_progress
from pipeline.manifest.verify.selection import EVERY_SHARD, ShardSelection, parse_numbers
from pipeline.shards.shard_files import read_tar, write_parquet, write_tar
from pipeline.shards.shard_reader import retried_elsewhere
from pipeline.shards.uids import unpack_uids
from schemas.errors import CapfiltError
from schemas.records import ShardRecord
from schemas.stages import Stage
from schemas.tables import CANDIDATES, CAPTIONS, CURATED, SAMPLES
from tests.corpora import Corpus, make_corpus
from tests.processes import cli_here
from tests.runs import config_file, with_values

SCHEMAS = {"crawl": SAMPLES, "caption": CAPTIONS, "rank": CANDIDATES, "select": CURATED}


@pytest.fixture
def local_root(tmp_path: Path) -> str:
    return str(tmp_path / "corpus")


def differences(corpus: Corpus, **options: bool) -> list[str]:
    return [
        f"{difference.path}: {difference.what}"
        for difference in verify(corpus.manifest, **options).differences
    ]


def path_of(corpus: Corpus, stage: Stage, name: str = "parquet") -> str:
    return corpus.records.read(stage, "cc", "00000").outputs[name].path


def replace_file(corpus: Corpus, stage: Stage, name: str, local, rows: int) -> None:
    """Put another file in place and let the record agree with it, as a worker with a fault would have."""
    record = corpus.records.read(stage, "cc", "00000")
    file = replace(record.outputs[name], bytes=local.stat().st_size, sha256=sha256_file(local), rows=rows)
    corpus.storage.put(local, file.path)
    changed = replace(record, outputs={**record.outputs, name: file})
    corpus.storage.write(f"records/{stage}/cc/00000.json", changed.to_json().encode())


def edit_rows(corpus: Corpus, stage: Stage, edit: Callable[[list[dict]], list[dict]], tmp_path) -> None:
    rows = edit(corpus.read(stage, "cc", "00000"))
    count = write_parquet(tmp_path / "x.parquet", rows, SCHEMAS[stage])
    replace_file(corpus, stage, "parquet", tmp_path / "x.parquet", count)


def edit_tar(corpus: Corpus, stage: Stage, edit: Callable[[list], list], tmp_path) -> None:
    samples = edit(list(read_tar(io.BytesIO(corpus.storage.read(path_of(corpus, stage, "tar"))))))
    count = len(write_tar(tmp_path / "x.tar", samples))
    replace_file(corpus, stage, "tar", tmp_path / "x.tar", count)


def test_a_sound_corpus_is_clean(root: str) -> None:
    corpus = make_corpus(root, sources=("cc", "laion"))
    retried = corpus.add_retry("cc", of="00000", shard="00002", batch=1)
    assert retried_elsewhere(corpus.records, "cc", "00000") == set(retried) != set()
    assert retried_elsewhere(corpus.records, "laion", "00000") == set()
    corpus.make("cc", "00002")
    corpus.manifest.compact()
    difference = verify(corpus.manifest)
    assert difference.differences == []
    assert (difference.shards, difference.files) == (5, 5 * 7)
    quick = verify(corpus.manifest, quick=True)
    assert (quick.differences, quick.files, quick.bytes) == ([], difference.files, difference.bytes)


def test_a_verification_that_was_stopped_goes_on_to_the_same_differences(
    local_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    corpus = make_corpus(local_root, shards=4)
    edit_rows(corpus, "select", lambda rows: rows[1:], tmp_path)
    corpus.storage.delete(corpus.records.read("rank", "cc", "00003").outputs["parquet"].path)
    # The uids of a shard that was read before count with those of one that is read now.
    urls = corpus.records.url_shards()
    first, last = (urls["cc", shard].outputs["parquet"].path for shard in ("00001", "00003"))
    corpus.storage.write(last, corpus.storage.read(first))
    corpus.manifest.compact()
    whole = verify(corpus.manifest)
    assert len(whole.differences) > 4

    # In one thread, so that two shards are read: one with differences, which is read again, and a sound one.
    number = itertools.count(1)

    def third_is_stopped(*shard: Any) -> ShardFindings:
        if next(number) == 3:
            raise KeyboardInterrupt
        return check_shard(*shard)

    monkeypatch.setattr("pipeline.manifest.verify.corpus.check_shard", third_is_stopped)
    with pytest.raises(KeyboardInterrupt), verify_progress(local_root, EVERY_SHARD) as progress:
        verify(corpus.manifest, read=partial(read_here, threads=1), progress=progress)
    with verify_progress(local_root, EVERY_SHARD) as progress:
        # Meanwhile another one starts with nothing, and leaves what is noted.
        with verify_progress(local_root, EVERY_SHARD) as other:
            assert verify(corpus.manifest, progress=other) == whole
        assert verify(corpus.manifest, progress=progress) == replace(whole, read_before=1)
    with verify_progress(local_root, EVERY_SHARD) as progress:
        assert verify(corpus.manifest, progress=progress) == whole, "what was noted is gone once all is read"


def test_an_unfinished_corpus_is_clean(tmp_path) -> None:
    for stages in ((), ("crawl",), ("crawl", "caption"), ("crawl", "caption", "rank")):
        assert differences(make_corpus(str(tmp_path / f"corpus{len(stages)}"), stages=stages)) == []


FILES: list[tuple[Stage, str]] = [
    ("urls", "parquet"),
    ("crawl", "tar"),
    ("crawl", "parquet"),
    ("caption", "parquet"),
    ("rank", "parquet"),
    ("select", "tar"),
    ("select", "parquet"),
]
# What becomes of a file's bytes; None: it is gone.
DAMAGE: dict[str, Callable[[bytes], bytes] | None] = {
    "one bit": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    ),
    "cut": lambda data: data[:-7],
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "gone": None,
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A corpus of two shards; tests leave it as it was."""
    corpus = make_corpus(str(tmp_path_factory.mktemp("sound") / "corpus"), shards=2)
    corpus.manifest.compact()
    return corpus


@contextlib.contextmanager
def damaged(corpus: Corpus, path: str, how: str) -> Iterator[bytes]:
    """Damage a file while the block runs; yields its bytes as they were."""
    data, damage = corpus.storage.read(path), DAMAGE[how]
    if damage is None:
        corpus.storage.delete(path)
    else:
        corpus.storage.write(path, damage(data))
    try:
        yield data
    finally:
        corpus.storage.write(path, data)


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize(("stage", "name"), FILES, ids=["-".join(file) for file in FILES])
def test_a_damaged_file_is_named_and_no_other(sound: Corpus, stage: Stage, name: str, how: str) -> None:
    urls = sound.records.url_shards()["cc", "00000"]
    path = urls.outputs["parquet"].path if stage == "urls" else path_of(sound, stage, name)
    with damaged(sound, path, how) as data:
        quick, whole = differences(sound, quick=True), differences(sound)
    assert all(line.startswith(f"{path}: ") for line in whole)
    match how:
        case "gone":
            assert quick == whole == [f"{path}: missing"]
        case "one bit":
            assert quick == [] and whole[0] == f"{path}: another sha256 than its record says"
        case _:
            size = len(DAMAGE[how](data))
            assert quick == whole[:1] == [f"{path}: {size:,} bytes, its record says {len(data):,}"]


@pytest.mark.parametrize("how", ["cut", "half", "empty"])
def test_a_torn_record_is_named(sound: Corpus, how: str) -> None:
    path = sound.records.read("rank", "cc", "00000").path
    with damaged(sound, path, how), pytest.raises(CapfiltError, match=f"^{path} is not a record "):
        verify(sound.manifest)


@pytest.mark.parametrize("stage", SCHEMAS)
def test_a_record_that_is_gone_is_named_with_what_was_made_from_it(sound: Corpus, stage: Stage) -> None:
    path = sound.records.read(stage, "cc", "00000").path
    with damaged(sound, path, "gone"):
        *made_from_it, of_manifest = differences(sound)
    assert of_manifest.startswith(f"manifest/shards: lists {stage}/cc/00000/")
    later = {f"records/{name}/cc/00000.json" for name in list(SCHEMAS)[list(SCHEMAS).index(stage) + 1 :]}
    assert {line.partition(":")[0] for line in made_from_it} <= later
    assert all(f"made from {stage}." in line for line in made_from_it)
    assert bool(made_from_it) == (stage != "select")


def test_a_tar_cut_at_a_member_is_named(tmp_path) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"), shards=1)
    edit_tar(corpus, "crawl", lambda samples: samples[:-1], tmp_path)
    difference = differences(corpus)
    assert any("1 keys of the Parquet's rows that are ok are not there" in line for line in difference)
    assert any("stale: crawl was made anew" in line for line in difference)


@pytest.mark.parametrize(
    ("stage", "edit", "expected"),
    [
        ("crawl", lambda rows: rows[1:], "1 uids of its url shard are not there"),
        ("crawl", lambda rows: [*rows, rows[0]], "1 keys twice"),
        ("crawl", lambda rows: [rows[0] | {"reason": "dns"}, *rows[1:]], "has status ok with reason dns"),
        ("caption", lambda rows: rows[1:], "images have between 2 and 3 captions"),
        (
            "caption",
            lambda rows: rows[3:],
            "the record counts {'ok': 9}, its files hold {'ok': 8, 'failed': 1}",
        ),
        ("caption", lambda rows: [rows[1], *rows[1:]], "a candidate twice"),
        (
            "rank",
            lambda rows: [row for row in rows if row["candidate"] != 1],
            "9 synthetic candidates of the captions",
        ),
        (
            "rank",
            lambda rows: [rows[0] | {"uid": "f" * 32}, *rows[1:]],
            "1 uids are not among the stored images",
        ),
        ("rank", lambda rows: [rows[0] | {"score": None}, *rows[1:]], "'unscored': 1"),
        ("select", lambda rows: rows[1:], "1 uids of the stored images are not there"),
        (
            "select",
            lambda rows: [rows[0] | {"scores": [0.5] * len(rows[0]["scores"])}, *rows[1:]],
            "not among its scores",
        ),
        (
            "select",
            lambda rows: [rows[0] | {"caption": "else"}, *rows[1:]],
            "has other captions than its row",
        ),
    ],
)
def test_rows_that_do_not_add_up_are_named(
    tmp_path, stage: Stage, edit: Callable[[list[dict]], list[dict]], expected: str
) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"), shards=1)
    edit_rows(corpus, stage, edit, tmp_path)
    assert any(expected in line for line in differences(corpus)), differences(corpus)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (
            lambda key, members: (key, members | {"json": json.dumps(["else"]).encode()}),
            "has other captions than its row",
        ),
        (lambda key, members: (key, members | {"txt": b"else"}), "has other captions than its row"),
        (lambda key, members: (key, {"jpg": members["jpg"]}), "has no readable json and txt"),
        (lambda key, members: ("9999999999", members), "1 keys that the kept rows do not have"),
    ],
)
def test_curated_tars_that_say_something_else_are_named(tmp_path, edit: Callable, expected: str) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"), shards=1)
    edit_tar(corpus, "select", lambda samples: [*samples[:-1], edit(*samples[-1])], tmp_path)
    assert any(expected in line for line in differences(corpus)), differences(corpus)


def test_a_uid_in_two_shards_is_named(tmp_path) -> None:
    corpus = Corpus(str(tmp_path / "corpus"))
    corpus.add_urls("cc", ["00000"], 12)
    rows = pq.read_table(corpus.storage.url("urls/cc/00000.list0.parquet")).to_pylist()
    again = [row | {"shard": "00001", "key": f"00001{index:05d}"} for index, row in enumerate(rows[:2])]
    corpus._commit_intake("cc", {"00001": again}, "lists", 1)
    [difference] = differences(corpus)
    assert difference.startswith(
        "urls/cc/00001.list1.parquet: 2 uids are also in urls/cc/00000.list0.parquet, such as "
    )
    assert difference.split()[-1] in {row["uid"] for row in rows[:2]}


def test_an_image_that_is_stored_twice_is_named(tmp_path) -> None:
    """A first try and its retry may list the same URL; that both have stored it is a fault."""
    corpus = make_corpus(str(tmp_path / "corpus"), shards=1, images=24, stages=("crawl",))
    uids = corpus.add_retry("cc", of="00000", shard="00001", batch=1)
    corpus.make("cc", "00001", ("crawl",))
    assert len(uids) == 2
    assert differences(corpus) == []

    first = corpus.read("crawl", "cc", "00000")
    corpus.storage.delete("records/crawl/cc/00000.json")
    corpus.failures = {1: ("failed", "http_4xx", 404)}
    corpus.make("cc", "00000", ("crawl",))
    assert sum(row["status"] == "ok" for row in corpus.read("crawl", "cc", "00000")) > len(first) - 6
    here, there = (
        corpus.records.read("crawl", "cc", shard).outputs["parquet"].path for shard in ("00001", "00000")
    )
    [difference] = differences(corpus)
    assert difference.startswith(f"{here}: 2 uids are ok, and also in {there}, such as ")
    assert difference.split()[-1] in uids


def test_a_manifest_that_differs_from_the_records_is_named(local_root: str) -> None:
    corpus = make_corpus(local_root, shards=1, stages=("crawl",))
    corpus.manifest.compact()
    corpus.storage.delete("records/crawl/cc/00000.json")
    assert ["manifest/shards: lists crawl/cc/00000/" in line for line in differences(corpus)] == [True]
    corpus.manifest.rebuild()
    assert differences(corpus) == []


def test_some_shards_are_verified_alone(local_root: str, tmp_path: Path) -> None:
    corpus = make_corpus(local_root, sources=("cc", "laion"), shards=6, stages=("crawl",))
    edit_rows(corpus, "crawl", lambda rows: rows[1:], tmp_path)
    corpus.manifest.compact()
    corpus.storage.delete("records/crawl/laion/00003.json")  # the manifest lists it still
    whole = verify(corpus.manifest)
    unlisted = "manifest/shards"
    damaged = {difference.path for difference in whole.differences} - {unlisted}
    assert len(damaged) == 3 and all("cc/00000." in path for path in damaged)

    def verified(**parts: Any) -> tuple[int, set[str]]:
        selection, found = ShardSelection(**parts), []
        for quick in (True, False):
            found.append(verify(corpus.manifest, selection=selection, quick=quick))
        assert found[0].shards == found[1].shards
        return found[1].shards, {difference.path for difference in found[1].differences}

    assert verified(source="laion") == (6, {unlisted})
    assert verified(source="laion", numbers=((0, 2), (4, 9))) == (5, set())
    assert verified(numbers=((0, 0),)) == (2, damaged)
    drawn = [verified(share=0.5, seed=seed)[0] for seed in range(4)]
    assert 0 < min(drawn) < max(drawn) < 12, "a hash draws: about a half, and others with another seed"
    for parts in ({"source": "cd"}, {"numbers": ((7, 9),)}, {"share": 0.0}):
        for quick in (True, False):
            with pytest.raises(CapfiltError, match="no shard is among those to verify"):
                verify(corpus.manifest, selection=ShardSelection(**parts), quick=quick)


def test_a_sample_keeps_its_shards_and_numbers_are_ranges() -> None:
    shards = [("cc", f"{number:05d}") for number in range(2000)]
    small, large = (
        {place for place in shards if ShardSelection(share=share, seed=7).has(*place)} for share in (0.1, 0.2)
    )
    assert small < large and 150 < len(small) < 250 and 330 < len(large) < 470
    assert parse_numbers("0, 7,100-199") == ((0, 0), (7, 7), (100, 199))
    assert str(ShardSelection(source="cc", numbers=((0, 0), (5, 9)), share=0.25, seed=3)) == (
        "source cc; shards 0, 5-9; a sample of 0.25, seed 3"
    )
    for text in ("", "1-", "9-5", "a", "-1", "1,,2"):
        with pytest.raises(CapfiltError, match="--shards"):
            parse_numbers(text)


@pytest.mark.parametrize("at_once", [1, 7, 50, 1000])
def test_doubled_uids_are_the_same_however_few_are_in_memory(tmp_path: Path, at_once: int) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"), shards=3, stages=("crawl",))
    records = corpus.records.shards()
    random = np.random.default_rng(0)
    uids_N2 = random.integers(0, 2**64, (60, 2), np.uint64)
    uids_N2[0], uids_N2[1] = 0, 2**64 - 1  # the ends of the range
    parts = {
        "00000": uids_N2[:30],
        "00001": uids_N2[25:50],
        "00002": np.concatenate([uids_N2[45:], uids_N2[:5]]),
    }
    progress, checked = VerifyProgress(tmp_path), []
    for shard, part_N2 in parts.items():
        by_stage: dict[Stage, ShardRecord] = {"crawl": records["crawl", "cc", shard]}
        progress.keep(by_stage, ShardFindings(uids={"stored": random.permutation(part_N2)}))
        checked.append(CheckedShard(shard_name(by_stage), {"stored": shard}))
    assert [
        (difference.path, difference.what.partition(",")[0])
        for difference in doubled_uids(progress, checked, at_once=at_once)
    ] == [
        ("00001", "5 uids are ok"),
        ("00002", "5 uids are ok"),
        ("00002", "5 uids are ok"),
    ]
    examples = {
        difference.what.split()[-1] for difference in doubled_uids(progress, checked, at_once=at_once)
    }
    assert unpack_uids(np.zeros((1, 2), np.uint64))[0] in examples


def test_verify_takes_a_corpus_or_its_config(
    local_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_corpus(local_root, shards=3, stages=("crawl",)).manifest.compact()
    done = cli_here("verify", local_root, "--shards", "1-2", "--source", "cc")
    assert done.returncode == 0 and "of 2 shards (source cc; shards 1-2): 0 differences" in done.stdout
    config = list_config(tmp_path, tmp_path / "list.parquet")
    config = with_values(config, corpus={"path": local_root})
    file = str(config_file(config, tmp_path / "corpus.json"))
    assert "of 3 shards: 0 differences" in cli_here("verify", "-c", file).stdout
    for words in ((), (local_root, "-c", file)):
        refused = cli_here("verify", *words)
        assert refused.returncode == 2 and "give a corpus, or -c FILE" in refused.stderr
