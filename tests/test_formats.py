"""Corpora of other versions: fields and columns more and fewer, and a format that this version cannot read."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpus.corpus_state import CorpusState
from pipeline.digests import sha256_file
from pipeline.manifest import status
from pipeline.manifest.manifest import Manifest
from pipeline.manifest.verify.corpus import verify
from pipeline.storage.storage import Storage
from schemas.catalog.table_schemas import CATALOG
from schemas.corpus_format import FORMAT, CorpusFormat, formats_in
from schemas.records import ShardRecord, shard_record_path
from schemas.stages import Stage
from tests.corpora import Corpus, make_corpus
from tests.processes import cli_here

# A column of each data table, and the questions that read it.
COLUMNS: dict[Stage, tuple[str, str]] = {
    "crawl": ("width", "SELECT uid, status, width FROM samples ORDER BY ALL"),
    "rank": ("truncated", "SELECT uid, origin, candidate, score, truncated FROM candidates ORDER BY ALL"),
    "select": ("height", "SELECT uid, caption, scores, height FROM curated ORDER BY ALL"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(str(tmp_path_factory.mktemp("made") / "corpus"))


@pytest.fixture
def corpus(made: Corpus, tmp_path: Path) -> Corpus:
    corpus = made.copy(str(tmp_path / "corpus"))
    corpus.manifest.compact()
    return corpus


def rewrite(corpus: Corpus, stage: Stage, shard: str, change: Any) -> None:
    """Change the Parquet of a committed shard as another version would have written it, its record too."""
    record = CorpusState(corpus.records).committed[stage, "cc", shard]
    output = record.outputs["parquet"]
    path = Path(corpus.storage.url(output.path))
    pq.write_table(change(pq.read_table(path)), path)
    changed = replace(output, bytes=path.stat().st_size, sha256=sha256_file(path))
    record = replace(record, outputs={**record.outputs, "parquet": changed})
    corpus.storage.write(record.path, record.to_json().encode())


def answers(corpus: Corpus, sql: str) -> Iterator[list[tuple[Any, ...]]]:
    """Answer a question on the three paths: the sandbox, files in place, and anyone's own DuckDB."""
    manifest = Manifest(Storage(corpus.root))
    manifest.compact()
    yield manifest.query(sql).rows
    with manifest.open(in_place=True) as query:
        yield [tuple(row.values()) for row in query.rows(sql)]
    with duckdb.connect(corpus.storage.url(CATALOG), read_only=True) as plain:
        yield plain.execute(sql).fetchall()


@pytest.mark.parametrize("stage", list(COLUMNS))
@pytest.mark.parametrize("shards", [["00000"], ["00001"], ["00000", "00001"]], ids="+".join)
def test_a_column_that_older_files_lack_is_null_on_every_path(
    corpus: Corpus, stage: Stage, shards: list[str]
) -> None:
    column, sql = COLUMNS[stage]
    whole = corpus.manifest.query(sql).rows
    for shard in shards:
        rewrite(corpus, stage, shard, lambda rows: rows.drop_columns([column]))
    # As a format of before says of itself.
    corpus.storage.write(CorpusFormat(0, 9).path, b"{}")
    sandbox, in_place, own = answers(corpus, sql)
    assert sandbox == in_place == own != whole
    assert [row[:-1] for row in sandbox] == [row[:-1] for row in whole]
    differences = [difference.what for difference in verify(Manifest(corpus.storage)).differences]
    assert not any("column" in what or "sha256 than" in what for what in differences)


def test_a_column_more_changes_no_answer(corpus: Corpus) -> None:
    before = {stage: corpus.manifest.query(sql).rows for stage, (_, sql) in COLUMNS.items()}
    for stage in COLUMNS:
        rewrite(corpus, stage, "00001", lambda rows: rows.append_column("more", pa.array([1] * len(rows))))
    for stage, (_, sql) in COLUMNS.items():
        assert [*answers(corpus, sql)] == [before[stage]] * 3


def test_a_field_more_changes_no_answer(corpus: Corpus) -> None:
    facts = status.stats(corpus.manifest)
    committed = CorpusState(corpus.records).committed
    for folder in ("records/crawl", "records/intake", "records/runs", "records/models"):
        for info in corpus.storage.list(folder):
            record = json.loads(corpus.storage.read(info.path))
            corpus.storage.write(info.path, json.dumps(record | {"tomorrow": {"a": [1]}}).encode())
    manifest = Manifest(Storage(corpus.root))
    manifest.rebuild()
    assert status.stats(manifest) == facts
    assert CorpusState(corpus.records).committed == committed


def test_a_run_says_the_format_of_what_it_writes(corpus: Corpus) -> None:
    assert formats_in(corpus.records.list_formats()) == {FORMAT}
    said = json.loads(corpus.storage.read(FORMAT.path))
    assert said["format"] == str(FORMAT)
    corpus.start_run("20270101T000000-again")
    assert json.loads(corpus.storage.read(FORMAT.path)) == said


@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        ["sql", "{}", "SELECT 1"],
        ["verify"],
        ["gc"],
        ["manifest", "rebuild"],
        ["mark", "{}", "--host", "a.b", "--what", "drop", "--reason", "x"],
    ],
    ids=lambda command: command[0],
)
def test_a_newer_format_is_refused_in_one_line(corpus: Corpus, command: list[str]) -> None:
    corpus.storage.write(CorpusFormat(2, 3).path, b'{"what": ["nobody", "knows"]}')
    # What such a version may have written: no error is about it, and none says to delete it.
    path = shard_record_path("crawl", "cc", "00000")
    corpus.storage.write(path, b'{"stage": 7}')
    listed = [(info.path, info.version) for info in corpus.storage.list("")]
    arguments = [argument.format(corpus.root) for argument in command]
    done = cli_here(*arguments, *([] if "{}" in command else [corpus.root]))
    assert done.returncode == 2
    assert (
        "is a corpus of format 2.3, and this capfilt reads formats up to 1.x: upgrade capfilt" in done.stderr
    )
    assert len(done.stderr.strip().splitlines()) == 1 and "delete" not in done.stderr
    assert [(info.path, info.version) for info in corpus.storage.list("")] == listed


def test_a_later_format_that_older_versions_may_read_is_read(corpus: Corpus) -> None:
    facts = status.stats(corpus.manifest)
    corpus.storage.write(CorpusFormat(FORMAT.major, FORMAT.minor + 1).path, b"")
    assert status.stats(Manifest(Storage(corpus.root))) == facts


def test_an_upgrade_makes_old_parts_whole(corpus: Corpus) -> None:
    ask = "SELECT * FROM shards ORDER BY ALL"
    expected = corpus.manifest.query(ask).rows
    for info in corpus.storage.list("manifest/shards"):
        path = Path(corpus.storage.url(info.path))
        pq.write_table(pq.read_table(path).drop_columns(["device", "files"]), path)
    assert Manifest(Storage(corpus.root)).query(ask).rows != expected
    rows = json.loads(cli_here("manifest", "upgrade", corpus.root, "--json").stdout)["rows"]
    assert rows == len(expected)
    assert Manifest(Storage(corpus.root)).query(ask).rows == expected
    with duckdb.connect(corpus.storage.url(CATALOG), read_only=True) as plain:
        assert plain.execute(ask).fetchall() == expected
    assert json.loads(cli_here("manifest", "upgrade", corpus.root, "--json").stdout)["rows"] == 0


def test_a_record_without_a_field_of_today_reads(corpus: Corpus) -> None:
    record = CorpusState(corpus.records).committed["crawl", "cc", "00000"]
    fields = json.loads(record.to_json())
    del fields["seconds"]
    assert ShardRecord.from_json(json.dumps(fields)) == replace(record, seconds={})
