"""FIFOs, devices and links to them where a file is expected: named and refused, never read, never waited for."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpus.checkpoint_files import DamagedCheckpointError, SavedCheckpoints
from pipeline.corpus.records import Records
from pipeline.digests import sha256_file
from pipeline.intake.lists.files import expand
from pipeline.models.files.model_files import read_object, safetensors_header
from pipeline.regular_files import NotRegularFileError, open_regular
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError, CorruptShardError
from schemas.records import CheckpointRecord
from tests.corpora import Corpus, make_corpus
from tests.processes import cli_here

KINDS = ["FIFO", "link to a FIFO", "device"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(str(tmp_path_factory.mktemp("made") / "corpus"), shards=1, images=4)


@pytest.fixture
def corpus(made: Corpus, tmp_path: Path) -> Corpus:
    return made.copy(str(tmp_path / "corpus"))


def put_special(path: Path, kind: str) -> Path:
    """Put what is not a regular file in the place of a file."""
    path.unlink(missing_ok=True)
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "FIFO":
        os.mkfifo(path)
    else:
        os.mkfifo(path.with_name("a-fifo"))
        path.symlink_to("a-fifo")
    return path


def capfilt(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, so that one that hangs or reads without end is ended."""
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, (4 << 30,) * 2); "
    return subprocess.run(
        [sys.executable, "-c", f"{limited}from jobs.cli.main import main; main()", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("record", ["records/crawl/cc/00000.json", "records/intake/cc/00000.json"])
def test_no_record_is_read_from_a_special_file(corpus: Corpus, record: str, kind: str) -> None:
    put_special(Path(corpus.root, record), kind)
    result = capfilt("status", corpus.root)
    assert result.returncode == 2, result.stderr
    assert record in result.stderr and "not a regular file" in result.stderr
    with pytest.raises(CapfiltError, match=record):
        corpus.records.intakes() if "intake" in record else corpus.records.read("crawl", "cc", "00000")


def test_a_link_to_a_record_is_read(corpus: Corpus, tmp_path: Path) -> None:
    record = Path(corpus.root, "records/crawl/cc/00000.json")
    record.rename(tmp_path / "moved.json")
    record.symlink_to(tmp_path / "moved.json")
    assert Records(corpus.storage).read("crawl", "cc", "00000") is not None


@pytest.mark.parametrize("kind", KINDS)
def test_verify_names_what_stands_for_a_committed_file(corpus: Corpus, kind: str) -> None:
    path = corpus.records.shards()["rank", "cc", "00000"].outputs["parquet"].path
    put_special(Path(corpus.root, path), kind)
    result = capfilt("verify", corpus.root)
    assert path in result.stdout.replace("\n", "") and result.returncode != 0, result.stdout + result.stderr


@pytest.mark.parametrize("command", ["failures", "sql"])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_not_read_from_a_special_file(corpus: Corpus, kind: str, command: str) -> None:
    path = corpus.records.shards()["crawl", "cc", "00000"].outputs["parquet"].path
    put_special(Path(corpus.root, path), kind)
    query = ["SELECT count(uid) FROM samples"] if command == "sql" else []
    result = capfilt(command, corpus.root, *query)
    assert result.returncode == 2 and path in result.stderr.replace("\n", ""), result.stderr
    assert capfilt("status", corpus.root).returncode == 0


@pytest.mark.parametrize("change", ["missing", "another type"])
@pytest.mark.parametrize(
    ("stage", "column", "table"),
    [("crawl", "url", "samples"), ("select", "captions", "curated"), ("rank", "score", "candidates")],
)
def test_a_committed_file_of_other_columns_is_named(
    corpus: Corpus, stage: str, column: str, table: str, change: str
) -> None:
    record = corpus.records.shards()[stage, "cc", "00000"]
    file = record.outputs["parquet"]
    rows = pq.read_table(Path(corpus.root, file.path))
    kept = rows.drop_columns([column])
    if change == "another type":
        kept = kept.append_column(column, pa.array([b"\xff"] * len(rows), pa.binary()))
    path, note = Path(corpus.root, file.path), Path(corpus.root, f"records/{stage}/cc/00000.json")
    pq.write_table(kept, path)
    text = note.read_text().replace(file.sha256, sha256_file(path))
    note.write_text(text.replace(f'"bytes":{file.bytes}', f'"bytes":{path.stat().st_size}'))
    expected = f"{file.path}: the column {column} "
    verified = cli_here("verify", corpus.root)
    assert verified.returncode != 0 and f"the column {column} " in verified.stdout, (
        verified.stdout + verified.stderr
    )
    uid = corpus.read("crawl", "cc", "00000")[0]["uid"] if stage != "crawl" else "0" * 32
    for command in (["failures"], ["trace", uid], ["sql", f"SELECT {column} FROM {table}"]):
        result = cli_here(command[0], corpus.root, *command[1:])
        assert "fault of capfilt" not in result.stderr, (command, result.stderr)
        if result.returncode:
            assert result.returncode == 2 and expected in result.stderr.replace("\n", ""), (
                command,
                result.stderr,
            )
    assert cli_here("status", corpus.root).returncode == 0


def test_a_slip_in_sql_is_not_laid_to_the_files(corpus: Corpus) -> None:
    for slip in ("SELECT colour FROM samples", "SELECT CAST(url AS INT) FROM samples"):
        result = cli_here("sql", corpus.root, slip)
        assert result.returncode == 2 and result.stderr.startswith("capfilt: SQL: "), result.stderr


def test_a_part_of_the_manifest_is_a_regular_file(corpus: Corpus) -> None:
    corpus.manifest.compact()
    put_special(Path(corpus.root, "manifest/shards/20260101T000000-00000000.parquet"), "FIFO")
    with pytest.raises(CorruptShardError, match="not a regular file"), corpus.manifest.open():
        pass
    corpus.manifest.rebuild()
    with corpus.manifest.open() as query:
        assert query.rows("SELECT * FROM shards")


@pytest.mark.parametrize("kind", KINDS)
def test_lists_and_files_of_models_are_regular(tmp_path: Path, kind: str) -> None:
    path = put_special(tmp_path / "config.json", kind)
    with pytest.raises(CapfiltError, match=r"config\.json.*not a regular file"):
        read_object(path)
    with pytest.raises(CapfiltError, match=r"config\.json.*not a regular file"):
        safetensors_header(path)
    with pytest.raises(CapfiltError, match=r"input.*not a regular file.*write it to a file"):
        expand(str(path), "source.cc.input")
    for read in (open_regular, lambda name: sha256_file(Path(name)), Storage(str(tmp_path)).open):
        with pytest.raises(NotRegularFileError) as caught:
            read(str(path))
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_of_a_file_without_end_no_more_than_the_bound_is_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    assert len(Storage(str(tmp_path)).read("large", max_bytes=1000)) == 1001


def test_a_checkpoint_of_special_files_is_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001.0123456789ab"
    folder.mkdir()
    put_special(folder / "model.safetensors", "FIFO")
    record = CheckpointRecord(
        path=folder.name, stage="stage1", run_id="r", step=1, samples=1, snapshot="s",
        sha256={"model.safetensors": "0" * 64}, metrics={}, created_at="2026-11-28",
    )  # fmt: skip
    files = SavedCheckpoints(str(tmp_path)).checked_files(record)
    with pytest.raises(DamagedCheckpointError, match="not a regular file"), files:
        pass
