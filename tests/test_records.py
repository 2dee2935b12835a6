"""Records and attempts: the record is the commit, the first one wins, the loser leaves nothing."""

import io
import json
import tarfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.commit import ShardCommit
from pipeline.corpus.fingerprint import output_fields, stage_fingerprint
from pipeline.corpus.records import Records
from pipeline.digests import sha256_file
from pipeline.manifest.histograms import HistogramSums, histogram_cells
from pipeline.shards.shard_files import read_tar, write_tar
from pipeline.shards.uids import sample_uid
from pipeline.storage.storage import Storage
from schemas.catalog.table_schemas import record_row_schema
from schemas.config import CapfiltConfig, CrawlConfig
from schemas.json_record import utc_now
from schemas.records import Histogram, QuarantineRecord, ShardRecord, ShardTask

CONFIG = CapfiltConfig.model_validate({"corpus": {"path": "x"}, "source": [{"name": "s", "input": ["y"]}]})


def task(root: str, fingerprint: str = "f" * 64) -> ShardTask:
    return ShardTask(
        corpus=root,
        stage="caption",
        source="s",
        kind="web",
        shard="00000",
        run_id="r",
        fingerprint=fingerprint,
        inputs={},
    )


def make(records: Records, content: bytes, root: str, plain: bool = False) -> tuple[ShardCommit, ShardRecord]:
    with ShardCommit(records, task(root), plain_names=plain) as commit:
        file = commit.folder / "out"
        file.write_bytes(content)
        commit.stats.rows_in, commit.stats.rows_out = 3, 2
        commit.stats.count("ok", rows=2)
        commit.stats.count("dropped", "why")
        commit.stats.histograms["h"] = Histogram(edges=(0.0, 0.5, 1.0), counts=(1, 2))
        return commit, commit.publish({"parquet": (file, 2)})


def test_commit_round_trip(root: str) -> None:
    records = Records(Storage(root))
    commit, record = make(records, b"abc", root)
    assert record.attempt == commit.id
    assert record.outputs["parquet"].path == f"captions/s/00000.{commit.id}.parquet"
    assert record.counts == {"ok": 2, "dropped": 1, "dropped/why": 1}
    assert records.read("caption", "s", "00000") == record
    assert records.shards() == {("caption", "s", "00000"): replace(record, histograms={})}
    assert ShardRecord.from_json(record.to_json()) == record
    # Canonical, parts within parts too.
    assert record.outputs and record.histograms
    assert record.to_json() == json.dumps(
        asdict(record), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    assert not commit.folder.exists()


def test_loser_takes_its_files_back(root: str) -> None:
    storage = Storage(root)
    records = Records(storage)
    _, first = make(records, b"abc", root)
    _, second = make(records, b"other", root)
    assert second == first
    assert [info.path for info in storage.list("captions")] == [first.outputs["parquet"].path]


def test_what_is_left_of_attempts_and_quarantine_goes_once_the_shard_is_committed(root: str) -> None:
    records = Records(Storage(root))
    assert records.attempts("caption", "s", "00000", "r").begin(is_retry=False) == 1
    assert records.attempts("caption", "s", "00000", "r").begin(is_retry=False) == 0, "one has begun before"
    assert records.attempts("caption", "s", "00000", "r").begin(is_retry=True) == 2
    assert records.attempts("caption", "s", "00000", "another-run").begin(is_retry=False) == 1
    quarantine = QuarantineRecord(
        stage="caption",
        source="s",
        shard="00000",
        run_id="r",
        attempts=3,
        error="e",
        finished_at=utc_now(),
    )
    records.quarantine(quarantine)
    records.forget_settled(records.shards())
    assert ("caption", "s", "00000") in records.quarantined()
    time.sleep(1.1 if root.startswith("s3") else 0.01)  # S3 has whole seconds
    make(records, b"abc", root)
    records.attempts("caption", "s", "00001", "r").begin(is_retry=False)
    records.quarantine(replace(quarantine, shard="00001"))
    records.attempts("caption", "s", "00000", "r").end(2)
    assert len(records.storage.list("records/attempts")) == 2
    records.forget_settled(records.shards())
    assert [shard for _, _, shard in records.quarantined()] == ["00001"]
    assert [info.path for info in records.storage.list("records/attempts")] == [
        "records/attempts/caption/s/00001/r.1"
    ]


def test_retired_record_is_out_of_sight_but_kept(root: str) -> None:
    records = Records(Storage(root))
    _, first = make(records, b"abc", root)
    records.retire(first)
    assert records.shards() == {}
    assert records.retired() == [first]
    _, second = make(records, b"new", root)
    assert second.attempt != first.attempt
    records.retire(first)  # again, late: must not touch the new one
    assert {shard: shard_record.attempt for shard, shard_record in records.shards().items()} == {
        ("caption", "s", "00000"): second.attempt
    }


def test_plain_names_are_not_taken_back(root: str) -> None:
    storage = Storage(root)
    records = Records(storage)
    _, first = make(records, b"same", root, plain=True)
    _, second = make(records, b"same", root, plain=True)
    assert second == first
    assert storage.read("captions/s/00000.parquet") == b"same"


def test_a_put_that_was_sent_twice_counts_as_written(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The first answer is lost and the client sends again: the second is refused by what the first one made.
    storage = Storage(root)
    records = Records(storage)
    create = Storage.create
    monkeypatch.setattr(Storage, "create", lambda self, *what: create(self, *what) and create(self, *what))
    commit, record = make(records, b"abc", root)
    assert record.attempt == commit.id
    assert storage.read(record.outputs["parquet"].path) == b"abc"


def test_recomputation_that_fails_leaves_the_old_shard(root: str) -> None:
    records = Records(Storage(root))
    _, old = make(records, b"old", root)
    stale = replace(task(root, "e" * 64), replaces=old)
    with pytest.raises(OSError), ShardCommit(records, stale) as commit:
        commit.publish({"parquet": (commit.folder / "never-made", 0)})
    assert records.read("caption", "s", "00000") == old
    with ShardCommit(records, stale) as commit:
        (commit.folder / "out").write_bytes(b"new")
        new = commit.publish({"parquet": (commit.folder / "out", 0)})
    assert records.read("caption", "s", "00000") == new and new.attempt == commit.id
    assert records.retired() == [old]


def test_late_worker_of_another_config_overwrites_nothing(root: str) -> None:
    records = Records(Storage(root))
    with ShardCommit(records, task(root, "0" * 64), plain_names=True) as late:
        (late.folder / "out").write_bytes(b"by the old config")
        _, standing = make(records, b"by the new config", root, plain=True)
        assert late.publish({"parquet": (late.folder / "out", 1)}) == standing
    assert records.storage.read(standing.outputs["parquet"].path) == b"by the new config"


def test_bytes_that_were_overwritten_lose_their_record(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The worst moment: the other one commits between our look and our put.
    records = Records(Storage(root))
    with ShardCommit(records, task(root, "0" * 64), plain_names=True) as late:
        (late.folder / "out").write_bytes(b"by the old config")
        read = Records.read
        looks = iter([None])
        monkeypatch.setattr(Records, "read", lambda self, *shard: next(looks, read(self, *shard)))
        make(records, b"by the new config", root, plain=True)
        looks = iter([None])
        with pytest.raises(RuntimeError, match="different configs"):
            late.publish({"parquet": (late.folder / "out", 1)})
    assert records.shards() == {}


def test_human_captions_do_not_go_stale_with_select() -> None:
    inputs = {"crawl": {"tar": "1"}}
    other = replace_section("select", top_k=5)
    for kind, same in (("human", True), ("web", False)):
        fingerprints = {stage_fingerprint(config, "select", kind, inputs) for config in (CONFIG, other)}
        assert (len(fingerprints) == 1) == same


def test_tuning_keys_make_nothing_stale() -> None:
    tuned = replace_section("crawl", threads=3, timeout_s=1.0, user_agent="x/1")
    changed = replace_section("crawl", image_size_px=100)
    fingerprints = [stage_fingerprint(config, "crawl", "web", {}) for config in (CONFIG, tuned, changed)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert {"threads", "timeout_s", "allow_hosts"}.isdisjoint(output_fields(CrawlConfig()))


def test_avif_and_heif_make_no_crawl_of_an_older_config_stale() -> None:
    older = replace_section("crawl", formats=("JPEG", "PNG", "WEBP", "GIF", "BMP"))
    fewer = replace_section("crawl", formats=("JPEG", "AVIF", "HEIF"))
    fingerprints = [stage_fingerprint(config, "crawl", "web", {}) for config in (CONFIG, older, fewer)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    # As it was before AVIF and HEIF were formats.
    assert fingerprints[0] == "b3ae83c4f338b662e6bd46a57c66c429406a3bfc2a5ac228e7e9a9cd2a7a95cb"


def test_jpeg_scaling_counts_where_it_is_on() -> None:
    off, on = (replace_section("crawl", jpeg_scaling=value) for value in (False, True))
    fingerprints = [stage_fingerprint(config, "crawl", "web", {}) for config in (CONFIG, off, on)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def replace_section(name: str, **values: object) -> CapfiltConfig:
    section = getattr(CONFIG, name).model_copy(update=values)
    return CONFIG.model_copy(update={name: section})


@pytest.mark.parametrize("change", ["model", "input", "seed", "config"])
def test_what_makes_a_caption_stale(change: str) -> None:
    inputs = {"crawl": {"tar": "1"}}
    before = stage_fingerprint(CONFIG, "caption", "web", inputs, ("m",))
    config, models = CONFIG, ("m",)
    match change:
        case "model":
            models = ("n",)
        case "input":
            inputs = {"crawl": {"tar": "2"}}
        case "seed":
            config = replace_section("corpus", seed=1)
        case "config":
            config = replace_section("caption", top_p=0.5)
    assert stage_fingerprint(config, "caption", "web", inputs, models) != before


def test_same_weights_elsewhere_are_the_same() -> None:
    moved = replace_section("caption", model="/another/folder", revision="v2")
    assert stage_fingerprint(moved, "caption", "web", {}, ("m",)) == stage_fingerprint(
        CONFIG, "caption", "web", {}, ("m",)
    )


def test_uid_is_32_hex_digits_and_depends_on_the_source() -> None:
    assert sample_uid("a", "http://x/") != sample_uid("b", "http://x/")
    assert len(sample_uid("a", "é")) == 32


KEYS = st.text("abcdefghij0123456789_-", min_size=1, max_size=20)
MEMBERS = st.dictionaries(st.sampled_from(["jpg", "txt", "json"]), st.binary(max_size=2000), min_size=1)


@given(samples=st.dictionaries(KEYS, MEMBERS, max_size=8))
def test_tar_round_trip(
    samples: dict[str, dict[str, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    offsets = write_tar(path, samples.items())
    with path.open("rb") as file:
        assert dict(read_tar(file)) == samples
    data = path.read_bytes()
    firsts = {key: next(iter(members.values())) for key, members in samples.items()}
    assert {key: data[place : place + len(firsts[key])] for key, place in offsets.items()} == firsts


def test_tar_bytes_depend_on_samples_alone(tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        write_tar(tmp_path / name, [("k", {"jpg": b"1", "txt": b"2"})])
        digests.add(sha256_file(tmp_path / name))
    assert len(digests) == 1


def test_tar_cut_inside_a_member_raises(tmp_path: Path) -> None:
    write_tar(tmp_path / "x", [("k", {"jpg": b"1" * 3000})])
    with pytest.raises(tarfile.ReadError):
        list(read_tar(io.BytesIO((tmp_path / "x").read_bytes()[:2000])))


def test_run_is_its_end_once_it_has_one(root: str) -> None:
    from schemas.records import RunRecord

    records = Records(Storage(root))
    start = RunRecord(
        run_id="1", command="run", config={}, config_digest="", started_at=utc_now(), host="h", versions={}
    )
    records.write_run(start)
    assert [run.outcome for run in records.runs()] == [None]
    records.write_run(replace(start, outcome="done", finished_at=utc_now()))
    assert [run.outcome for run in records.runs()] == ["done"]


def test_histograms_are_summed_from_texts_and_lists_alike() -> None:
    one = {
        "score": {"edges": [0.0, 0.5, 1.0], "counts": [1, 0]},
        "words": {"edges": [0.0, 9.0], "counts": [3]},
    }
    texts = [json.dumps(one), json.dumps(one, separators=(",", ":")), json.dumps(one, sort_keys=True), "{}"]
    cells = histogram_cells(
        {name: Histogram(edges=tuple(h["edges"]), counts=tuple(h["counts"])) for name, h in one.items()}
    )
    schema = record_row_schema("shards")
    rows = [
        *({"histograms": text, "shard": f"{number}"} for number, text in enumerate(texts)),
        *({"shard": f"{number}", **cells} for number in (4, 5)),
    ]
    names = {"source": "s", "stage": "rank", "attempt": "a"}
    table = pa.Table.from_pylist([row | names for row in rows], schema=schema)
    sums = HistogramSums()
    sums.add(table.slice(0, 2))
    sums.add(table.slice(2))
    assert sums.rows() == [
        {"source": "s", "stage": "rank", "name": "score", "low": 0.0, "high": 0.5, "count": 5},
        {"source": "s", "stage": "rank", "name": "words", "low": 0.0, "high": 9.0, "count": 15},
    ]
