"""The same config on the S3 protocol gives the same corpus; a broken upload leaves nothing to see."""

from pathlib import Path

import pytest

from pipeline.storage.storage import Storage
from tests.processes import cli
from tests.runs import committed_uids, config_file, curated_files, small_config, with_values

pytestmark = pytest.mark.ray


def test_s3_equals_local(base_url: str, s3_root: str, tmp_path: Path) -> None:
    local = small_config(str(tmp_path / "corpus"), tmp_path / "urls.parquet", base_url, 24, 8)
    remote = with_values(local, corpus={"path": s3_root})
    # The local one without Ray, so that what is equal are both executors, too.
    for config, name, options in ((local, "local", ["--local"]), (remote, "remote", [])):
        done = cli("run", "-c", str(config_file(config, tmp_path / f"{name}.json")), *options)
        assert done.returncode == 0, done.stderr
    assert curated_files(s3_root) == curated_files(local.corpus.path)
    assert committed_uids(s3_root) == committed_uids(local.corpus.path)
    verified = cli("verify", s3_root)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    counts = [
        cli("sql", corpus, "SELECT count(*) AS n FROM curated", "--json").stdout
        for corpus in (s3_root, local.corpus.path)
    ]
    assert counts[0] == counts[1] and '"n"' in counts[0]


@pytest.mark.parametrize("size", [1000, 101 << 20], ids=["one-part", "multipart"])
def test_failure_inside_an_upload_leaves_no_object(
    s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    storage = Storage(s3_root)
    file = tmp_path / "shard.tar"
    file.write_bytes(b"x" * size)
    sent = []

    # The connection breaks in the middle of the body (of the second part, where there are parts).
    async def broken(self: object, method: str, *args: object, **kwargs: object) -> object:
        sent.append(method)
        if method in ("put_object", "upload_part") and (size < 2000 or sent.count("upload_part") == 2):
            raise OSError("the connection broke")
        return await original(self, method, *args, **kwargs)

    original = type(storage.fs)._call_s3
    monkeypatch.setattr(type(storage.fs), "_call_s3", broken)
    with pytest.raises(OSError, match="the connection broke"):
        storage.put(file, "raw/world/00000.tar")
    monkeypatch.undo()
    assert storage.list("") == []
    storage.put(file, "raw/world/00000.tar")
    assert storage.info("raw/world/00000.tar").bytes == size
