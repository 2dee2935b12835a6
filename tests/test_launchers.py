"""Ranks that torchrun or srun starts, restarts, and the sizes asked of a Ray cluster."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from jobs.interrupts import Interrupts
from jobs.pretrain import pretrain
from jobs.ranks.launched_rank import LaunchedRank
from jobs.ranks.launcher import Restarts
from pipeline.corpus.checkpoint_files import run_folder
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from tests.corpora import make_corpus
from tests.processes import ROOT
from tests.tiny_training import tiny_config
from training.checkpoint import read_model
from training.trainer.metrics import FILE

# As srun sets them in the second of four tasks, two on each node.
SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "gpu[007-010,012]",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}
TORCHRUN = {
    "RANK": "9",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "16",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


# -- the environment -----------------------------------------------------------------------------------------


def test_a_task_of_srun_is_a_rank() -> None:
    task = LaunchedRank.of(SRUN)
    assert (task.rank, task.local, task.size, task.master) == (1, 1, 4, ("gpu007", "23456"))
    assert task.variables() == {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": "23456",
    }
    assert LaunchedRank.of(SRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "1"}).master == ("a", "1")
    assert LaunchedRank.of(SRUN | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}).master is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[007-010,012]", "gpu007"), ("a1,b[2-3]", "a1"), ("n[1,3].x", "n1.x"), ("127.0.0.1", "127.0.0.1")],
)
def test_the_first_of_the_nodes_is_where_the_ranks_meet(nodes: str, first: str) -> None:
    assert LaunchedRank.of(SRUN | {"SLURM_STEP_NODELIST": nodes}).master[0] == first


def test_a_batch_script_starts_its_ranks_itself() -> None:
    assert LaunchedRank.of({name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}) is None
    assert LaunchedRank.of({}) is None


def test_torchrun_comes_before_srun() -> None:
    rank = LaunchedRank.of(SRUN | TORCHRUN)
    assert (rank.rank, rank.local, rank.size, rank.master) == (9, 1, 16, ("node0", "29500"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"LOCAL_RANK": ""}, "LOCAL_RANK='' is not a number: start every rank with torchrun or srun"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR or MASTER_PORT is not"),
    ],
)
def test_half_an_environment_is_one_line(change: dict[str, str], message: str) -> None:
    with pytest.raises(CapfiltError, match=message):
        LaunchedRank.of(TORCHRUN | change)


def test_another_number_of_gpus_than_ranks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CapfiltError, match=r"cluster\.gpus = 8, and 16 ranks were started; set 16, or 0"):
        pretrain(tiny_config(tmp_path, tmp_path, cluster={"gpus": 8}))


# -- signals and restarts ------------------------------------------------------------------------------------


def test_a_signal_that_comes_twice_counts_once() -> None:
    """Slurm sends SIGTERM to all processes of a step, and torchrun hands it on to its ranks."""
    with Interrupts(quiet=True, once=True) as interrupts:
        assert not interrupts.asked()
        for _ in range(4):
            signal.raise_signal(signal.SIGTERM)
        assert interrupts.asked() and interrupts.count == 1 and interrupts.exit_code == 143


def test_restarts_are_given_back_after_progress() -> None:
    restarts = Restarts(2, step=5)
    assert [restarts.take(5), restarts.take(5), restarts.take(5)] == ["1 of 2", "2 of 2", ""]
    restarts = Restarts(2, step=0)
    steps = [0, 0, 10, 10, 20, 20, 20]
    assert [restarts.take(step) for step in steps] == ["1 of 2", "2 of 2"] * 3 + [""]
    assert Restarts(0, step=0).take(1) == ""


def test_a_ray_cluster_is_asked_for_least_and_most(tmp_path: Path) -> None:
    from jobs.cluster.train import scaling

    def asked(gpus: int = 0, **cluster: int) -> tuple[Any, bool]:
        config = scaling(tiny_config(tmp_path, tmp_path, cluster=cluster), gpus)
        return config.num_workers, config.use_gpu

    assert asked(8, min_ranks=4) == ((4, 8), True)
    assert asked(8) == asked(8, min_ranks=8) == (8, True)
    assert asked(cpu_ranks=3, min_ranks=2) == ((2, 3), False)
    with pytest.raises(CapfiltError, match=r"cluster\.min_ranks = 9, and 8 ranks begin"):
        asked(8, min_ranks=9)


# -- the ranks -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launched")
    make_corpus(str(folder / "corpus"), images=24)
    return folder


def run_of(workspace: Path, name: str, **sections: dict[str, Any]) -> PretrainConfig:
    """Return a run without dropout: its losses do not depend on the number of ranks."""
    run = {"name": name, "output": str(workspace / "out")}
    return tiny_config(workspace, workspace / "corpus", run=run, qformer={"dropout": 0.0}, **sections)


def losses(config: PretrainConfig) -> list[float]:
    lines = [json.loads(line) for line in (Path(run_folder(config)) / FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def expected(workspace: Path) -> list[float]:
    config = run_of(workspace, "alone")
    pretrain(config)
    return losses(config)


def _as_task(environment: dict[str, str], config: dict[str, Any]) -> tuple[str, int]:
    os.environ.update(environment)
    summary = pretrain(PretrainConfig.model_validate(config))
    return summary.outcome, summary.step


@pytest.mark.training
def test_two_tasks_of_srun_train_one_run(workspace: Path, expected: list[float]) -> None:
    config = run_of(workspace, "srun", cluster={"cpu_ranks": 5})
    job = SRUN | {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2", "SLURM_JOB_ID": str(os.getpid())}
    context = get_context("forkserver")
    context.set_forkserver_preload(["training.build", "tests.tiny_training"])
    with ProcessPoolExecutor(2, context) as pool:
        tasks = [
            pool.submit(
                _as_task,
                job | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
                config.model_dump(mode="json"),
            )
            for rank in range(2)
        ]
        assert [task.result(timeout=120) for task in tasks] == [("done", 8)] * 2
    assert losses(config) == pytest.approx(expected, rel=1e-4)
    assert read_model(run_folder(config))[1].progress.world_size == 2


@pytest.mark.training
@pytest.mark.slow
def test_torchrun_starts_the_ranks_and_its_end_saves(
    workspace: Path, tmp_path: Path, expected: list[float]
) -> None:
    config = run_of(workspace, "torchrun", optim={"steps": 4000, "warmup_steps": 2})
    config = config.model_copy(
        update={"checkpoint": config.checkpoint.model_copy(update={"every_steps": 4000})}
    )
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "jobs.cli"]
    process = subprocess.Popen(
        [*command, "pretrain", "-c", str(file), "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = Path(run_folder(config)) / FILE
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=100)
    (line,) = output.splitlines()
    summary = json.loads(line)
    assert summary["outcome"] == "interrupted" and summary["step"] == len(losses(config)) >= 5, errors
    state = read_model(run_folder(config))[1]
    assert (state.progress.step, state.progress.world_size) == (summary["step"], 2)
    # The first two steps have the rate of the shorter run.
    assert losses(config)[:2] == pytest.approx(expected[:2], rel=1e-4)
    assert errors.count("SIGTERM: stopping") == 1
