"""A small world and the corpus that a run makes of it when nothing goes wrong."""

from collections.abc import Iterator

import pytest

from jobs.demo.world.site import serving
from jobs.interrupts import Interrupts
from schemas.config import CapfiltConfig
from tests.runs import do_run, small_config

SHARDS, PER_SHARD = 3, 4


@pytest.fixture(scope="package")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CapfiltConfig]:
    """The config of a corpus of three small shards that is done; its world is served until the last test."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with serving(flaky=False) as url:
        config = small_config(
            str(folder / "corpus"), folder / "urls.parquet", url, SHARDS * PER_SHARD, PER_SHARD
        )
        assert do_run(config).exit_code == 0
        yield config


@pytest.fixture(scope="package")
def ray_here() -> Iterator[None]:
    """A Ray of this process, which its runs join."""
    from jobs.cluster.session import joined_ray

    with Interrupts() as interrupts, joined_ray("local", interrupts, num_cpus=6, include_dashboard=False):
        yield
