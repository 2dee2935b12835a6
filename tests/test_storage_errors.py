"""What storage refuses is one line that says what to do, not a traceback."""

import errno
import os
import resource
import shutil
from pathlib import Path

import pytest

from jobs.bench.fixtures.s3 import S3Server
from pipeline.storage.errors import storage_error_message
from pipeline.storage.scratch import temporary_folder
from tests.processes import cli

_CONFIG = """
[corpus]
path = "s3://no-such-bucket/corpus"
[[source]]
name = "web"
input = ["{folder}/urls.csv"]
[crawl]
contact = "https://example.org"
"""


def told(*arguments: str, exit_code: int = 2, **environment: str) -> str:
    result = cli(*arguments, **environment)
    assert result.returncode == exit_code, result.stderr
    assert "Traceback" not in result.stderr and "fault of capfilt" not in result.stderr
    (line,) = result.stderr.strip().splitlines()
    return line


def test_s3_without_credentials(tmp_path) -> None:
    env = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "")
    env |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    assert "AWS_PROFILE, or AWS_ACCESS_KEY_ID" in told("status", "s3://bucket/corpus", **env)


def test_s3_that_does_not_answer() -> None:
    nowhere = {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    line = told("status", "s3://bucket/corpus", exit_code=4, **nowhere)
    assert "http://127.0.0.1:9" in line and "AWS_ENDPOINT_URL" in line


def test_a_bucket_that_does_not_exist(s3_server: S3Server, tmp_path) -> None:
    (tmp_path / "urls.csv").write_text("url,caption\nhttp://a.example/1.jpg,one\n")
    (tmp_path / "corpus.toml").write_text(_CONFIG.format(folder=tmp_path))
    line = told("crawl", "-c", str(tmp_path / "corpus.toml"))
    assert "bucket does not exist" in line and "check that the bucket exists" in line


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EACCES, "right to"),
        (errno.EROFS, "may be written"),
        (errno.EISDIR, "name a file"),
    ],
)
def test_a_disk_that_does_not_take_it(number: int, advice: str) -> None:
    line = storage_error_message(OSError(number, os.strerror(number), "/data/x"))
    assert line is not None and os.strerror(number) in line and "/data/x" in line and advice in line


def test_of_a_copy_the_full_disk_is_named_and_not_the_one_that_was_read(tmp_path: Path) -> None:
    (tmp_path / "read").write_bytes(b"x" * 100_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError) as refused:
            shutil.copyfile(tmp_path / "read", tmp_path / "written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    line = storage_error_message(refused.value)
    assert line is not None and line.startswith(f"File too large: {tmp_path}/written; make room")


@pytest.mark.parametrize(
    "error", [ValueError("x"), FileNotFoundError(errno.ENOENT, "gone", "x"), KeyError("y")]
)
def test_other_errors_are_not_explained_away(error: Exception) -> None:
    assert storage_error_message(error) is None


@pytest.mark.parametrize(("free", "named"), [(0, True), (1 << 30, False)])
def test_a_full_disk_of_scratch_files_is_named(
    free: int, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write knows of no name: if the scratch disk has room, it was another one."""
    monkeypatch.setattr("pipeline.storage.scratch.free_scratch", lambda: free)
    with (
        pytest.raises(OSError) as full,
        temporary_folder() as folder,
        open("/dev/full", "wb", buffering=0) as file,
    ):
        file.write(b"of a tar")
    message = storage_error_message(full.value)
    place = f": {folder} (the folder of TMPDIR)" if named else ""
    assert message == f"No space left on device{place}; make room"
