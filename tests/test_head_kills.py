"""The head of a cluster dies, and with it the driver of a job: the same command goes on on a new cluster."""

import time
from pathlib import Path

import pytest

from pipeline.corpus.records import Records
from pipeline.storage.storage import Storage
from tests.cluster import local_cluster
from tests.processes import cli_here, start_cli
from tests.runs import committed_uids, config_file, curated_files, do_run, small_config, with_values

pytestmark = [pytest.mark.slow, pytest.mark.ray]

TOKEN = "4" * 64
PER_SHARD = 6


def test_heads_that_die_with_their_drivers_lose_and_double_nothing(
    base_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    # A cluster takes a while to start: two deaths where tests of minutes are asked for.
    deaths = 2 if request.config.getoption("--node-kills") > 2 else 1
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    corpus = str(tmp_path / "corpus")
    config = small_config(
        corpus, tmp_path / "urls.parquet", base_url, (2 * deaths + 1) * PER_SHARD, PER_SHARD
    )
    # Some three seconds a shard, so that one is in work.
    slow = with_values(config, crawl={"rate_per_host": 2.0}, cluster={"requirements": "installed"})
    file = str(config_file(slow, tmp_path / "c.json"))
    records = Records(Storage(corpus))
    for kills in range(deaths + 1):
        with local_cluster(TOKEN) as cluster:
            job = start_cli("submit", "-c", file, "--address", cluster.address, "--", "crawl")
            if kills == deaths:
                output, errors = job.communicate(timeout=300)
                assert job.returncode == 0, output + errors
                break
            before = len(records.shards(("crawl",)))
            deadline = time.monotonic() + 120
            while len(records.shards(("crawl",))) == before or not records.storage.list(
                "records/attempts/crawl"
            ):
                assert job.poll() is None and time.monotonic() < deadline, (
                    "no shard was committed, and one in work"
                )
                time.sleep(0.05)
            cluster.kill_all()
            _, errors = job.communicate(timeout=120)
            assert job.returncode == 4 and "submit the same again" in errors, errors
    assert len(records.runs()) == deaths + 1
    assert records.quarantined() == {}
    local = with_values(config, corpus={"path": str(tmp_path / "local")})
    for made in (config, local):
        assert do_run(made).exit_code == 0
    uids = committed_uids(corpus, "crawl")
    assert len(uids) == len(set(uids)) and uids == committed_uids(local.corpus.path, "crawl")
    assert curated_files(corpus) == curated_files(local.corpus.path)
    assert cli_here("verify", corpus).returncode == 0
