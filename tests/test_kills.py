"""Kill -9 at random moments: whatever dies, the corpus ends as if nothing had happened."""

import random
import time
from pathlib import Path

import pytest

from schemas.config import CapfiltConfig
from tests.processes import cli_here, descendants, kill, stage_workers, start_cli
from tests.runs import committed_uids, config_file, curated_files, do_run, small_config, with_values

pytestmark = pytest.mark.ray

# One driver in ten kills, else a worker.
KILLS_A_DRIVER = 10
# Enough shards: one for each kill, each with something of every kind to lose.
PER_SHARD = 6


@pytest.fixture(scope="module")
def num_kills(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--kills")


@pytest.fixture(scope="module")
def undisturbed(base_url: str, num_kills: int, tmp_path_factory: pytest.TempPathFactory) -> CapfiltConfig:
    folder = tmp_path_factory.mktemp("undisturbed")
    config = small_config(
        str(folder / "corpus"),
        folder / "urls.parquet",
        base_url,
        num_kills * PER_SHARD,
        PER_SHARD,
        filtered=True,
    )
    assert do_run(config).exit_code == 0
    return config


def _assert_same(corpus: str, undisturbed: CapfiltConfig) -> None:
    assert committed_uids(corpus) == committed_uids(undisturbed.corpus.path)
    assert committed_uids(corpus, "crawl") == committed_uids(undisturbed.corpus.path, "crawl")
    assert curated_files(corpus) == curated_files(undisturbed.corpus.path)
    verified = cli_here("verify", corpus)
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_killed_workers_and_drivers_leave_no_trace(
    undisturbed: CapfiltConfig, num_kills: int, tmp_path: Path
) -> None:
    corpus = str(tmp_path / "corpus")
    # A killed worker costs its shard an attempt; here no number of them may lead to quarantine.
    config = with_values(undisturbed, corpus={"path": corpus}, cluster={"max_attempts": num_kills + 1})
    file = str(config_file(config, tmp_path / "corpus.json"))
    chance = random.Random(20)
    num_drivers = num_kills // KILLS_A_DRIVER
    turns = chance.sample(["driver"] * num_drivers + ["worker"] * (num_kills - num_drivers), num_kills)
    kills = {"worker": 0, "driver": 0}
    while sum(kills.values()) < num_kills:
        driver = start_cli("run", "-c", file)
        drivers_turn = False
        while not drivers_turn and driver.poll() is None and sum(kills.values()) < num_kills:
            workers = stage_workers(driver.pid)
            if not workers:
                time.sleep(0.1)
                continue
            time.sleep(chance.uniform(0.0, 1.5))
            drivers_turn = turns[sum(kills.values())] == "driver"
            if drivers_turn:
                below = descendants(driver.pid)
                kills["driver"] += kill(driver.pid)
                for pid in below:  # a power cut takes the whole machine
                    kill(pid)
            else:
                kills["worker"] += kill(chance.choice(workers))
        if sum(kills.values()) < num_kills and driver.poll() == 0 and not drivers_turn:
            pytest.fail(f"the corpus was finished after {kills}: give it more shards")
        if driver.poll() is None:
            for pid in [driver.pid, *descendants(driver.pid)]:
                kill(pid)
        driver.communicate()
    assert kills == {"worker": num_kills - num_drivers, "driver": num_drivers}
    # Whatever executor goes on.
    assert do_run(config).exit_code == 0
    _assert_same(corpus, undisturbed)
