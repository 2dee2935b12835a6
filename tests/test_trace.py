"""One sample's way through the corpus."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.lineage.sample_trace import trace
from pipeline.manifest.manifest import Manifest
from pipeline.shards.uids import sample_uid
from schemas.errors import CapfiltError
from tests.corpora import CAPTIONER, NUM_CAPTIONS, RANKER, RUN, Corpus, make_corpus, score_of


@pytest.fixture
def local_root(tmp_path: Path) -> str:
    return str(tmp_path / "corpus")


def rows(corpus: Corpus, where: str) -> list[dict]:
    return corpus.manifest.query(f"SELECT * FROM samples WHERE {where} ORDER BY url").dicts()


def test_a_kept_sample_is_traced_from_url_to_curated_shard(root: str) -> None:
    corpus = make_corpus(root)
    curated = corpus.manifest.query("SELECT * FROM curated ORDER BY uid LIMIT 1").dicts()[0]
    (traced,) = trace(corpus.manifest, curated["uid"])
    assert trace(corpus.manifest, curated["url"]) == [traced]
    assert (traced["url"], traced["shard"], traced["key"]) == (
        curated["url"],
        curated["shard"],
        curated["key"],
    )
    assert corpus.storage.exists(traced["tar"])
    assert traced["curated_tar"] == f"curated/cc/{curated['shard']}.tar"
    assert traced["fetches"][0]["final_url"].endswith("?final")
    assert len(traced["candidates"]) == NUM_CAPTIONS + 1
    kept = [candidate for candidate in traced["candidates"] if candidate["outcome"].startswith("kept")]
    assert [candidate["text"] for candidate in kept] == curated["captions"]
    assert [candidate["outcome"] for candidate in kept] == [
        f"kept as number {place + 1}" for place in range(len(kept))
    ]
    for candidate in traced["candidates"]:
        assert candidate["score"] == pytest.approx(
            score_of(curated["uid"], candidate["origin"], candidate["candidate"]), abs=1e-6
        )
    assert [row["stage"] for row in traced["stages"]] == ["urls", "crawl", "caption", "rank", "select"]
    assert [model["digest"] for model in traced["models"]] == [CAPTIONER, RANKER]
    assert [run["run_id"] for run in traced["runs"]] == [RUN]


def test_every_candidate_has_an_outcome_in_words(local_root: str) -> None:
    corpus = make_corpus(local_root, shards=3)
    outcomes = set()
    for row in rows(corpus, "status = 'ok'")[:12]:
        (traced,) = trace(corpus.manifest, row["uid"])
        for candidate in traced["candidates"]:
            outcomes.add(candidate["outcome"])
            if candidate["outcome"] == "under select.min_score = 0.1":
                assert candidate["score"] < 0.1
    assert {
        "kept as number 1",
        "kept as number 2",
        "others score higher",
        "under select.min_score = 0.1",
    } <= outcomes
    assert any(outcome.startswith("the same text as synthetic") for outcome in outcomes)


def test_a_run_of_a_version_with_other_keys_is_traced(local_root: str) -> None:
    corpus = make_corpus(local_root)
    (run,) = corpus.records.runs()
    corpus.records.write_run(replace(run, config={"select": {"of_another_version": 1}}))
    (traced,) = trace(corpus.manifest, rows(corpus, "status = 'ok'")[0]["uid"])
    outcomes = {candidate["outcome"] for candidate in traced["candidates"]}
    assert outcomes and not any("select.min_score" in outcome for outcome in outcomes)


def test_a_failed_sample_ends_at_its_fetch(local_root: str) -> None:
    corpus = make_corpus(local_root)
    failed = rows(corpus, "reason = 'http_4xx'")[0]
    (traced,) = trace(corpus.manifest, failed["uid"])
    assert (traced["fetches"][0]["status"], traced["fetches"][0]["http_status"]) == ("failed", 404)
    assert (traced["candidates"], traced["selection"], traced["curated_tar"]) == ([], None, None)
    assert [row["stage"] for row in traced["stages"]] == ["urls", "crawl"]


def test_a_retried_sample_shows_both_fetches(local_root: str) -> None:
    corpus = make_corpus(local_root, shards=1)
    (uid,) = corpus.add_retry("cc", of="00000", shard="00001", batch=1)
    corpus.make("cc", "00001")
    (traced,) = trace(corpus.manifest, uid)
    assert [(fetch["shard"], fetch["status"]) for fetch in traced["fetches"]] == [
        ("00000", "failed"),
        ("00001", "ok"),
    ]
    assert traced["shard"] == "00001"
    assert traced["selection"]["status"] == "kept"


def test_a_sample_on_its_way_says_what_is_not_done(local_root: str) -> None:
    corpus = make_corpus(local_root, shards=1, stages=("crawl", "caption"))
    row = rows(corpus, "status = 'ok'")[0]
    (traced,) = trace(corpus.manifest, row["uid"])
    assert {candidate["outcome"] for candidate in traced["candidates"]} == {"not scored yet"}
    corpus.make("cc", "00000", ("rank",))
    (traced,) = trace(corpus.manifest, row["uid"])
    assert "not selected yet" in {candidate["outcome"] for candidate in traced["candidates"]}


def test_a_url_of_two_sources_has_two_ways(local_root: str) -> None:
    corpus = make_corpus(local_root, sources=("cc", "laion"), shards=1)
    traces = trace(corpus.manifest, "http://host0.example/00000/0.jpg")
    assert [traced["source"] for traced in traces] == ["cc", "laion"]
    assert traces[0]["uid"] != traces[1]["uid"]


@pytest.mark.parametrize("uid_or_url", ["0" * 32, "http://nowhere.example/'", "'"])
def test_an_unknown_sample_is_a_user_error(tmp_path, uid_or_url: str) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"), shards=1, stages=("crawl",))
    with pytest.raises(CapfiltError, match="no sample of"):
        trace(corpus.manifest, uid_or_url)


def test_a_damaged_file_is_named(local_root: str) -> None:
    corpus = make_corpus(local_root, shards=1)
    path = corpus.records.read("crawl", "cc", "00000").outputs["parquet"].path
    corpus.storage.write(path, b"not Parquet")
    with pytest.raises(CapfiltError, match=rf"{path}.*capfilt verify"):
        trace(corpus.manifest, "0" * 32)


def test_a_trace_finds_what_the_index_does_not_cover(root: str) -> None:
    corpus = make_corpus(root)
    corpus.manifest.compact()

    def found(shard: str) -> list[str]:
        with Manifest(corpus.storage).open() as query:
            url = query.rows(f"SELECT max(url) AS url FROM base.raw WHERE shard = '{shard}'")[0]["url"]
        return [traced["shard"] for traced in trace(Manifest(corpus.storage), url)]

    def index() -> list[str]:
        return [info.path for info in corpus.storage.list("manifest/uids")]

    assert len(index()) == 1 and found("00001") == ["00001"]
    corpus.add_urls("cc", ["00002"], 4, batch=1)
    corpus.make("cc", "00002", ("crawl",))
    assert found("00002") == ["00002"], "of a batch since"
    assert corpus.manifest.compact() > 0 and len(index()) == 2
    covered = Manifest(corpus.storage).uids
    batches = corpus.records.intakes()
    uid = sample_uid("cc", rows(corpus, "shard = '00002'")[0]["url"])
    assert covered.shards_of([uid], batches) == {("cc", "00002")}
    assert covered.shards_of(["0" * 32], batches) == set()
    with pytest.raises(CapfiltError, match="no sample of"):
        trace(corpus.manifest, "0" * 32)
    for path in index():
        corpus.storage.write(path, b"torn")
    assert found("00001") == ["00001"] and found("00002") == ["00002"]
    corpus.manifest.rebuild()
    assert len(index()) == 1 and found("00001") == ["00001"] and found("00002") == ["00002"]
