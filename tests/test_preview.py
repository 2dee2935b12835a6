"""``capfilt plan --preview``: what another selection would keep is what it then writes."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli.commands.plan import preview_corpus, print_preview
from jobs.cli.main import app
from pipeline.corpus.corpus_state import CorpusState
from pipeline.marks.marking import Verdict, mark
from pipeline.marks.search import marks_of_shards
from pipeline.runs.preview import preview_selection
from pipeline.stages.selection import SelectWorker
from schemas.config import CapfiltConfig
from schemas.errors import CapfiltError
from tests.corpora import Corpus, make_corpus
from tests.runs import config_file, with_values

SELECTIONS = [
    {"top_k": 1, "min_score": None, "web_caption": "compete"},
    {"top_k": 2, "min_score": 0.1, "web_caption": "compete"},
    {"top_k": 3, "min_score": 0.3, "web_caption": "never"},
    {"top_k": 1, "min_score": 0.25, "web_caption": "always"},
    {"top_k": 9, "min_score": -1.0, "web_caption": "always"},
    {"top_k": 2, "min_score": 0.99, "web_caption": "compete"},
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    corpus = make_corpus(str(tmp_path_factory.mktemp("preview") / "corpus"), shards=3, images=24)
    marked = corpus.manifest.query("SELECT uid FROM curated ORDER BY uid LIMIT 2").rows
    for (uid,), what in zip(marked, ("drop", "not-this-caption"), strict=True):
        mark(corpus.records, Verdict(what=what, named_by="uid", values=(uid,), reason="test"))
    return corpus


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_preview_is_what_select_then_writes(corpus: Corpus, selection: dict) -> None:
    config = with_values(corpus.config, select=selection)
    before = {info.path: info.version for info in corpus.storage.list("")}
    [preview] = preview_corpus(config)
    assert before == {info.path: info.version for info in corpus.storage.list("")}
    marks = marks_of_shards(corpus.records, CorpusState(corpus.records), save=False)
    rows, counts = [], Counter[str]()
    for shard in ("00000", "00001", "00002"):
        task = corpus.task("select", "cc", shard, ("crawl", "rank"))
        old = corpus.records.read("select", "cc", shard)
        rules = marks.get(("cc", shard), ())
        record = SelectWorker(config, corpus.records)(replace(task, marks=rules, replaces=old))
        rows += corpus.read("select", "cc", shard)
        counts.update(record.counts)
    origins = Counter(origin for row in rows for origin in row["origins"])
    assert preview["images"] == len(rows) and preview["kept"] == sum(row["status"] == "kept" for row in rows)
    assert preview["captions"] == origins and preview["dropped"] == Counter(
        row["reason"] for row in rows if row["reason"]
    )
    assert preview["dropped"]["marked"] >= 1
    share = origins["web"] / origins.total() if origins else None
    assert preview["web_share"] == (None if share is None else round(share, 6))
    # Now it is what is there.
    [after] = preview_corpus(config)
    assert (after["kept_now"], after["captions_now"]) == (after["kept"], after["captions"])


def test_of_many_shards_the_same_ones_are_read_each_time(corpus: Corpus) -> None:
    state = CorpusState(corpus.records)
    asked = [preview_selection(corpus.config, corpus.records, state, {}, max_shards=2) for _ in range(2)]
    [first], [second] = asked
    assert first == second and (first.shards, first.of_shards) == (2, 3)
    assert 0 < first.kept <= first.images
    # By images: the first shard of that sample, and no further one once there are so many.
    images = asked[0][0].images
    [few] = preview_selection(corpus.config, corpus.records, state, {}, max_shards=2, max_images=images // 2)
    assert (few.shards, few.of_shards) == (1, asked[0][0].of_shards)
    assert (
        preview_selection(corpus.config, corpus.records, state, {}, max_shards=2, max_images=images)
        == asked[0]
    )


def test_the_command_takes_a_selection_by_set_and_prints_it(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(config_file(corpus.config, tmp_path / "c.json"))
    options = ("plan", "-c", file, "--preview", "--set", "select.min_score=0.3")
    answer = CliRunner().invoke(app, [*options, "--json"])
    assert answer.exit_code == 0, answer.output
    [row] = json.loads(answer.output)["preview"]
    config = with_values(corpus.config, select={"min_score": 0.3})
    assert [row] == json.loads(json.dumps(preview_corpus(config)))
    printed = CliRunner().invoke(app, options).output
    assert f"{row['dropped']['below_min_score']:,} images dropped, below_min_score" in printed
    # Of a corpus with two sources one is not ranked yet: it is there, with nothing.
    both = CapfiltConfig.model_validate(
        config.model_dump()
        | {"source": [*config.model_dump()["source"], {"name": "later", "input": ["later.parquet"]}]}
    )
    [taken_in] = corpus.records.intakes("cc")
    shards = {
        name: replace(file, path=file.path.replace("urls/cc/", "urls/later/"))
        for name, file in taken_in.shards.items()
    }
    later = replace(taken_in, source="later", shards=shards)
    corpus.storage.write(later.path, later.to_json().encode())
    rows = preview_corpus(both)
    assert [(row["source"], row["of_shards"]) for row in rows] == [("cc", 3), ("later", 0)]
    print_preview(rows)
    assert "later: no shard has what this selection reads" in capsys.readouterr().out
    empty = make_corpus(str(tmp_path / "corpus"), shards=1, stages=("crawl", "caption"))
    with pytest.raises(CapfiltError, match="no shard has scores yet"):
        preview_corpus(empty.config)
