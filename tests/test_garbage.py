"""OrphanFile collection: removes what nothing refers to, and nothing else, whatever its age."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from pipeline.corpus.garbage_collection import OrphanFile, find_orphans, remove
from pipeline.manifest.verify.corpus import verify
from schemas.stages import STAGE_FOLDERS
from tests.corpora import RUN, Corpus, make_corpus

_FOLDERS = set(STAGE_FOLDERS.values())
NOW = timedelta(seconds=-60)  # even what was written this second is old enough


@pytest.fixture
def local_root(tmp_path: Path) -> str:
    return str(tmp_path / "corpus")


def litter(corpus: Corpus) -> dict[str, str]:
    """Leave what killed attempts leave; return path -> kind."""
    orphan = corpus.storage.read(corpus.records.read("rank", "cc", "00000").outputs["parquet"].path)
    paths = {
        "scores/cc/00000.000000000000.parquet": "orphan",
        "raw/cc/00007.000000000000.tar": "orphan",
        "urls/cc/00009.lostbatch.parquet": "orphan",
        "raw/stray.tar": "orphan",
        "raw/cc/.00000.tar.0123.tmp": "temporary",
        "records/models/.0123.json.0123.tmp": "temporary",
        "manifest/.catalog.sql.0123.tmp": "temporary",
        f"records/attempts/crawl/cc/00007/{RUN}.000000000000": "attempt",
    }
    for path in paths:
        corpus.storage.write(path, orphan)
    return paths


def test_only_what_nothing_refers_to_goes(root: str) -> None:
    corpus = make_corpus(root)
    corpus.manifest.compact()
    before = {info.path for info in corpus.storage.list("")}
    paths = litter(corpus)
    orphan_files = find_orphans(corpus.records, older_than=NOW)
    assert {file.path: file.kind for file in orphan_files} == paths
    assert {info.path for info in corpus.storage.list("")} == before | set(paths)
    assert remove(corpus.records, orphan_files) == orphan_files
    assert {info.path for info in corpus.storage.list("")} == before
    assert verify(corpus.manifest).differences == []


def test_what_a_record_names_stays_though_a_listing_missed_the_record(root: str) -> None:
    corpus = make_corpus(root, shards=1)
    for stage in ("caption", "select"):
        corpus.records.retire(corpus.records.read(stage, "cc", "00000"))
    corpus.make("cc", "00000", ("caption",))
    paths = litter(corpus)
    data = [
        OrphanFile(path=info.path, kind="orphan", bytes=info.bytes, modified=info.modified)
        for folder in STAGE_FOLDERS.values()
        for info in corpus.storage.list(folder)
    ]
    retired = [replace(file, kind="retired") for file in data if file.path.startswith(("raw/", "captions/"))]
    (old,) = (record for record in corpus.records.retired() if record.stage == "caption")
    gone = remove(corpus.records, data)
    assert {file.path for file in gone} == {path for path in paths if path.split("/")[0] in _FOLDERS}
    left = [file for file in retired if corpus.storage.exists(file.path)]
    assert [file.path for file in remove(corpus.records, left)] == [old.outputs["parquet"].path]
    assert corpus.manifest.query("SELECT count(*) FROM candidates").rows == [(36,)]


def test_young_files_stay(local_root: str) -> None:
    corpus = make_corpus(local_root, shards=1)
    litter(corpus)
    assert find_orphans(corpus.records, older_than=timedelta(hours=24)) == []


def test_retired_files_go_only_when_asked_for(local_root: str) -> None:
    corpus = make_corpus(local_root, shards=1)
    captions = corpus.records.read("caption", "cc", "00000")
    curated = corpus.records.read("select", "cc", "00000")
    for record in (captions, curated):
        corpus.records.retire(record)
        corpus.make("cc", "00000", (record.stage,))
    assert find_orphans(corpus.records, older_than=NOW) == []
    orphan_files = find_orphans(corpus.records, older_than=NOW, retired=True)
    # The curated shard was made again under the same name: needed, though a retired record names it too.
    assert [(file.path, file.kind) for file in orphan_files] == [
        (captions.outputs["parquet"].path, "retired")
    ]
    remove(corpus.records, orphan_files)
    assert len(corpus.records.retired()) == 2
    assert corpus.manifest.query("SELECT count(*) FROM candidates").rows == [(36,)]


def test_what_a_killed_create_left_is_not_a_record(local_root: str) -> None:
    corpus = make_corpus(local_root, shards=1, stages=("crawl",))
    record = corpus.storage.read("records/crawl/cc/00000.json")
    left = "records/crawl/cc/.00001.json.0123456789ab.tmp"
    corpus.storage.write(left, record.replace(b'"shard":"00000"', b'"shard":"00001"'))
    assert [shard for _, _, shard in corpus.records.shards()] == ["00000"]
    assert [file.path for file in find_orphans(corpus.records, older_than=NOW)] == [left]


@pytest.mark.parametrize("folder", ["raw/cc/linked", "raw/linked", "scores"])
def test_files_behind_a_link_out_of_the_corpus_are_left_alone(
    tmp_path: Path, folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    # A corpus unpacked from others may hold a link to a folder of the user's, in which all looks like orphans.
    corpus = make_corpus(str(tmp_path / "corpus"), shards=1, stages=("crawl", "caption"))
    (tmp_path / "own" / "deep").mkdir(parents=True)
    own = [tmp_path / "own" / "letter.txt", tmp_path / "own" / "deep" / "00000.0123456789ab.tar"]
    for file in own:
        file.write_text("mine")
    (tmp_path / "corpus" / folder).symlink_to(tmp_path / "own")
    corpus.storage.write("raw/cc/00000.000000000000.tar", b"orphan")
    garbage = find_orphans(corpus.records, older_than=NOW, retired=True)
    assert [file.path for file in garbage] == ["raw/cc/00000.000000000000.tar"]
    assert "behind links that lead out of it, are left alone" in caplog.text
    remove(corpus.records, garbage)
    assert all(file.exists() for file in own) and (tmp_path / "corpus" / folder).is_symlink()


def test_a_corpus_that_is_itself_behind_a_link_is_cleaned(tmp_path: Path) -> None:
    make_corpus(str(tmp_path / "corpus"), shards=1)
    (tmp_path / "link").symlink_to(tmp_path / "corpus")
    records = Corpus(str(tmp_path / "link")).records
    records.storage.write("raw/cc/00000.000000000000.tar", b"orphan")
    assert [file.path for file in find_orphans(records, older_than=NOW)] == ["raw/cc/00000.000000000000.tar"]
