"""Selection: the best distinct texts, in one order only; curated shards of the same bytes every time."""

import dataclasses
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_shards import SOURCE, commit_crawl, config_of, encoded, picture, sample_row, task_of

from pipeline.candidates import Candidate
from pipeline.corpus.commit import ShardCommit
from pipeline.corpus.records import Records
from pipeline.digests import sha256_file
from pipeline.shards.shard_files import write_parquet
from pipeline.stages.selection import SelectWorker, select
from pipeline.storage.storage import Storage
from pipeline.text import same_text_key
from schemas.config import CapfiltConfig, SelectConfig
from schemas.records import ShardRecord
from schemas.statuses import DROP_REASONS
from schemas.tables import CANDIDATES, CURATED_FILE


def synthetic(index: int, text: str, score: float | None, rerank: float | None = None) -> Candidate:
    return Candidate(origin="synthetic", candidate=index, text=text, score=score, rerank_score=rerank)


def web(text: str, score: float | None, index: int = 0) -> Candidate:
    return Candidate(origin="web", candidate=index, text=text, score=score)


def human(index: int, text: str, score: float | None) -> Candidate:
    return Candidate(origin="human", candidate=index, text=text, score=score)


def texts(candidates: list[Candidate], kind: str = "web", **config: object) -> list[str]:
    return [candidate.text for candidate in select(candidates, SelectConfig(**config), kind).kept]


PAIR = [synthetic(0, "a dog", 0.3), synthetic(1, "a cat", 0.2), web("Rex 2014", 0.25)]


def test_top_two_of_the_eleven() -> None:
    assert texts(PAIR) == ["a dog", "Rex 2014"]
    assert texts(PAIR, top_k=1) == ["a dog"]
    assert texts(PAIR, top_k=9) == ["a dog", "Rex 2014", "a cat"]


def test_the_web_captions_part() -> None:
    assert texts(PAIR, web_caption="never") == ["a dog", "a cat"]
    assert texts(PAIR, web_caption="always") == ["a dog", "Rex 2014", "a cat"]
    assert texts(PAIR, web_caption="always", top_k=1) == ["a dog", "Rex 2014"]
    assert texts(PAIR, web_caption="always", min_score=0.26) == ["a dog"]


def test_minimum_score_is_reached_by_equality() -> None:
    assert texts(PAIR, min_score=0.25) == ["a dog", "Rex 2014"]
    assert select(PAIR, SelectConfig(min_score=0.31)).reason == "below_min_score"


def test_one_text_counts_once_and_its_best_candidate_stands_for_it() -> None:
    candidates = [
        synthetic(0, "a dog", 0.3),
        synthetic(1, "a dog", 0.3),
        web("A Dog", 0.31),
        web("a cat", 0.1, 1),
    ]
    assert texts(candidates) == ["A Dog", "a cat"]
    kept = select([web("a dog", 0.3), synthetic(4, "a dog", 0.3)], SelectConfig()).kept
    assert [(candidate.origin, candidate.candidate) for candidate in kept] == [("synthetic", 4)]


def test_ties_go_to_synthetic_then_to_the_lower_index() -> None:
    tied = [web("w", 0.2), synthetic(3, "s3", 0.2), synthetic(1, "s1", 0.2), web("v", 0.2, 1)]
    assert texts(tied, top_k=4) == ["s1", "s3", "w", "v"]


def test_reranked_candidates_come_first() -> None:
    candidates = [
        synthetic(0, "best of the first", 0.4, 0.1),
        synthetic(1, "best of the second", 0.3, 0.2),
        synthetic(2, "not seen by the second", 0.35),
    ]
    assert texts(candidates, top_k=3) == ["best of the second", "best of the first", "not seen by the second"]


def test_human_captions_are_all_kept() -> None:
    candidates = [human(0, "one", 0.1), human(1, "two", 0.3), human(2, "Two", 0.2), human(3, "", None)]
    assert texts(candidates, kind="human", top_k=1, min_score=0.9) == ["two", "one"]


@pytest.mark.parametrize(
    ("candidates", "kind", "reason"),
    [
        ([], "web", "no_candidates"),
        ([web("", None), synthetic(0, "", None)], "web", "no_candidates"),
        ([web("a dog", None)], "web", "not_scored"),
        ([human(0, "a dog", None)], "human", "not_scored"),
        ([web("a dog", 0.1)], "web", "below_min_score"),
    ],
)
def test_an_image_with_nothing_left_says_why(candidates: list[Candidate], kind: str, reason: str) -> None:
    selection = select(candidates, SelectConfig(min_score=0.2), kind)
    assert selection.kept == () and selection.reason == reason
    assert reason in DROP_REASONS


SCORES = st.sampled_from([None, 0.0, 0.1, 0.2, 0.2000001, 0.3])
CANDIDATE_LISTS = st.lists(
    st.builds(
        Candidate,
        origin=st.sampled_from(["synthetic", "web"]),
        candidate=st.integers(0, 9),
        text=st.sampled_from(["", "a", "A", "b", "B", "c", "d"]),
        score=SCORES,
        rerank_score=st.none(),
    ),
    unique_by=lambda candidate: (candidate.origin, candidate.candidate),
)
CONFIGS = st.builds(
    SelectConfig,
    top_k=st.integers(1, 4),
    min_score=st.sampled_from([None, 0.1, 0.25]),
    web_caption=st.sampled_from(["compete", "never", "always"]),
)


@given(CANDIDATE_LISTS, CONFIGS, st.randoms())
@settings(max_examples=300)
def test_properties_of_every_selection(candidates: list[Candidate], config: SelectConfig, random) -> None:
    selection = select(candidates, config)
    shuffled = list(candidates)
    random.shuffle(shuffled)
    assert select(shuffled, config) == selection
    kept = list(selection.kept)
    assert (selection.reason is None) == bool(kept)
    assert all(candidate in candidates and candidate.text for candidate in kept)
    assert len({same_text_key(candidate.text) for candidate in kept}) == len(kept)
    scores = [candidate.score for candidate in kept]
    assert scores == sorted(scores, reverse=True)
    assert all(config.min_score is None or score >= config.min_score for score in scores)
    counted = [candidate for candidate in kept if config.web_caption != "always" or candidate.origin != "web"]
    assert len(counted) <= config.top_k
    # Nothing better was left out, but for the same text or the web caption's rule.
    keys = {same_text_key(candidate.text) for candidate in kept}
    for candidate in candidates:
        if not candidate.text or candidate.score is None or same_text_key(candidate.text) in keys:
            continue
        if candidate.origin == "web" and config.web_caption == "never":
            continue
        if config.min_score is not None and candidate.score < config.min_score:
            continue
        if config.web_caption != "always":
            assert len(kept) == config.top_k and candidate.score <= kept[-1].score
            continue
        assert candidate.origin != "web"
        rivals = [
            other
            for other in candidates
            if other.origin != "web" and other.score is not None and other.score >= candidate.score
        ]
        assert len({same_text_key(other.text) for other in rivals} & keys) >= config.top_k


# -- the worker ----------------------------------------------------------------------------------------------


def commit_scores(config: CapfiltConfig, candidates: dict[str, list[Candidate]]) -> ShardRecord:
    rows = [
        sample_row(key, []) | dataclasses.asdict(candidate) | {"raw_text": candidate.text, "truncated": False}
        for key, row_candidates in candidates.items()
        for candidate in row_candidates
    ]
    with ShardCommit(Records(Storage(config.corpus.path)), task_of(config, "rank")) as commit:
        path = commit.folder / "scores.parquet"
        written = write_parquet(path, rows, CANDIDATES)
        return commit.publish({"parquet": (path, written)})


CANDIDATES_BY_KEY = {
    "000000002": [synthetic(0, "a dog", 0.3), synthetic(1, "ein Café “nachts”", 0.4), web("Rex", 0.2)],
    "000000000": [synthetic(0, "a tree", 0.1), synthetic(1, "", None), web("", None)],
    "000000001": [synthetic(0, "a cat", 0.3), synthetic(1, "a cat", 0.3), web("A Cat", 0.3)],
    "000000005": [web("broken", None)],
}


def make(corpus: Path, **select_section: object) -> tuple[CapfiltConfig, ShardRecord, ShardRecord]:
    config = config_of(corpus, select={"min_score": 0.15} | select_section)
    images = {f"00000000{index}": {"jpg": encoded(picture(index))} for index in (2, 0, 1)}
    images["000000005"] = {"jpg": b"\xff\xd8"}
    images["000000006"] = {"png": encoded(picture(6), "PNG")}
    images["000000007"] = {
        "jpeg": encoded(picture(7)),
        "json": b'{"img2dataset": "writes this"}',
        "txt": b"x",
    }
    scores = CANDIDATES_BY_KEY | {key: [web(key, 0.2)] for key in ("000000006", "000000007")}
    return config, commit_crawl(config, images, {}, failed=("000000003",)), commit_scores(config, scores)


def run_worker(
    config: CapfiltConfig, crawl: ShardRecord, rank: ShardRecord, kind: str = "web"
) -> ShardRecord:
    records = Records(Storage(config.corpus.path))
    return SelectWorker(config, records)(task_of(config, "select", kind, crawl=crawl, rank=rank))


def test_worker_writes_what_training_reads(tmp_path: Path) -> None:
    config, crawl, rank = make(tmp_path)
    record = run_worker(config, crawl, rank)
    tar_path = tmp_path / "curated" / SOURCE / "00000.tar"
    with tarfile.open(tar_path) as tar:
        members = {info.name: tar.extractfile(info).read() for info in tar}
    assert list(members) == [
        *(f"000000001.{extension}" for extension in ("jpg", "json", "txt")),
        *(f"000000002.{extension}" for extension in ("jpg", "json", "txt")),
        *(f"000000006.{extension}" for extension in ("png", "json", "txt")),
        *(f"000000007.{extension}" for extension in ("jpg", "json", "txt")),
    ]
    assert members["000000002.jpg"] == encoded(picture(2))
    assert json.loads(members["000000002.json"]) == ["ein Café “nachts”", "a dog"]
    assert members["000000002.txt"].decode() == "ein Café “nachts”"
    assert json.loads(members["000000001.json"]) == ["a cat"]
    rows = pq.read_table(tmp_path / "curated" / SOURCE / "00000.parquet")
    assert rows.schema.equals(CURATED_FILE)
    by_key = {row["key"]: row for row in rows.to_pylist()}
    assert list(by_key) == [f"00000000{index}" for index in (0, 1, 2, 5, 6, 7)]
    best = by_key["000000002"]
    assert (best["status"], best["reason"], best["caption"]) == ("kept", None, "ein Café “nachts”")
    assert best["captions"] == ["ein Café “nachts”", "a dog"]
    assert best["scores"] == pytest.approx([0.4, 0.3]) and best["candidates"] == [1, 0]
    assert best["origins"] == ["synthetic", "synthetic"]
    assert best["url"] == "http://example.org/000000002.jpg" and best["width"] == 40
    assert by_key["000000000"]["reason"] == "below_min_score" and by_key["000000000"]["captions"] == []
    assert by_key["000000005"]["reason"] == "not_scored" and by_key["000000005"]["caption"] is None
    data = tar_path.read_bytes()
    images = {
        key: data[row["offset"] : row["offset"] + row["image_bytes"]]
        for key, row in by_key.items()
        if row["offset"] is not None
    }
    assert images == {
        name.split(".")[0]: content for name, content in members.items() if name[-3:] in ("jpg", "png")
    }
    assert (record.rows_in, record.rows_out, record.images) == (6, 4, 6)
    assert record.counts == {
        "kept": 4,
        "dropped": 2,
        "dropped/below_min_score": 1,
        "dropped/not_scored": 1,
        "captions/synthetic": 3,
        "captions/web": 2,
    }
    assert sum(record.histograms["kept_score"].counts) == 5
    assert record.outputs["tar"].rows == 4 and record.outputs["parquet"].rows == 6


def test_webdataset_reads_the_shard_as_open_clip_and_lavis_do(tmp_path: Path) -> None:
    run_worker(*make(tmp_path))
    tar = str(tmp_path / "curated" / SOURCE / "00000.tar")
    open_clips = webdataset.WebDataset(tar, shardshuffle=False).decode("pilrgb")
    images = list(open_clips.rename(image="jpg;png;jpeg;webp", text="txt").to_tuple("image", "text"))
    assert [text for _, text in images] == ["a cat", "ein Café “nachts”", "000000006", "000000007"]
    assert all(image.mode == "RGB" for image, _ in images)
    lavis = webdataset.WebDataset(tar, shardshuffle=False).decode(
        "pilrgb", handler=webdataset.warn_and_continue
    )
    pairs = list(lavis.to_tuple("jpg", "json", handler=webdataset.ignore_and_continue))
    assert [captions for _, captions in pairs] == [["a cat"], ["ein Café “nachts”", "a dog"], ["000000007"]]


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        run_worker(*make(tmp_path / name))
        folder = tmp_path / name / "curated" / SOURCE
        assert sorted(path.name for path in folder.iterdir()) == ["00000.parquet", "00000.tar"]
        digests.append([sha256_file(path) for path in sorted(folder.iterdir())])
    assert digests[0] == digests[1]
    run_worker(*make(tmp_path / "three", top_k=1))
    assert sha256_file(tmp_path / "three" / "curated" / SOURCE / "00000.tar") != digests[0][1]


def test_human_source_keeps_all_its_captions(tmp_path: Path) -> None:
    config = config_of(tmp_path, select={"min_score": 0.9})
    crawl = commit_crawl(config, {"a": {"jpg": encoded(picture(0))}}, {})
    rank = commit_scores(config, {"a": [human(index, f"caption {index}", index / 10) for index in range(5)]})
    record = run_worker(config, crawl, rank, kind="human")
    assert record.counts == {"kept": 1, "captions/human": 5}


def test_no_model_library_is_loaded() -> None:
    code = (
        "import sys, pipeline.stages.selection; "
        "print(sorted({'torch', 'transformers', 'open_clip', 'ray'} & set(sys.modules)))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert printed.stdout.strip() == "[]"


def test_a_shard_of_two_thousand_images_takes_seconds(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    data = encoded(picture(0))
    keys = [f"{index:09d}" for index in range(2_000)]
    crawl = commit_crawl(config, {key: {"jpg": data} for key in keys}, {})
    candidates = [synthetic(index, f"caption {index % 7}", index / 10) for index in range(10)] + [
        web("web", 0.5)
    ]
    rank = commit_scores(config, dict.fromkeys(keys, candidates))
    start = time.process_time()
    record = run_worker(config, crawl, rank)
    assert record.rows_out == 2_000
    assert time.process_time() - start < 5
