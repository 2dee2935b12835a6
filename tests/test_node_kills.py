"""Nodes that die faster than a shard takes: minutes, so only by ``pytest tests/test_node_kills.py --node-kills 14``."""

import random
import time
from pathlib import Path

import pytest

from pipeline.corpus.records import Records
from pipeline.storage.storage import Storage
from tests.cluster import CPUS_PER_NODE, local_cluster
from tests.processes import cli_here
from tests.runs import committed_uids, config_file, curated_files, do_run, small_config, with_values
from tests.tampered_actors import TakesLong, start_cli_with

pytestmark = [pytest.mark.ray, pytest.mark.many_node_kills]

TOKEN = "5" * 64
EVERY_S = 12.0
NODES, PER_SHARD = 3, 4


@pytest.mark.timeout(1800)
def test_nodes_that_die_faster_than_a_shard_takes_cost_time_alone(
    base_url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kills = request.config.getoption("--node-kills")
    corpus = str(tmp_path / "corpus")
    config = small_config(corpus, tmp_path / "urls.parquet", base_url, (kills + 2) * PER_SHARD, PER_SHARD)
    # One worker a node: the head has the others.
    pool = {"cpus": CPUS_PER_NODE, "min_workers": NODES, "max_workers": NODES}
    head = {"cpus": 0.5, "labels": {"capfilt-kind": "head"}}
    stages = {"crawl": pool | {"labels": {"capfilt-kind": "added"}}} | dict.fromkeys(
        ("caption", "rank", "select"), head
    )
    records = Records(Storage(corpus))
    chance = random.Random(14)
    with local_cluster(TOKEN) as cluster:
        there = with_values(config, cluster={"address": cluster.gcs, "max_attempts": 3, **stages})
        file = str(config_file(there, tmp_path / "c.json"))
        job = start_cli_with(TakesLong, "run", "-c", file, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
        nodes = [cluster.add_node() for _ in range(NODES)]
        while not records.storage.list("records/attempts/crawl"):
            assert job.poll() is None, job.communicate()
            time.sleep(0.5)
        for _ in range(kills):
            time.sleep(EVERY_S)
            assert job.poll() is None and len(records.shards(("crawl",))) < kills + 2, "give it more shards"
            nodes.append(cluster.add_node())
            cluster.kill_node(nodes.pop(chance.randrange(NODES)))
        output, errors = job.communicate(timeout=1200)
    assert job.returncode == 0, output + errors
    lost = records.storage.list("records/lost_attempts/crawl")
    print(f"{len(lost)} attempts were lost with their nodes")
    assert len(lost) >= kills // 2, "shards were in work where nodes died"
    assert records.quarantined() == {}
    local = with_values(config, corpus={"path": str(tmp_path / "local")})
    assert do_run(local).exit_code == 0
    uids = committed_uids(corpus)
    assert len(uids) == len(set(uids)) and uids == committed_uids(local.corpus.path)
    assert curated_files(corpus) == curated_files(local.corpus.path)
    assert cli_here("verify", corpus).returncode == 0
