"""What a backup of a corpus must hold, and how a corpus comes back from it: docs/cluster.md says the same."""

import shutil
from pathlib import Path

import pytest

from pipeline.manifest import status
from pipeline.manifest.manifest import Manifest
from pipeline.manifest.verify.corpus import verify
from pipeline.storage.storage import Storage
from tests.corpora import Corpus, make_corpus
from tests.processes import cli_here
from tests.runners import select_shards
from tests.runs import curated_files


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    corpus = make_corpus(str(tmp_path / "corpus"))
    corpus.manifest.compact()
    return corpus


def backup_of(corpus: Corpus, folder: Path, *without: str) -> Path:
    """Copy a corpus but for some of its folders and files."""
    shutil.copytree(corpus.root, folder, ignore=shutil.ignore_patterns(*without))
    return folder


def test_the_manifest_comes_back_from_the_records(corpus: Corpus, tmp_path: Path) -> None:
    facts = status.stats(corpus.manifest)
    asked = "SELECT * FROM curated ORDER BY ALL"
    rows = corpus.manifest.query(asked).rows
    restored = backup_of(corpus, tmp_path / "restored", "manifest", "manifest.duckdb")
    assert cli_here("manifest", "rebuild", str(restored)).returncode == 0
    manifest = Manifest(Storage(str(restored)))
    assert status.stats(manifest) == facts and manifest.query(asked).rows == rows
    assert verify(manifest).differences == []


def test_curated_shards_come_back_from_what_they_were_made_of(corpus: Corpus, tmp_path: Path) -> None:
    """Without the records of the selection too, it is to do again: on CPUs, and with the same bytes."""
    curated = curated_files(corpus.root)
    restored = backup_of(corpus, tmp_path / "restored", "manifest", "manifest.duckdb", "curated", "select")
    again = Corpus(str(restored))
    assert set(select_shards(again).states) == {"done"}
    assert curated_files(str(restored)) == curated and curated
    assert cli_here("manifest", "rebuild", str(restored)).returncode == 0
    assert verify(Manifest(Storage(str(restored)))).differences == []


def test_files_that_a_backup_lacks_are_named(corpus: Corpus, tmp_path: Path) -> None:
    restored = backup_of(corpus, tmp_path / "restored", "scores")
    differences = verify(Manifest(Storage(str(restored))), quick=True).differences
    assert differences and all(
        found.what == "missing" and found.path.startswith("scores/") for found in differences
    )
    told = cli_here("verify", "--quick", str(restored))
    assert told.returncode == 1 and "delete its shard's record" in told.stdout
