"""Settings that every test shares."""

import os

# Before any library is imported: no network, one thread a process (the suite shares two cores with Ray workers).
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A developer's own cloud credentials and Ray cluster must never be touched by a test.
for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "AWS_PROFILE"):
    os.environ.pop(name, None)
os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1")

from collections.abc import Iterator
from uuid import uuid4

import pytest


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Serve the S3 protocol on loopback (moto) and point every S3 client of this process and its children at it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ["AWS_ENDPOINT_URL_S3"] = endpoint = f"http://{host}:{port}"
    yield endpoint
    os.environ.pop("AWS_ENDPOINT_URL_S3")
    server.stop()


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    """Serve the demo world, every answer a function of the path alone; return its base URL."""
    from jobs.demo.world.site import serving

    with serving(flaky=False) as url:
        yield url


@pytest.fixture
def s3_root(s3_server: str) -> str:
    """Return the URL of an empty prefix in a bucket of its own."""
    import s3fs

    bucket = f"corpus-{uuid4().hex[:12]}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(bucket)
    return f"s3://{bucket}/here"


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path) -> str:
    """Return an empty root on local disk, then on S3."""
    return str(tmp_path / "corpus") if request.param == "local" else request.getfixturevalue("s3_root")
