"""A Ray cluster that loses a node: the ranks save before it goes, and fewer of them go on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from jobs.pretrain import pretrain
from pipeline.corpus.checkpoint_files import run_folder
from tests.corpora import make_corpus
from tests.processes import meanwhile
from tests.tiny_training import tiny_config
from training.checkpoint import Checkpoints
from training.trainer.metrics import FILE

pytestmark = [pytest.mark.ray, pytest.mark.training, pytest.mark.slow]

# Each node has room for one rank.
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
WAIT_S = 180


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    up = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    try:
        up.add_node(**NODE)
        up.wait_for_nodes()
        yield up
    finally:
        up.shutdown()


def test_ranks_save_before_their_node_goes_and_fewer_go_on(cluster: Cluster, tmp_path: Path) -> None:
    """No restart is allowed but for progress: the checkpoint that the preempted ranks made gives it."""
    make_corpus(str(tmp_path / "corpus"))
    config = tiny_config(
        tmp_path,
        tmp_path / "corpus",
        optim={"steps": 20_000},
        checkpoint={"every_steps": 20_000},
        cluster={"cpu_ranks": 2, "min_ranks": 1, "max_restarts": 0, "address": cluster.address},
    )
    metrics, checkpoints = Path(run_folder(config)) / FILE, Checkpoints(run_folder(config))

    def wait_for_steps(number: int) -> None:
        deadline = time.monotonic() + WAIT_S
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < number:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def take_a_node_away() -> None:
        wait_for_steps(5)
        (worker,) = cluster.worker_nodes
        # As a cloud says it, a while before: the node is not killed by this.
        subprocess.run(
            [
                *(Path(sys.executable).with_name("ray"), "drain-node", "--address", cluster.address),
                *("--node-id", worker.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
                *("--reason-message", "it is wanted back", "--deadline-remaining-seconds", str(2 * WAIT_S)),
            ],
            check=True,
        )
        deadline = time.monotonic() + WAIT_S
        while not checkpoints.committed():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        cluster.remove_node(worker)
        wait_for_steps(checkpoints.committed()[0].step + 3)
        os.kill(os.getpid(), signal.SIGTERM)

    with meanwhile(take_a_node_away):
        summary = pretrain(config)
    saved, last = checkpoints.committed()
    assert [checkpoints.read(record).progress.world_size for record in (saved, last)] == [2, 1]
    assert (summary.outcome, summary.resumed_from, summary.step) == ("interrupted", saved.step, last.step)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, last.step + 1))
