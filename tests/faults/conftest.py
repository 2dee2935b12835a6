"""A small world and the corpus that a run makes of it when nothing goes wrong."""

from collections.abc import Iterator

import pytest

from jobs.bench.fixtures.s3 import S3Server, bucket_on
from jobs.demo.world.site import serving
from jobs.interrupts import Interrupts
from schemas.config import CapfiltConfig
from tests.faults.proxy import Proxy, proxy_to
from tests.runs import do_run, small_config

SHARDS, PER_SHARD = 3, 4
BUCKET = "faults"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CapfiltConfig]:
    """The config of a corpus of three small shards that is done; its world is served until the file's last test."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with serving(flaky=False) as url:
        config = small_config(
            str(folder / "corpus"), folder / "urls.parquet", url, SHARDS * PER_SHARD, PER_SHARD
        )
        assert do_run(config).exit_code == 0
        yield config


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[Proxy]:
    """A proxy before the S3 server, which all clients use, with a hundredth of their usual patience."""
    with pytest.MonkeyPatch.context() as patch, proxy_to(s3_server.url) as proxy:
        patch.setenv("AWS_MAX_ATTEMPTS", "2")
        patch.setenv("CAPFILT_STORAGE_TIMEOUT_S", "0.5")
        with bucket_on(proxy.url, BUCKET):
            yield proxy


@pytest.fixture(scope="module")
def ray_here(proxy: Proxy) -> Iterator[None]:
    """A Ray of this process, which its runs join; its workers reach the S3 server through the proxy."""
    from jobs.cluster.session import joined_ray

    with Interrupts() as interrupts, joined_ray("local", interrupts, num_cpus=6, include_dashboard=False):
        yield
