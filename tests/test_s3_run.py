"""The same config on the S3 protocol gives the same corpus; a broken upload leaves nothing to see."""

from pathlib import Path

import pytest

from jobs.bench.fixtures.s3 import S3Request, S3Server
from pipeline.manifest.manifest import Manifest
from pipeline.storage.storage import Storage
from tests.processes import cli, cli_here
from tests.runs import committed_uids, config_file, curated_files, do_run, small_config, with_values

pytestmark = pytest.mark.ray


def test_s3_equals_local(base_url: str, s3_root: str, tmp_path: Path) -> None:
    local = small_config(str(tmp_path / "corpus"), tmp_path / "urls.parquet", base_url, 24, 8)
    remote = with_values(local, corpus={"path": s3_root})
    # The local one without Ray, so that what is equal are both executors, too.
    assert do_run(local).exit_code == 0
    done = cli("run", "-c", str(config_file(remote, tmp_path / "remote.json")))
    assert done.returncode == 0, done.stderr
    assert curated_files(s3_root) == curated_files(local.corpus.path)
    assert committed_uids(s3_root) == committed_uids(local.corpus.path)
    verified = cli_here("verify", s3_root)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    counts = [
        Manifest(Storage(corpus)).query("SELECT count(*) FROM curated").rows
        for corpus in (s3_root, local.corpus.path)
    ]
    assert counts[0] == counts[1] != [(0,)]


@pytest.mark.parametrize(
    ("size", "kind", "count"), [(1000, "PUT", 1), (60 << 20, "PART", 2)], ids=["one-part", "multipart"]
)
def test_failure_inside_an_upload_leaves_no_object(
    s3_root: str,
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    kind: str,
    count: int,
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    storage = Storage(s3_root)
    file = tmp_path / "shard.tar"
    file.write_bytes(b"x" * size)
    seen = []

    # The server gives up on the body (on that of the second part, where there are parts).
    def refuse(request: S3Request) -> str | None:
        seen.append(request.kind)
        return "500 Internal Server Error" if seen.count(kind) == count else None

    monkeypatch.setattr(s3_server, "refuse", refuse)
    with pytest.raises(OSError, match="S3 cannot be used: .*500"):
        storage.put(file, "raw/world/00000.tar")
    monkeypatch.undo()
    assert storage.list("") == []
    storage.put(file, "raw/world/00000.tar")
    assert storage.info("raw/world/00000.tar").bytes == size
