"""A disk that is full, or fails, while a real process writes a corpus: nothing is lost, torn or charged to a shard."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.corpus.records import Records
from pipeline.storage.storage import Storage
from tests.corpora import Corpus
from tests.processes import ROOT, cli_here
from tests.runners import select_shards
from tests.runs import config_file, curated_files

SHARDS = ["00000", "00001"]
BEFORE = ("crawl", "caption", "rank")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The C library that fails in the place of the disk."""
    built = tmp_path_factory.mktemp("library") / "faulty_disk.so"
    source = Path(__file__).with_name("faulty_disk.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", built, source, "-ldl"], check=True)
    return str(built)


def unselected(root: Path) -> Corpus:
    """Return a corpus whose selection is to be done."""
    corpus = Corpus(str(root))
    corpus.add_urls("cc", SHARDS, images=12)
    for shard in SHARDS:
        corpus.make("cc", shard, BEFORE)
    return corpus


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    corpus = unselected(tmp_path_factory.mktemp("expected") / "corpus")
    assert select_shards(corpus).states == ["done"] * len(SHARDS)
    return curated_files(corpus.root)


def select(corpus: Corpus, folder: Path, library: str, **faults: str) -> subprocess.CompletedProcess:
    """Select in a process whose disk fails."""
    config = str(config_file(corpus.config, folder / "c.json"))
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", "select", "--local", "-c", config],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": library, "FAULTY_FOLDER": f"{corpus.root}/curated", **faults},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("call", "number"),
    [("write", errno.ENOSPC), ("write", errno.EIO), ("close", errno.EIO), ("fsync", errno.EDQUOT)],
    ids=lambda value: errno.errorcode.get(value, value) if isinstance(value, int) else value,
)
def test_a_disk_that_fails_for_a_while_is_waited_for(
    tmp_path: Path, library: str, expected: dict[str, str], call: str, number: int
) -> None:
    corpus = unselected(tmp_path / "corpus")
    done = select(
        corpus,
        tmp_path,
        library,
        FAULTY_CALL=call,
        FAULTY_ERRNO=str(number),
        FAULTY_TIMES="2",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Waiting for it") == done.stderr.count("answers again") == 1, done.stderr
    assert curated_files(corpus.root) == expected
    records = Records(Storage(corpus.root))
    assert records.quarantined() == {} and records.storage.list("records/attempts") == []
    written = {info.path for info in records.storage.list("curated/cc")}
    assert written == set(expected), "no torn file stays"


def test_a_disk_that_stays_full_ends_the_run_and_damages_nothing(
    tmp_path: Path, library: str, expected: dict[str, str]
) -> None:
    corpus = unselected(tmp_path / "corpus")
    corpus.config = corpus.config.model_copy(
        update={"cluster": corpus.config.cluster.model_copy(update={"storage_patience_s": 1.0})}
    )
    full = {"FAULTY_CALL": "write", "FAULTY_ERRNO": str(errno.ENOSPC), "FAULTY_TIMES": "1000000"}
    ended = select(corpus, tmp_path, library, **full)
    assert ended.returncode == 4, ended.stderr
    assert "make room. Waited for" in ended.stderr and "Traceback" not in ended.stderr
    records = Records(Storage(corpus.root))
    assert records.shards(("select",)) == {} and records.quarantined() == {}
    assert records.storage.list("curated/cc") == []
    assert cli_here("verify", corpus.root).returncode == 0
    again = cli_here("select", "--local", "-c", str(tmp_path / "c.json"))
    assert again.returncode == 0, again.stderr
    assert curated_files(corpus.root) == expected
