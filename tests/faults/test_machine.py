"""A disk that is full or fails, a clock that is off: real processes lose nothing, and no shard is charged with it."""

import errno
import os
import shutil
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
# Where a selection's records are written, as the last of a shard.
COMMITS = "corpus/records/select"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The C library that stands between a process and its machine."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    built = tmp_path_factory.mktemp("library") / "faulty_machine.so"
    source = Path(__file__).with_name("faulty_machine.c")
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


def select(corpus: Corpus, tmp_path: Path, library: str, **faults: object) -> subprocess.CompletedProcess:
    """Select in a process on a faulty machine."""
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    config = str(config_file(corpus.config, tmp_path / "c.json"))
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", "select", "--local", "-c", config],
        cwd=ROOT,
        env={
            **os.environ,
            "TMPDIR": str(scratch),
            "LD_PRELOAD": library,
            **{f"FAULTY_{name.upper()}": str(value) for name, value in faults.items()},
        },
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("call", "number", "faulty"),
    [
        ("write", errno.ENOSPC, "scratch/capfilt-"),
        ("write", errno.ENOSPC, COMMITS),
        ("close", errno.EIO, COMMITS),
        ("fsync", errno.EDQUOT, COMMITS),
    ],
    ids=["write-full-scratch", "write-full", "close-fails", "sync-quota"],
)
def test_a_disk_that_fails_for_a_while_is_waited_for(
    tmp_path: Path, library: str, expected: dict[str, str], call: str, number: int, faulty: str
) -> None:
    corpus = unselected(tmp_path / "corpus")
    done = select(corpus, tmp_path, library, call=call, errno=number, times=2, folder=tmp_path / faulty)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Waiting for it") == done.stderr.count("answers again") == 1, done.stderr
    assert curated_files(corpus.root) == expected
    records = Records(Storage(corpus.root))
    assert records.quarantined() == {} and records.storage.list("records/attempts") == []
    written = {info.path for info in records.storage.list("curated/cc")}
    assert written == set(expected), "no torn file stays"
    assert cli_here("verify", corpus.root).returncode == 0


def test_a_disk_that_stays_full_ends_the_run_and_damages_nothing(
    tmp_path: Path, library: str, expected: dict[str, str]
) -> None:
    corpus = unselected(tmp_path / "corpus")
    corpus.config = corpus.config.model_copy(
        update={"cluster": corpus.config.cluster.model_copy(update={"storage_patience_s": 1.0})}
    )
    ended = select(
        corpus,
        tmp_path,
        library,
        call="write",
        errno=errno.ENOSPC,
        times=1_000_000,
        folder=tmp_path / COMMITS,
    )
    assert ended.returncode == 4, ended.stderr
    assert "make room. Waited for" in ended.stderr and "Traceback" not in ended.stderr
    records = Records(Storage(corpus.root))
    assert records.shards(("select",)) == {} and records.quarantined() == {}
    assert cli_here("verify", corpus.root).returncode == 0
    again = cli_here("select", "--local", "-c", str(tmp_path / "c.json"))
    assert again.returncode == 0, again.stderr
    assert curated_files(corpus.root) == expected


def test_clocks_that_are_an_hour_off_change_nothing(
    tmp_path: Path, library: str, expected: dict[str, str]
) -> None:
    corpus = unselected(tmp_path / "corpus")
    killed = corpus.records.attempts("select", "cc", SHARDS[0], "20200101T000000-killed").begin(
        is_retry=False
    )
    assert killed == 1
    for clock_s in (-3600, 3600):
        done = select(corpus, tmp_path, library, clock_s=clock_s)
        assert done.returncode == 0, done.stderr
        assert curated_files(corpus.root) == expected
        # A second run, and a look by those whose clock is right, find all of it done.
        again = cli_here("select", "--local", "-c", str(tmp_path / "c.json"))
        assert again.returncode == 0 and "2 of 2 shards done" in again.stdout + again.stderr
        collected = cli_here("gc", corpus.root)
        assert collected.returncode == 0, collected.stderr
        assert curated_files(corpus.root) == expected
        assert cli_here("verify", corpus.root).returncode == 0
        corpus = unselected(tmp_path / f"corpus{clock_s}")
