"""Marks: a verdict on samples is a record, select obeys it, and nothing else changes."""

import csv
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from jobs.cli.commands.plan import plan_corpus
from jobs.cli.main import app
from pipeline.candidates import Candidate
from pipeline.corpus.corpus_state import CorpusState
from pipeline.corpus.fingerprint import stage_fingerprint
from pipeline.corpus.records import Records
from pipeline.lineage.sample_trace import trace
from pipeline.manifest.manifest import Manifest
from pipeline.marks.from_file import read_values
from pipeline.marks.marking import Verdict, mark, places_of, take_back
from pipeline.marks.rules import RuleBook, SampleMarks
from pipeline.marks.search import marks_of_shards
from pipeline.stages.selection import SelectWorker, select
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig, SelectConfig
from schemas.errors import CapfiltError
from schemas.marks import MarkRule, rules_digest
from schemas.names import url_host
from tests.corpora import Corpus, make_corpus
from tests.runs import curated_files, curated_rows, do_run, small_config, with_values


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(str(tmp_path_factory.mktemp("made") / "corpus"))


@pytest.fixture
def corpus(made: Corpus, tmp_path: Path) -> Corpus:
    return made.copy(str(tmp_path / "corpus"))


def drop(named_by: str, *values: str, what: str = "drop", caption: str | None = None) -> Verdict:
    return Verdict(what=what, named_by=named_by, values=values, reason="not what it says", caption=caption)


def rules(corpus: Corpus) -> dict[tuple[str, str], tuple[MarkRule, ...]]:
    """Return what a plan finds: nothing is written."""
    before = sorted(info.path for info in corpus.storage.list("records"))
    held_rules = marks_of_shards(corpus.records, CorpusState(corpus.records), save=False)
    assert before == sorted(info.path for info in corpus.storage.list("records"))
    return dict(held_rules)


def kept(corpus: Corpus, **where: str) -> list[dict]:
    return [row for row in corpus.manifest.query("SELECT * FROM curated ORDER BY uid").dicts()
            if all(row[name] == value for name, value in where.items())]  # fmt: skip


# -- what a verdict says of a sample -------------------------------------------------------------------------


def test_a_dropped_image_keeps_nothing_and_says_why() -> None:
    candidates = [Candidate(origin="synthetic", candidate=0, text="a cat", score=0.9)]
    for kind in ("web", "human"):
        selection = select(candidates, SelectConfig(), kind, SampleMarks(is_dropped=True))
        assert (selection.kept, selection.reason) == ((), "marked")


def test_a_marked_text_is_out_of_the_running_and_the_next_best_is_kept() -> None:
    texts = {"A cat": 0.9, "a dog": 0.8, "a cow": 0.7}
    candidates = [
        Candidate(origin="synthetic", candidate=number, text=text, score=score)
        for number, (text, score) in enumerate(texts.items())
    ]
    marks = SampleMarks(texts=frozenset({"a cat"}))
    assert [candidate.text for candidate in select(candidates, SelectConfig(), "web", marks).kept] == [
        "a dog",
        "a cow",
    ]
    all_marked = SampleMarks(texts=frozenset(text.lower() for text in texts))
    assert select(candidates, SelectConfig(), "web", all_marked).reason == "marked"
    assert select(candidates, SelectConfig(), "human", marks).kept[0].text == "a dog"


@pytest.mark.parametrize(
    ("named_by", "value"),
    [("uid", "0" * 32), ("url", "http://User@A.example:80/x"), ("host", "a.example"), ("sha256", "f" * 64)],
)
def test_a_sample_is_named_in_four_ways(named_by: str, value: str) -> None:
    sample = {"uid": "0" * 32, "url": "http://User@A.example:80/x", "sha256": "f" * 64}
    book = RuleBook([MarkRule(what="drop", named_by=named_by, value=value)])
    assert book.on(sample).is_dropped
    assert not book.on(dict.fromkeys(sample, "another")).is_dropped
    text = RuleBook([MarkRule(what="not-this-caption", named_by=named_by, value=value, caption="A Cat")])
    assert text.on(sample) == SampleMarks(texts=frozenset({"a cat"}))


def test_hosts_are_the_same_in_python_and_sql(corpus: Corpus) -> None:
    urls = ["http://A.b:80/x", "https://u:p@[::1]:8/", "HTTP://ü.example?x", "nope", "//x/y", "data:x", ""]
    asked = corpus.manifest.table("SELECT url_host(unnest($urls)) AS host", {"urls": urls})
    assert asked["host"].to_pylist() == [url_host(url) for url in urls]


# -- records -------------------------------------------------------------------------------------------------


def test_a_mark_is_found_in_its_shard_alone_however_it_names_the_sample(tmp_path: Path) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"), sources=("cc", "laion"), shards=3)
    sample = kept(corpus, source="cc", shard="00001")[0]
    for named_by in ("uid", "url", "sha256"):
        [record] = mark(corpus.records, drop(named_by, sample[named_by]))
        # Both sources list the URL; the uid and, here, the bytes are its own in each.
        places = [("cc", "00001"), ("laion", "00001")] if named_by == "url" else [("cc", "00001")]
        assert places_of([record]) == places and sorted(rules(corpus)) == places
        take_back(corpus.records, drop(named_by, sample[named_by]))
        assert rules(corpus) == {}
    [record] = mark(corpus.records, drop("host", "host1.example"))
    assert len(places_of([record])) == 6
    [near] = mark(corpus.records, drop("uid", sample["uid"]), within=[("cc", "00001")])
    assert near.shards == {"cc": {"00001": (sample["uid"],)}} and near.searched == record.searched


def test_later_lists_and_retries_are_searched_once(corpus: Corpus) -> None:
    timed_out = next(row for row in corpus.read("crawl", "cc", "00000") if row["reason"] == "timeout")
    mark(corpus.records, drop("host", "host2.example"))
    mark(corpus.records, drop("url", "http://host0.example/later/00007/0.jpg", timed_out["url"]))
    assert set(rules(corpus)) == {("cc", "00000"), ("cc", "00001")}
    corpus.add_urls("cc", ["00007"], 3, batch=1, path="later/")
    corpus.add_retry("cc", "00000", "00008", batch=2)
    held_rules = rules(corpus)
    assert [rule.value for rule in held_rules["cc", "00007"]] == [
        "host2.example", "http://host0.example/later/00007/0.jpg"
    ]  # fmt: skip
    assert timed_out["url"] in {rule.value for rule in held_rules["cc", "00008"]}
    saved = marks_of_shards(corpus.records, CorpusState(corpus.records), save=True)
    assert saved == held_rules and len(corpus.records.mark_searches()) == 2
    assert marks_of_shards(corpus.records, CorpusState(corpus.records), save=True) == held_rules
    assert len(corpus.records.mark_searches()) == 2


def test_a_retried_url_counts_where_its_image_is(corpus: Corpus) -> None:
    [uid] = corpus.add_retry("cc", "00000", "00008", batch=1)
    [record] = mark(corpus.records, drop("uid", uid))
    assert places_of([record]) == [("cc", "00008")]


def test_a_trace_names_the_marks_and_what_they_did(corpus: Corpus) -> None:
    dropped, other = kept(corpus, shard="00000")[:2]
    mark(corpus.records, drop("url", dropped["url"]))
    mark(corpus.records, drop("uid", other["uid"], what="not-this-caption"))
    task = corpus.task("select", "cc", "00000", ("crawl", "rank"))
    stale = corpus.records.read("select", "cc", "00000")
    SelectWorker(corpus.config, corpus.records)(
        replace(task, marks=rules(corpus)["cc", "00000"], replaces=stale)
    )
    [traced] = trace(corpus.manifest, dropped["uid"])
    assert [row["named_by"] for row in traced["marks"]] == ["url"] and traced["selection"][
        "reason"
    ] == "marked"
    assert {row["outcome"] for row in traced["candidates"]} == {"marked"}
    [traced] = trace(corpus.manifest, other["uid"])
    outcomes = {row["text"]: row["outcome"] for row in traced["candidates"]}
    assert outcomes[other["caption"]] == "marked" and "kept as number 1" in outcomes.values()
    assert [row["caption"] for row in traced["marks"]] == [other["caption"]]
    assert trace(corpus.manifest, kept(corpus, shard="00001")[0]["uid"])[0]["marks"] == []
    printed = CliRunner().invoke(app, ["trace", corpus.root, dropped["uid"]]).output
    assert "not what it says" in printed and "selection: dropped, marked" in printed


def test_bytes_that_are_crawled_later_are_found(corpus: Corpus) -> None:
    same = kept(corpus)[0]["sha256"]
    mark(corpus.records, drop("sha256", same))
    corpus.add_urls("laion", ["00000"], 12)
    before = rules(corpus)
    corpus.make("laion", "00000", ("crawl",))
    assert rules(corpus) == before  # other bytes
    assert len(marks_of_shards(corpus.records, CorpusState(corpus.records), save=True)) == 1
    [search] = corpus.records.mark_searches()
    assert search.searched == (corpus.records.read("crawl", "laion", "00000").attempt,)


def test_of_two_who_mark_at_once_both_count(root: str) -> None:
    corpus = make_corpus(root)
    first, second = kept(corpus)[:2]
    with ThreadPoolExecutor(8) as people:
        list(
            people.map(lambda uid: mark(corpus.records, drop("uid", uid)), [first["uid"], second["uid"]] * 4)
        )
    assert len(corpus.records.marks()) == 8
    held = {rule.value for held_rules in rules(corpus).values() for rule in held_rules}
    assert held == {first["uid"], second["uid"]}
    # One undoes what he sees, another marks the same anew: it stays marked, and the digest is that of one mark.
    before = rules(corpus)
    take_back(corpus.records, drop("uid", first["uid"]))
    assert {rule.value for held_rules in rules(corpus).values() for rule in held_rules} == {second["uid"]}
    mark(corpus.records, drop("uid", first["uid"]))
    assert rules(corpus) == before
    assert {place: rules_digest(held_rules) for place, held_rules in before.items()} == {
        place: rules_digest((*held_rules, *held_rules)) for place, held_rules in reversed(before.items())
    }


def test_part_of_a_mark_is_taken_back(corpus: Corpus) -> None:
    first, other, *_ = kept(corpus)
    captions = {row["uid"]: row["caption"] for row in (first, other)}
    [record] = mark(corpus.records, drop("uid", *captions, what="not-this-caption"))
    assert record.captions == captions
    with pytest.raises(CapfiltError, match="no mark not-this-caption by uid"):
        take_back(corpus.records, drop("uid", first["uid"], what="not-this-caption", caption="another text"))
    take_back(
        corpus.records, drop("uid", first["uid"], what="not-this-caption", caption=first["caption"].upper())
    )
    assert [rule.value for held_rules in rules(corpus).values() for rule in held_rules] == [other["uid"]]
    with pytest.raises(CapfiltError, match="no mark not-this-caption by uid"):
        take_back(corpus.records, drop("uid", first["uid"], what="not-this-caption"))
    by_value = {row["value"]: row for row in corpus.manifest.query("SELECT * FROM marks").dicts()}
    assert by_value[first["uid"]]["undone_at"] and not by_value[other["uid"]]["undone_at"]
    assert by_value[other["uid"]]["caption"] == other["caption"]


def test_the_table_survives_merged_parts_and_a_rebuild(corpus: Corpus) -> None:
    for row in kept(corpus)[:10]:
        mark(corpus.records, drop("uid", row["uid"]))
        corpus.manifest.compact()
    take_back(corpus.records, drop("uid", *(row["uid"] for row in kept(corpus)[:3])))
    asked = "SELECT * FROM marks ORDER BY mark, value"
    before = corpus.manifest.query(asked).dicts()
    assert len(before) == 10 and sum(row["undone_at"] is not None for row in before) == 3
    assert corpus.manifest.rebuild()["marks"] == 13
    assert corpus.manifest.query(asked).dicts() == before


@pytest.mark.parametrize(
    ("verdict", "why"),
    [
        (drop("uid", "0" * 32), "no sample has the uid"),
        (drop("uid", "nope"), "32 hex digits"),
        (drop("host", "http://a.example/"), "without scheme and port"),
        (drop("host", "A.example"), "lower case"),
        (drop("sha256", "0"), "64 hex digits"),
        (drop("uid"), "nothing is named"),
        (drop("host", "a.example", what="not-this-caption"), "--caption"),
        (drop("uid", "0" * 32, caption="a cat"), "--caption has no effect"),
        (replace(drop("uid", "0" * 32), reason=" "), "--reason"),
        (replace(drop("uid", "0" * 32), reason="x" * 501), "--reason"),
        (replace(drop("uid", "0" * 32), reason="\udcff"), "--reason"),
        (drop("url", "http://a.example/\udcff"), "--url"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_written(
    corpus: Corpus, verdict: Verdict, why: str
) -> None:
    with pytest.raises(CapfiltError, match=why) as refused:
        mark(corpus.records, verdict)
    assert str(refused.value).isprintable() and corpus.records.marks() == []


def test_shards_without_marks_keep_the_fingerprint_they_had() -> None:
    config = CapfiltConfig.model_validate(
        {"corpus": {"path": "c"}, "source": [{"name": "cc", "input": ["cc.csv"]}]}
    )
    inputs = {"crawl": {"tar": "a"}, "rank": {"parquet": "b"}}
    # As the version before marks computed it.
    before = "d62a394d66604bff671faf019d4b9dd3f71a6be2344bcdb53a1f6184b85ccc25"
    assert stage_fingerprint(config, "select", "web", inputs) == before
    assert stage_fingerprint(config, "select", "web", inputs, marks="x") != before


# -- lists ---------------------------------------------------------------------------------------------------


def test_lists_of_every_format_name_uids_or_urls(tmp_path: Path) -> None:
    uids = [f"{number:032x}" for number in range(3)]
    urls = [f"http://a.example/{number}.jpg" for number in range(3)]
    pq.write_table(pa.table({"caption": ["x"] * 3, "uid": uids, "url": urls}), tmp_path / "l.parquet")
    with (tmp_path / "l.csv").open("w") as file:
        csv.writer(file).writerows([["IMG", "text"], *([url, "a text"] for url in urls)])
    (tmp_path / "l.jsonl").write_text("".join(json.dumps({"uid": uid}) + "\n" for uid in uids))
    (tmp_path / "uids.txt").write_text("\n".join([*uids, "", uids[0]]))
    (tmp_path / "urls.txt").write_text("\n".join(urls) + "\n")
    for name in ("l.parquet", "l.jsonl", "uids.txt"):
        assert read_values(str(tmp_path / name)) == ("uid", tuple(uids)), name
    for name in ("l.csv", "urls.txt"):
        assert read_values(str(tmp_path / name)) == ("url", tuple(urls)), name
    (tmp_path / "l.csv").write_text("a,b\n1,2\n")
    for name in ("l.csv", "none.csv"):
        with pytest.raises(CapfiltError, match="--from"):
            read_values(str(tmp_path / name))


def test_many_values_are_several_marks(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.marks.marking.MAX_VALUES", 4)
    uids = [row["uid"] for row in kept(corpus)]
    mark_records = mark(corpus.records, drop("uid", *uids))
    assert len(mark_records) == 5 and sorted(
        value for record in mark_records for value in record.values
    ) == sorted(uids)
    assert {rule.value for held_rules in rules(corpus).values() for rule in held_rules} == set(uids)
    assert len(take_back(corpus.records, drop("uid", *uids))) == 5 and rules(corpus) == {}


# -- the whole way -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(base_url: str, tmp_path_factory: pytest.TempPathFactory) -> CapfiltConfig:
    """A corpus of four small shards, made by a run."""
    folder = tmp_path_factory.mktemp("ran")
    config = small_config(str(folder / "corpus"), folder / "urls.parquet", base_url)
    assert do_run(config).exit_code == 0
    return config


def command(config: CapfiltConfig, *arguments: str) -> dict:
    result = CliRunner().invoke(
        app, ["mark", config.corpus.path, "--what", "drop", "--reason", "test", "--json", *arguments]
    )
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


@pytest.mark.slow
def test_two_marked_samples_leave_every_curated_byte_and_undo_gives_them_back(
    ran: CapfiltConfig, tmp_path: Path
) -> None:
    before = curated_files(ran.corpus.path)
    fingerprints = {
        shard: record.fingerprint for shard, record in Records(Storage(ran.corpus.path)).shards().items()
    }
    rows = [row for row in curated_rows(ran.corpus.path) if row["status"] == "kept"]
    chosen = list({row["shard"]: row for row in rows if row["shard"] in ("00001", "00003")}.values())
    names = [word for row in chosen for word in ("--uid", row["uid"])]
    places = sorted(f"{row['source']}/{row['shard']}" for row in chosen)
    assert command(ran, *names)["shards"] == places
    plan = plan_corpus(ran)
    assert plan["marked"] == places and plan["stale_because"] == {}

    result = do_run(ran)  # without --recompute: whoever marked wants it
    assert result.record.outcome == "done" and result.record.shards_done == 2
    after = curated_files(ran.corpus.path)
    changed = {path.split("/")[2].split(".")[0] for path in before if before[path] != after[path]}
    assert changed == {"00001", "00003"}
    for row in chosen:
        tar = (Path(ran.corpus.path) / f"curated/{row['source']}/{row['shard']}.tar").read_bytes()
        assert row["key"].encode() not in tar
    dropped = {
        row["uid"]: row["reason"] for row in curated_rows(ran.corpus.path) if row["status"] == "dropped"
    }
    assert {dropped[row["uid"]] for row in chosen} == {"marked"}
    assert plan_corpus(ran)["marked"] == [] and do_run(ran).record.shards_done == 0
    assert CliRunner().invoke(app, ["verify", ran.corpus.path]).exit_code == 0

    # It survives a rebuild, another selection, and a crawl anew.
    Manifest(Storage(ran.corpus.path)).rebuild()
    assert plan_corpus(ran)["marked"] == []
    other = with_values(ran, select={"top_k": 3})
    assert plan_corpus(other)["marked"] == []
    do_run(other, recompute=True)
    records = Records(Storage(ran.corpus.path))
    records.retire(records.read("crawl", chosen[0]["source"], chosen[0]["shard"]))
    do_run(ran, recompute=True)
    uids = {row["uid"] for row in curated_rows(ran.corpus.path) if row["status"] == "kept"}
    assert not uids & {row["uid"] for row in chosen}
    assert len(uids) == len(rows) - 2

    command(ran, "--undo", *names)
    assert plan_corpus(ran)["marked"] == places
    do_run(ran)
    assert curated_files(ran.corpus.path) == before
    again = {shard: record.fingerprint for shard, record in records.shards().items()}
    untouched = {shard for shard in again if shard[2] in ("00000", "00002")}
    assert {again[shard] for shard in untouched} == {fingerprints[shard] for shard in untouched}
    assert plan_corpus(ran)["marked"] == []
