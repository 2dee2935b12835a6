"""A small world and the corpus that a run makes of it when nothing goes wrong."""

from collections.abc import Iterator

import pytest

from jobs.demo.world.site import serving
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
