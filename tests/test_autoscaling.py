"""A pool of GPU workers on a cluster that grows from no GPU node to three, and shrinks to none."""

import tempfile
import time
from pathlib import Path

import pytest

from jobs.demo.run import demo_config
from tests.autoscaling import growing_cluster
from tests.corpora import Corpus
from tests.runs import config_file, with_values
from tests.tampered_actors import Calls, WaitsForOthers, start_cli_with

pytestmark = [pytest.mark.slow, pytest.mark.ray]

TOKEN = "6" * 64
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    # Ray Data asks the cluster for twice as many nodes every ten seconds otherwise.
    "RAY_DATA_MIN_GAP_BETWEEN_AUTOSCALING_REQUESTS": "2",
    "RAY_DATA_DEFAULT_CLUSTER_SCALING_UP_FACTOR": "3",
}
NODES = WaitsForOthers.processes
SHARDS = [f"{number:05d}" for number in range(12)]


def test_the_pool_of_captioners_grows_with_the_cluster_and_the_cluster_shrinks_after_it(
    tmp_path: Path,
) -> None:
    corpus = Corpus(str(tmp_path / "corpus"))
    corpus.add_urls("cc", SHARDS, images=4)
    for shard in SHARDS:
        corpus.make("cc", shard, ("crawl",))
    captioner = demo_config(Path("/unused"), Path("/unused"), "http://unused:80").caption.model
    pool = {"cpus": 1, "gpus": 1, "min_workers": 1, "max_workers": NODES}
    with (
        tempfile.TemporaryDirectory(prefix="ray") as folder,
        growing_cluster(Path(folder), NODES, TOKEN) as cluster,
    ):
        config = with_values(
            corpus.config,
            caption={"model": captioner},
            cluster={"address": cluster.address, "caption": pool},
        )
        assert cluster.num_gpu_nodes() == 0
        file = str(config_file(config, tmp_path / "c.json"))
        job = start_cli_with(WaitsForOthers, "caption", "-c", file, **ENVIRONMENT)
        most = 0
        while job.poll() is None:
            most = max(most, cluster.num_gpu_nodes())
            time.sleep(0.2)
        output, errors = job.communicate()
        assert job.returncode == 0, output + errors
        assert most == len(Calls(corpus.root).processes()) == NODES
        deadline = time.monotonic() + 120
        while cluster.num_gpu_nodes():
            assert time.monotonic() < deadline, "the nodes stayed"
            time.sleep(0.2)
    records = corpus.records
    assert len(records.shards(("caption",))) == len(SHARDS)
    assert records.quarantined() == {} and records.storage.list("records/lost_attempts") == []
