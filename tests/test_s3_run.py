"""A broken upload leaves nothing to see."""

from pathlib import Path

import pytest

from jobs.bench.fixtures.s3 import S3Request, S3Server
from pipeline.storage.storage import Storage


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
