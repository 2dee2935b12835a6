"""Settings that every test shares."""

import os
import sys

# Before any library is imported: no network, one thread a process (the suite shares two cores with Ray workers).
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray gives its workers the lowest priority but four: beside a busy process of another test they would hardly run.
os.environ.setdefault("RAY_worker_niceness", "0")
# A developer's own cloud credentials and Ray cluster must never be touched by a test.
for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "AWS_PROFILE"):
    os.environ.pop(name, None)
os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1")

from collections.abc import Iterator
from urllib.request import Request, urlopen
from uuid import uuid4

import pytest

_BEFORE = dict(os.environ)
# What our code reads; libraries set variables of their own when they are imported.
_READ_BY_US = (
    *("AWS_", "AZURE_", "CAPFILT_", "GOOGLE_"),
    *("LOCAL_RANK", "MASTER_", "RANK", "SLURM_", "WORLD_SIZE"),
    # Not RAY_AUTH_MODE, which stays once a Ray with a token was started.
    *("RAY_ADDRESS", "RAY_AUTH_TOKEN"),
)

from jobs.bench.fixtures.s3 import S3Server, serving_s3

# The longest files, the longest first: with `--dist loadfile` no process is left alone with one of them at the end.
_LONGEST = (
    "demo",
    "cluster",
    "pretrain",
    "elastic_ray",
    "bench",
    "head_kills",
    "kills",
    "manifest",
    "run",
    "plan",
    "storage_away",
    "local",
    "autoscaling",
    "wheel",
    "cli",
    "deaths",
    "weights",
    "bootstrap",
    "web",
    "hostile_records",
    "verify",
    "reports",
    "pictures",
    "lease",
    "crawl",
    "python_door",
    "look",
    "launchers",
    "filter",
    "hostile_lists",
    "costs",
    "gradient_sum",
)


MANY_NODE_KILLS = 3


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what makes a test of chance longer than the suite has time for."""
    parser.addoption("--kills", type=int, default=20, help="how often tests/test_kills.py kills something")
    parser.addoption(
        "--node-kills",
        type=int,
        default=2,
        help="how many nodes tests/test_cluster.py and test_node_kills.py kill in a row",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files first; all others stay in their order. Tests of minutes are left out unless asked for."""
    if config.getoption("--node-kills") < MANY_NODE_KILLS:
        left_out = [item for item in items if item.get_closest_marker("many_node_kills")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    places = {f"test_{name}.py": place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """After a file's last test its process is as it was: what one file left has broken the tests of another."""
    yield
    if nextitem is not None and nextitem.path == item.path:
        return
    changed = {
        name
        for name in os.environ.keys() | _BEFORE.keys()
        if name.startswith(_READ_BY_US) and os.environ.get(name) != _BEFORE.get(name)
    }
    # The one server that all files share.
    changed -= {"AWS_ENDPOINT_URL_S3"}
    assert not changed, f"{item.path.name} leaves the environment changed: {sorted(changed)}"
    ray = sys.modules.get("ray")
    assert ray is None or not ray.is_initialized(), f"{item.path.name} leaves Ray up"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """Serve the S3 protocol on loopback (moto) and point every S3 client of this process and its children at it."""
    with serving_s3() as server:
        os.environ["AWS_ENDPOINT_URL_S3"] = server.url
        yield server
    os.environ.pop("AWS_ENDPOINT_URL_S3")


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    """Serve the demo world, every answer a function of the path alone; return its base URL."""
    from jobs.demo.world.site import serving

    with serving(flaky=False) as url:
        yield url


@pytest.fixture
def s3_root(s3_server: S3Server) -> str:
    """Return the URL of an empty prefix in a bucket of its own."""
    bucket = f"corpus-{uuid4().hex[:12]}"
    urlopen(Request(f"{s3_server.url}/{bucket}", method="PUT")).close()
    return f"s3://{bucket}/here"


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path) -> str:
    """Return an empty root on local disk, then on S3."""
    return str(tmp_path / "corpus") if request.param == "local" else request.getfixturevalue("s3_root")
