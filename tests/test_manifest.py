"""The manifest: parts, rebuild, catalog, committed data only, and readers beside writers."""

import json
import multiprocessing
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.bench.fixtures.s3 import S3Server
from pipeline.corpus.corpus_state import CorpusState
from pipeline.corpus.garbage_collection import find_orphans, remove
from pipeline.lineage.sample_trace import trace
from pipeline.manifest import status
from pipeline.manifest.compaction import CompactedRecords
from pipeline.manifest.manifest import Manifest, Query
from pipeline.manifest.verify.corpus import verify
from pipeline.storage.errors import ObjectStorageError
from pipeline.storage.file_info import FileInfo
from pipeline.storage.storage import Storage
from schemas.catalog.table_schemas import CATALOG, HISTOGRAM_BINS, HISTOGRAM_COUNTS, RECORD_TABLES
from schemas.catalog.views import FUNCTIONS, TABLE_MACROS, VIEWS
from schemas.errors import CorruptShardError
from schemas.json_record import utc_now
from schemas.records import IntakeRecord, OutputFile, QuarantineRecord, ShardRecord
from schemas.tables import TABLES
from tests.corpora import NUM_CAPTIONS, RUN, Corpus, make_corpus

STATES = "SELECT stage, source, shard, state, attempt FROM shards ORDER BY ALL"


@pytest.fixture
def local_root(tmp_path: Path) -> str:
    return str(tmp_path / "corpus")


def count(corpus: Corpus, table: str) -> int:
    return corpus.manifest.query(f"SELECT count(*) FROM {table}").rows[0][0]


def contents(manifest: Manifest) -> dict[str, list]:
    with manifest.open() as query:
        return {table: query.rows(f"SELECT * FROM {table} ORDER BY ALL") for table in TABLES}


def part_files(corpus: Corpus, table: str = "shards") -> list[str]:
    return [info.path for info in corpus.storage.list(f"manifest/{table}")]


def quarantine(corpus: Corpus, shard: str, error: str) -> None:
    corpus.records.quarantine(
        QuarantineRecord(
            stage="rank", source="cc", shard=shard, run_id=RUN, attempts=3, error=error, finished_at=utc_now()
        )
    )


def test_every_table_has_exactly_its_declared_columns(root: str) -> None:
    corpus = make_corpus(root)
    corpus.manifest.compact()
    with corpus.manifest.open() as query:
        for table, schema in TABLES.items():
            rows = query.rows(f"SELECT * FROM (DESCRIBE {table})")
            assert [row["column_name"] for row in rows] == schema.names
        documented = query.rows(
            "SELECT comment FROM duckdb_columns() WHERE table_name = 'samples' AND schema_name = 'main'"
        )
    assert all(row["comment"] for row in documented)
    assert count(corpus, "samples") == 24
    assert count(corpus, "candidates") == 18 * (NUM_CAPTIONS + 1)
    assert count(corpus, "curated") + count(corpus, "dropped") == 18
    assert count(corpus, "shards") == 10
    assert count(corpus, "runs") == 1
    assert count(corpus, "models") == 2


def test_plain_duckdb_reads_the_catalog(tmp_path: Path) -> None:
    corpus = make_corpus(str(tmp_path / "it's [1] *corpus?"))
    corpus.manifest.compact()
    with duckdb.connect(f"{corpus.root}/{CATALOG}", read_only=True) as plain:
        for table in (*TABLES, *VIEWS):
            mine = corpus.manifest.query(f"SELECT * FROM {table} ORDER BY ALL").rows
            assert plain.execute(f"SELECT * FROM {table} ORDER BY ALL").fetchall() == mine, table


def test_a_corpus_without_any_shard_has_empty_tables(root: str) -> None:
    corpus = Corpus(root)
    assert [count(corpus, table) for table in (*TABLES, *VIEWS)] == [0] * len((*TABLES, *VIEWS))
    corpus.manifest.compact()
    if corpus.storage.is_local:
        with duckdb.connect(f"{root}/{CATALOG}", read_only=True) as plain:
            for table in (*TABLES, *VIEWS):
                assert plain.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


def test_rebuild_makes_the_same_tables(root: str) -> None:
    corpus = make_corpus(root, stages=("crawl", "caption"))
    corpus.manifest.compact()
    retired = corpus.records.read("caption", "cc", "00000")
    corpus.records.retire(retired)
    corpus.manifest.compact()
    corpus.make("cc", "00000", ("caption", "rank"))
    quarantine(corpus, "00001", "disk full")
    corpus.manifest.compact()
    before = contents(corpus.manifest)
    assert {row["state"] for row in before["shards"]} == {"committed", "retired", "quarantined"}
    rebuilt = corpus.manifest.rebuild()
    assert rebuilt["shards"] == len(before["shards"])
    assert len(part_files(corpus)) == 1
    assert contents(Manifest(Storage(root))) == before


def test_only_committed_data_is_visible(root: str) -> None:
    corpus = make_corpus(root, stages=("crawl", "caption", "rank"))
    corpus.manifest.compact()
    scores = corpus.records.read("rank", "cc", "00000").outputs["parquet"]
    orphan = f"scores/cc/00000.{'0' * 12}.parquet"
    corpus.storage.write(orphan, corpus.storage.read(scores.path))
    assert count(corpus, "candidates") == 18 * (NUM_CAPTIONS + 1)
    if corpus.storage.is_local:
        with duckdb.connect(f"{root}/{CATALOG}", read_only=True) as plain:
            assert plain.execute("SELECT count(*) FROM candidates").fetchone()[0] == 18 * (NUM_CAPTIONS + 1)


def test_captions_show_until_their_shard_is_ranked(local_root: str) -> None:
    corpus = make_corpus(local_root, stages=("crawl", "caption"))
    answer = corpus.manifest.query("SELECT count(*), count(score) FROM candidates").rows
    assert answer == [(18 * NUM_CAPTIONS, 0)]
    corpus.make("cc", "00001", ("rank",))
    corpus.manifest.compact()
    answer = "SELECT shard, count(*), count(score) FROM candidates GROUP BY shard ORDER BY shard"
    expected = [("00000", 27, 0), ("00001", 36, 36)]
    assert corpus.manifest.query(answer).rows == expected
    if corpus.storage.is_local:
        with duckdb.connect(f"{local_root}/{CATALOG}", read_only=True) as plain:
            assert plain.execute(answer).fetchall() == expected


def test_the_latest_retry_stands_for_a_sample(root: str) -> None:
    corpus = make_corpus(root, shards=1, stages=("crawl",))
    corpus.manifest.compact()
    (uid,) = corpus.add_retry("cc", of="00000", shard="00001", batch=1)
    corpus.manifest.compact()
    ask = f"SELECT status, shard, retry_of FROM samples WHERE uid = '{uid}'"
    assert corpus.manifest.query(ask).rows == [("failed", "00000", None)]
    corpus.make("cc", "00001", ("crawl",))
    corpus.manifest.compact()
    assert corpus.manifest.query(ask).rows == [("ok", "00001", "00000")]
    assert count(corpus, "samples") == 12
    if corpus.storage.is_local:
        with duckdb.connect(f"{root}/{CATALOG}", read_only=True) as plain:
            assert plain.execute(ask).fetchall() == [("ok", "00001", "00000")]
            assert plain.execute("SELECT count(*), count(DISTINCT uid) FROM samples").fetchone() == (12, 12)


def test_shard_numbers_are_compared_as_numbers(tmp_path: Path) -> None:
    corpus = Corpus(str(tmp_path / "corpus"))
    corpus.add_urls("cc", ["99999"], images=12)
    corpus.make("cc", "99999", ("crawl",))
    (uid,) = corpus.add_retry("cc", of="99999", shard="100000", batch=1)
    corpus.make("cc", "100000", ("crawl",))
    corpus.manifest.compact()
    ask = f"SELECT status, shard FROM samples WHERE uid = '{uid}'"
    assert corpus.manifest.query(ask).rows == [("ok", "100000")]
    with duckdb.connect(f"{corpus.root}/{CATALOG}", read_only=True) as plain:
        assert plain.execute(ask).fetchall() == [("ok", "100000")]
    [found] = trace(corpus.manifest, uid)
    assert found["shard"] == "100000" and len(found["fetches"]) == 2


def test_questions_open_what_they_name_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"))
    corpus.manifest.compact()
    opened: list[str] = []
    add = Query._add_files
    monkeypatch.setattr(
        Query, "_add_files", lambda self, name, *rest: opened.append(name) or add(self, name, *rest)
    )
    asked = {
        "SELECT stage, state, count(*) FROM shards GROUP BY ALL": set(),
        "FROM shards": set(),
        "FROM outcomes": set(),
        "SELECT * FROM histogram_of('kept_score')": set(),
        "SELECT status, count(*) FROM Samples GROUP BY ALL": {"raw_data", "retries_data"},
        "SELECT max(score) FROM candidates": {"captions_data", "matches_data", "scores_data"},
        'SELECT count(*) FROM "dropped"': {"curated_data"},
    }
    for sql, names in asked.items():
        opened.clear()
        assert corpus.manifest.query(sql).rows
        assert set(opened) == names, sql
    whole = pa.concat_tables(map(pq.read_table, Path(corpus.root).glob("manifest/shards/*.parquet")))
    texts = sorted(text for text in whole["histograms"].to_pylist() if text)
    for sql in (
        "SELECT histograms FROM shards",
        "SELECT s.histograms FROM shards s",
        "SELECT COLUMNS('hist.*') FROM shards",
    ):
        assert sorted(text for (text,) in corpus.manifest.query(sql).rows if text) == texts, sql


def test_a_quarantine_vanishes_once_its_shard_is_committed(local_root: str) -> None:
    corpus = make_corpus(local_root, shards=1, stages=("crawl", "caption"))
    for error in ("first", "second"):
        quarantine(corpus, "00000", error)
        corpus.manifest.compact()
        time.sleep(0.02)
    ask = "SELECT state, error FROM shards WHERE stage = 'rank'"
    assert corpus.manifest.query(ask).rows == [("quarantined", "second")]
    corpus.make("cc", "00000", ("rank",))
    assert corpus.manifest.query(ask).rows == [("committed", None)]
    corpus.records.retire(corpus.records.read("rank", "cc", "00000"))
    assert corpus.manifest.query(ask).rows == [("retired", None)]
    quarantine(corpus, "00000", "third")
    assert sorted(corpus.manifest.query(ask).rows, key=str) == [("quarantined", "third"), ("retired", None)]


def keep_retired_copy(corpus: Corpus, record: ShardRecord) -> str:
    """Do the first half of ``Records.retire``, after which its process is killed."""
    path = f"records/retired/{record.stage}/{record.source}/{record.shard}.{record.attempt}.json"
    assert corpus.storage.create(path, record.to_json().encode())
    return path


def states(corpus: Corpus, stage: str) -> list[tuple[str, str]]:
    with corpus.manifest.open() as query:
        rows = query.rows(f"SELECT attempt, state FROM shards WHERE stage = '{stage}' ORDER BY finished_at")
    return [(row["attempt"], row["state"]) for row in rows]


def test_a_record_that_was_not_retired_after_all_stands(root: str) -> None:
    corpus = make_corpus(root, shards=1)
    corpus.manifest.compact()
    first = corpus.records.read("crawl", "cc", "00000")
    keep_retired_copy(corpus, first)
    for _ in range(2):
        assert states(corpus, "crawl") == [(first.attempt, "committed")]
        assert count(corpus, "samples") == 12
        assert corpus.manifest.compact() == 0
    corpus.records.retire(first)
    assert states(corpus, "crawl") == [(first.attempt, "retired")]
    (second,) = corpus.make("cc", "00000", ("crawl",))
    corpus.manifest.compact()
    assert states(corpus, "crawl") == [(first.attempt, "retired"), (second.attempt, "committed")]


def test_rebuild_restores_a_wrongly_retired_shard(local_root: str) -> None:
    corpus = make_corpus(local_root, shards=1)
    corpus.manifest = Manifest(corpus.storage, CompactedRecords(corpus.storage, merge_at=2))
    crawl = corpus.records.read("crawl", "cc", "00000")
    path = keep_retired_copy(corpus, crawl)
    corpus.storage.delete("records/crawl/cc/00000.json")
    corpus.manifest.compact()
    for shard in ("00007", "00008", "00009"):
        quarantine(corpus, shard, "boom")
        corpus.manifest.compact()  # the last one merges: what the merged part replaces must not come back
    assert states(corpus, "crawl") == [(crawl.attempt, "retired")]
    assert count(corpus, "samples") == 0
    assert len(part_files(corpus)) == 5
    corpus.storage.create("records/crawl/cc/00000.json", corpus.storage.read(path))
    corpus.manifest.rebuild()
    assert states(corpus, "crawl") == [(crawl.attempt, "committed")]
    assert count(corpus, "samples") == 12
    assert len(part_files(corpus)) == 1


def test_a_shard_is_never_seen_twice(local_root: str) -> None:
    corpus = make_corpus(local_root, shards=1)
    corpus.manifest.compact()
    first = corpus.records.read("crawl", "cc", "00000")
    corpus.records.retire(first)
    (second,) = corpus.make("cc", "00000", ("crawl",))
    # As a listing has it that passed records/retired before, and records/crawl after.
    corpus.storage.delete(f"records/retired/crawl/cc/00000.{first.attempt}.json")
    for _ in range(2):
        assert states(corpus, "crawl") == [(first.attempt, "retired"), (second.attempt, "committed")]
        assert count(corpus, "samples") == 12
        corpus.manifest.compact()


def test_compaction_reads_only_what_is_new(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(root, stages=("crawl",))
    assert corpus.manifest.compact() > 0
    read: list[str] = []
    original = Storage.read

    def noted(self: Storage, path: str, *bound: int) -> bytes:
        read.append(path)
        return original(self, path, *bound)

    monkeypatch.setattr(Storage, "read", noted)
    assert corpus.manifest.compact() == 0
    assert not [path for path in read if path.startswith("records/")]
    corpus.make("cc", "00000", ("caption",))
    read.clear()
    assert corpus.manifest.compact() == 1
    assert [path for path in read if path.startswith("records/")] == ["records/caption/cc/00000.json"]
    assert len(part_files(corpus)) == 2


def test_small_parts_are_merged_and_the_old_ones_stay_a_while(local_root: str) -> None:
    def compact(**options: timedelta) -> int:
        storage = Storage(local_root)
        return Manifest(storage, CompactedRecords(storage, merge_at=3, **options)).compact()

    corpus = make_corpus(local_root, stages=())
    for shard, stage in (("00000", "crawl"), ("00001", "crawl"), ("00000", "caption"), ("00001", "caption")):
        corpus.make("cc", shard, (stage,))
        compact()
    expected = contents(corpus.manifest)
    before = part_files(corpus)
    assert len(before) == 5  # one merged part beside the three that it replaces, and one since
    # A reader who listed the old parts a moment ago still finds them; later they go.
    compact(grace=timedelta(seconds=-1))
    assert len(part_files(corpus)) == 2
    assert contents(Manifest(Storage(local_root))) == expected
    assert compact() == 0


def test_a_row_is_rewritten_few_times(local_root: str) -> None:
    compactions, rows_each = 300, 10
    corpus = Corpus(local_root)
    batch = IntakeRecord(
        source="cc", batch=0, kind="lists", run_id=RUN, attempt="a", signature="s", shards={},
        rows_in=0, rows_new=0, rows_duplicate=0, rows_known=0, finished_at=utc_now(),
    )  # fmt: skip
    compacted = CompactedRecords(corpus.storage)
    for number in range(compactions):
        names = [f"{number * rows_each + index:05d}" for index in range(rows_each)]
        shards = {
            name: OutputFile(path=f"urls/cc/{name}.a.parquet", bytes=1, sha256="0", rows=1) for name in names
        }
        assert corpus.records.commit_intake(replace(batch, batch=number, shards=shards))
        assert compacted.compact() == rows_each
    # Nothing was deleted yet: a part that was merged names those it replaces.
    parts = {path: pq.read_table(path) for path in Path(local_root).glob("manifest/shards/*.parquet")}
    replaced = {path: json.loads(part.schema.metadata[b"replaces"]) for path, part in parts.items()}
    written, merged = (
        sum(part.num_rows for path, part in parts.items() if bool(replaced[path]) is is_merged)
        for is_merged in (False, True)
    )
    assert written == compactions * rows_each
    assert merged <= 2 * compactions * rows_each
    assert len(parts) - len({name for names in replaced.values() for name in names}) <= 3 * 8
    assert compacted.tables().events().num_rows == compactions * rows_each


class OneAtATime(Storage):
    """Storage whose listings of records and parts take a moment, and note whether another such one was under way.

    The index of uids is listed beside them: it has files of its own, and those who ask do not wait for it.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.inside, self.was_alone = threading.Semaphore(1), []

    def list(self, prefix: str) -> list[FileInfo]:
        if prefix not in ("records", "checkpoints", *(f"manifest/{table}" for table in RECORD_TABLES)):
            return super().list(prefix)
        alone = self.inside.acquire(blocking=False)
        self.was_alone.append(alone)
        time.sleep(0.01)
        try:
            return super().list(prefix)
        finally:
            if alone:
                self.inside.release()


def test_threads_take_turns(local_root: str) -> None:
    corpus = make_corpus(local_root, shards=1)
    storage = OneAtATime(local_root)
    manifest = Manifest(storage)
    asked = (manifest.compact, manifest.rebuild, manifest.compacted.tables)
    with ThreadPoolExecutor(6) as threads:
        for answer in [threads.submit(ask) for ask in asked * 2]:
            answer.result()
    assert storage.was_alone and all(storage.was_alone)
    assert count(corpus, "shards") == 5


class Overtaken(Storage):
    """Storage on which another process compacts after the parts were listed, and before the records are."""

    def list(self, prefix: str) -> list[FileInfo]:
        if prefix == "records":
            Manifest(Storage(self.root)).compact()
        return super().list(prefix)


def test_two_compactions_at_once_double_nothing(local_root: str) -> None:
    corpus = make_corpus(local_root)

    def sums() -> list[dict]:
        with corpus.manifest.open() as query:
            return query.histogram_sums()

    before = sums()
    assert before
    assert Manifest(Overtaken(local_root)).compact() >= 10
    assert sums() == before
    assert len(part_files(corpus)) == 2
    assert count(corpus, "shards") == 10
    assert count(corpus, "samples") == 24


def test_older_duckdb_shells_answer_from_the_catalog(tmp_path: Path) -> None:
    """The shell of 1.5, as a distribution packages it: every table, view and macro, and the comments."""
    corpus = make_corpus(str(tmp_path / "corpus"))
    corpus.manifest.compact()
    asked = {
        **{name: f"SELECT count(*) AS n FROM {name}" for name in (*TABLES, *VIEWS)},
        "histogram_of": "SELECT count(*) AS n FROM histogram_of('kept_score')",
        "sample": "SELECT count(*) AS n FROM sample('http://host0.example/00000/0.jpg')",
        "url_host": "SELECT count(*) AS n FROM samples WHERE url_host(url) = 'host0.example'",
        "comments": "SELECT count(*) AS n FROM duckdb_columns() WHERE comment IS NOT NULL",
    }
    assert len(asked) == len(TABLES) + len(VIEWS) + len(FUNCTIONS) + len(TABLE_MACROS) + 1
    for what, sql in asked.items():
        done = subprocess.run(
            [sys.executable, "-m", "duckdb_cli", "-readonly", "-json", f"{corpus.root}/{CATALOG}", "-c", sql],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, (what, done.stderr)
        assert json.loads(done.stdout)[0]["n"] == corpus.manifest.query(sql).rows[0][0], what
    version = subprocess.run(
        [sys.executable, "-m", "duckdb_cli", "--version"], capture_output=True, text=True
    )
    assert version.stdout.startswith("v1.5."), "a shell of the series before the library's"


def test_rows_are_taken_out_through_a_database_of_ones_own(tmp_path: Path) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"))
    corpus.manifest.compact()
    with duckdb.connect() as own:
        own.execute(f"ATTACH '{corpus.root}/{CATALOG}' AS corpus (READ_ONLY)")
        own.execute(f"COPY (SELECT uid, url, captions FROM corpus.curated) TO '{tmp_path}/captions.parquet'")
        assert own.execute(f"SELECT count(*) FROM '{tmp_path}/captions.parquet'").fetchone()[0] > 0
        for name in (*TABLES, *VIEWS):
            own.execute(f"SELECT count(*) FROM corpus.{name}")
        own.execute("USE corpus")
        assert own.execute("SELECT count(*) FROM histogram_of('kept_score')").fetchone()[0] > 0


def test_a_moved_corpus_gets_a_new_catalog(tmp_path: Path) -> None:
    make_corpus(str(tmp_path / "old")).manifest.compact()
    (tmp_path / "old").rename(tmp_path / "new")
    Manifest(Storage(str(tmp_path / "new"))).compact()
    with duckdb.connect(str(tmp_path / "new" / CATALOG), read_only=True) as plain:
        assert plain.execute("SELECT count(*) FROM samples").fetchone() == (24,)


def _plainly(root: Path, sql: str = "SELECT count(*) FROM samples") -> int:
    with duckdb.connect(str(root / CATALOG), read_only=True) as plain:
        return plain.execute(sql).fetchone()[0]


# A quote, a glob's letters and a blank: the place is read back out of SQL.
@pytest.mark.parametrize("name", ["old", "it's [a] *corpus?"])
def test_a_copied_corpus_answers_for_itself_once_it_is_read(tmp_path: Path, name: str) -> None:
    old, new = tmp_path / name, tmp_path / "new"
    make_corpus(str(old)).manifest.compact()
    shutil.copytree(old, new)
    shutil.rmtree(old / "raw")
    manifest = Manifest(Storage(str(new)))
    assert manifest.rewrite_copied_catalog() is None
    assert _plainly(new) == 24
    # What is in its place is left alone, under another name too.
    before = (new / CATALOG).stat().st_mtime_ns
    (tmp_path / "link").symlink_to(new)
    for place in (new, tmp_path / "link"):
        assert Manifest(Storage(str(place))).rewrite_copied_catalog() is None
    assert (new / CATALOG).stat().st_mtime_ns == before


def test_a_copied_catalog_that_cannot_be_rewritten_is_told(tmp_path: Path) -> None:
    make_corpus(str(tmp_path / "old")).manifest.compact()
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    # What stands in the way of a file, for root too.
    (tmp_path / "new" / CATALOG).unlink()
    (tmp_path / "new" / CATALOG / "x").mkdir(parents=True)
    told = Manifest(Storage(str(tmp_path / "new"))).rewrite_copied_catalog()
    assert f"answers from {tmp_path / 'old'}" in told and "capfilt manifest compact" in told


def test_a_corpus_copied_from_s3_answers_for_itself(s3_root: str, tmp_path: Path) -> None:
    corpus = make_corpus(s3_root)
    corpus.manifest.compact()
    for info in corpus.storage.list(""):
        Storage(str(tmp_path / "mirror")).write(info.path, corpus.storage.read(info.path))
    assert Manifest(Storage(str(tmp_path / "mirror"))).rewrite_copied_catalog() is None
    assert _plainly(tmp_path / "mirror") == 24


_SEEN = "SELECT count(*), count(DISTINCT uid) FROM samples"


def _query_plainly(root: str, asked, stop, answers) -> None:
    seen = []
    while not stop.is_set():
        with duckdb.connect(f"{root}/{CATALOG}", read_only=True) as plain:
            seen.append(plain.execute(_SEEN).fetchone())
            plain.execute("SELECT avg(score) FROM candidates").fetchone()
        asked.value += 1
    answers.put(seen)


def _query_sandboxed(root: str, asked, stop, answers) -> None:
    manifest, seen = Manifest(Storage(root)), []
    while not stop.is_set():
        seen.append(manifest.query(_SEEN).rows[0])
        asked.value += 1
    answers.put(seen)


def test_two_processes_query_while_a_run_writes(local_root: str) -> None:
    corpus = Corpus(local_root)
    corpus.manifest = Manifest(corpus.storage, CompactedRecords(corpus.storage, merge_at=4))
    names = [f"{number:05d}" for number in range(400)]
    corpus.add_urls("cc", names, 12)
    corpus.manifest.compact()
    context = multiprocessing.get_context("spawn")
    stop, answers = context.Event(), context.Queue()
    asked = [context.Value("i", 0) for _ in range(2)]
    readers = [
        context.Process(target=target, args=(local_root, count, stop, answers))
        for target, count in zip((_query_plainly, _query_sandboxed), asked, strict=True)
    ]
    for reader in readers:
        reader.start()
    committed = 0
    while min(count.value for count in asked) < 5 and committed < len(names):
        assert all(reader.is_alive() for reader in readers)
        corpus.make("cc", names[committed], ("crawl", "caption"))
        committed += 1
        corpus.manifest.compact()
    stop.set()
    results = [answers.get(timeout=60) for _ in readers]
    for reader in readers:
        reader.join(30)
        assert reader.exitcode == 0
    for seen in results:
        assert len(seen) >= 5
        assert all(rows == distinct and rows % 12 == 0 for rows, distinct in seen)
        assert seen == sorted(seen)
        assert seen[-1][0] > 0
    assert corpus.manifest.query("SELECT count(*) FROM samples").rows == [(12 * committed,)]


def test_records_of_other_kinds_become_rows(local_root: str) -> None:
    corpus = make_corpus(local_root, shards=1)
    record = corpus.records.read("rank", "cc", "00000")
    assert isinstance(record, ShardRecord)
    (row,) = corpus.manifest.query("SELECT * FROM shards WHERE stage = 'rank'").dicts()
    assert row["paths"] == {"parquet": record.outputs["parquet"].path}
    assert row["sha256"] == {"parquet": record.outputs["parquet"].sha256}
    assert (row["rows_in"], row["bytes"]) == (record.rows_in, record.outputs["parquet"].bytes)
    assert row["finished_at"].isoformat(timespec="microseconds") == record.finished_at
    assert row["counts"] == record.counts
    (urls,) = corpus.manifest.query("SELECT counts, rows_out FROM shards WHERE stage = 'urls'").dicts()
    assert urls == {"counts": {"lists": 12}, "rows_out": 12}


# -- records from parts ------------------------------------------------------------------------------------------------


def test_many_committed_records_come_from_the_parts(s3_root: str, s3_server: S3Server) -> None:
    corpus = make_corpus(s3_root, shards=20, images=4)
    corpus.manifest.compact()
    one_by_one = CorpusState(corpus.records)
    s3_server.requests.clear()
    state = CorpusState(corpus.records, compacted=Manifest(corpus.storage).compacted.shard_records)
    read = [request.key for request in s3_server.requests if request.kind == "GET"]
    assert not [key for key in read if "records/crawl" in key]
    assert len(s3_server.requests) < 40 < len(state.committed)
    assert state.committed == one_by_one.committed
    # What is newer than its part is read: here another version of one record, and a record of no part.
    (path,) = [info.path for info in corpus.storage.list("records/rank/cc") if "00003" in info.path]
    corpus.storage.write(path, corpus.storage.read(path).replace(b'"images":', b'"images":1'))
    corpus.add_urls("new", ["00000"], 4)
    corpus.make("new", "00000", ("crawl",))
    state = CorpusState(corpus.records, compacted=Manifest(corpus.storage).compacted.shard_records)
    assert state.committed["crawl", "new", "00000"].rows_in == 4
    assert one_by_one.committed["rank", "cc", "00003"].images == 1
    assert state.committed["rank", "cc", "00003"].images == 11


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("shard", "00007", "is not a file of this shard"),
        ("stage", "nosuch", "stage: "),
        ("started_at", None, "started_at: a value is NULL"),
        ("paths", [("tar", "../../etc/passwd"), ("parquet", "/etc/passwd")], "is not a file of this shard"),
        ("files", "[]", "items"),
        ("files", "[" * 100_000, "recursion"),
        ("rows_in", -1, "rows_in: "),
    ],
)
def test_a_part_that_contradicts_its_records_is_named(
    local_root: str, column: str, value: object, reason: str
) -> None:
    corpus = make_corpus(local_root, shards=1, images=4)
    corpus.manifest.compact()
    (part,) = corpus.storage.list("manifest/shards")
    path = Path(corpus.storage.url(part.path))
    table = pq.read_table(path)
    rows = [
        row | ({column: value} if row["record"] == "records/crawl/cc/00000.json" else {})
        for row in table.to_pylist()
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    with pytest.raises(CorruptShardError, match=rf"{part.path} is not a part .*{reason}.*manifest rebuild"):
        Manifest(corpus.storage).compacted.shard_records(corpus.records.list_shards())


def test_a_part_that_gives_a_record_another_shards_row_is_named(local_root: str) -> None:
    corpus = make_corpus(local_root, shards=1, images=4)
    corpus.manifest.compact()
    (part,) = corpus.storage.list("manifest/shards")
    path = Path(corpus.storage.url(part.path))
    table = pq.read_table(path)
    rows = {row["record"]: row for row in table.to_pylist()}
    crawl, rank = rows["records/crawl/cc/00000.json"], rows["records/rank/cc/00000.json"]
    crawl |= rank | {name: crawl[name] for name in ("record", "version")}
    pq.write_table(pa.Table.from_pylist(list(rows.values()), schema=table.schema), path)
    with pytest.raises(CorruptShardError, match="its row of records/crawl/cc/00000.json is of another shard"):
        Manifest(corpus.storage).compacted.shard_records(corpus.records.list_shards())


def test_a_part_that_may_not_be_read_is_not_damaged(
    s3_root: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make_corpus(s3_root, shards=1, images=4)
    corpus.manifest.compact()
    monkeypatch.setattr(
        s3_server, "refuse", lambda request: "403 Forbidden" if ".parquet" in request.key else None
    )
    with pytest.raises(ObjectStorageError, match="refused s3://.*manifest/"):
        Manifest(corpus.storage).compacted.tables()


def test_parts_of_an_earlier_version_are_read_and_their_records_too(local_root: str) -> None:
    corpus = make_corpus(local_root, shards=20, images=4)
    corpus.manifest.compact()
    expected = CorpusState(corpus.records).committed
    answer = corpus.manifest.query("SELECT * FROM shards ORDER BY ALL").rows
    for info in corpus.storage.list("manifest/shards"):
        path = Path(corpus.storage.url(info.path))
        pq.write_table(pq.read_table(path).drop_columns("files"), path)
    manifest = Manifest(Storage(local_root))
    assert manifest.compacted.shard_records(corpus.records.list_shards()) == {}
    assert CorpusState(corpus.records, compacted=manifest.compacted.shard_records).committed == expected
    assert manifest.query("SELECT * FROM shards ORDER BY ALL").rows == answer
    corpus.add_urls("new", ["00000"], 4)
    corpus.make("new", "00000", ("crawl",))
    manifest.compact()
    with duckdb.connect(corpus.storage.url(CATALOG), read_only=True) as plain:
        assert plain.execute("SELECT count(*) FROM shards").fetchone() == (len(answer) + 2,)
    assert list(manifest.compacted.shard_records(corpus.records.list_shards())) == [
        "records/crawl/new/00000.json"
    ]
    manifest.rebuild()
    assert len(manifest.compacted.shard_records(corpus.records.list_shards())) == len(expected) + 1


def test_parts_with_a_column_more_and_fewer_give_the_same_answers(local_root: str) -> None:
    corpus = make_corpus(local_root, shards=20, images=4)
    corpus.manifest.compact()
    ask = "SELECT * EXCLUDE (device) FROM shards ORDER BY ALL"
    answer, sums = corpus.manifest.query(ask).rows, status.stats(corpus.manifest)["histograms"]
    expected = CorpusState(corpus.records).committed
    assert len(sums) > 1
    for info in corpus.storage.list("manifest/shards"):
        path = Path(corpus.storage.url(info.path))
        rows = pq.read_table(path).drop_columns(["device", HISTOGRAM_BINS, HISTOGRAM_COUNTS])
        pq.write_table(rows.append_column("tomorrow", pa.array([1] * len(rows))), path)
    manifest = Manifest(Storage(local_root))
    assert manifest.query(ask).rows == answer
    assert status.stats(manifest)["histograms"] == sums
    assert manifest.query("SELECT count(device) FROM shards").rows == [(0,)]
    assert CorpusState(corpus.records, compacted=manifest.compacted.shard_records).committed == expected
    manifest.compact()
    with duckdb.connect(corpus.storage.url(CATALOG), read_only=True) as plain:
        assert plain.execute(ask).fetchall() == answer
    assert manifest.compact() == 0 and len(part_files(corpus)) == 2


ASKED = (
    "SELECT count(*), max(url) FROM samples",
    "SELECT count(*), max(text) FROM candidates",
    "FROM curated ORDER BY ALL",
)


def answers_of_own_duckdb(corpus: Corpus, *before: str) -> list[list[tuple]]:
    with duckdb.connect(corpus.storage.url(CATALOG), read_only=True) as plain:
        for statement in before:
            plain.execute(statement)
        return [plain.execute(sql).fetchall() for sql in ASKED]


@pytest.mark.parametrize("folder", ["raw", "captions", "scores", "curated"])
def test_an_empty_file_in_a_data_folder_changes_no_answer(tmp_path: Path, folder: str) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"))
    corpus.manifest.compact()
    answers = [corpus.manifest.query(sql).rows for sql in ASKED]
    for name in ("00000.0123456789ab", "99999", "a", "00000.tar"):
        corpus.storage.write(f"{folder}/cc/{name}.parquet", b"")
    manifest = Manifest(Storage(corpus.root))
    assert [manifest.query(sql).rows for sql in ASKED] == answers
    with manifest.open(in_place=True) as query:
        assert [[tuple(row.values()) for row in query.rows(sql)] for sql in ASKED] == answers
    assert answers_of_own_duckdb(corpus) == answers
    assert manifest.compact() == 0
    assert verify(manifest, quick=True).differences == []


def test_empty_files_among_very_many_change_no_answer_either(tmp_path: Path) -> None:
    """Of more than 50 committed files DuckDB no longer looks for each name."""
    corpus = make_corpus(str(tmp_path / "corpus[1]"), shards=60, images=2)
    corpus.manifest.compact()
    answers = [corpus.manifest.query(sql).rows for sql in ASKED]
    assert answers_of_own_duckdb(corpus) == answers
    for folder in ("raw", "captions", "scores", "curated"):
        for name in ("00000.0123456789ab", "00030.0123456789ab", "99999", "a"):
            corpus.storage.write(f"{folder}/cc/{name}.parquet", b"")
    assert answers_of_own_duckdb(corpus) == answers
    # Where DuckDB opens all that it finds: before 2.0, and for files of several formats.
    opening_all = "SET disabled_optimizers = 'join_filter_pushdown'"
    with pytest.raises(duckdb.Error, match=r"too small to be a Parquet"):
        answers_of_own_duckdb(corpus, opening_all)
    named = "SET VARIABLE capfilt_files = committed_files()"
    assert answers_of_own_duckdb(corpus, opening_all, named) == answers
    with duckdb.connect() as own:
        for statement in (
            f"ATTACH '{corpus.storage.url(CATALOG)}' AS corpus (READ_ONLY)",
            "USE corpus",
            opening_all,
            named,
        ):
            own.execute(statement)
        assert [own.execute(sql).fetchall() for sql in ASKED] == answers
    remove(corpus.records, find_orphans(corpus.records, older_than=timedelta(seconds=-60)))
    assert answers_of_own_duckdb(corpus, opening_all) == answers
