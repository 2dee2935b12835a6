"""A submitted job on three nodes, one of which dies: the corpus equals the one that this machine makes alone."""

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from jobs.cluster.job_environment import runtime_environment
from jobs.cluster.submit import submission_id
from pipeline.corpus.records import Records
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig
from tests.cluster import ClusterProcess, local_cluster
from tests.corpora import make_corpus
from tests.processes import cli, cli_here, stage_workers, start_cli
from tests.runs import committed_uids, config_file, curated_files, do_run, small_config, with_values
from tests.tiny_training import tiny_config
from training.checkpoint import Checkpoints

pytestmark = pytest.mark.ray

TOKEN = "7" * 64
PER_SHARD = 12


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterProcess]:
    with local_cluster(TOKEN, more_nodes=2) as up:
        yield up


@pytest.fixture(scope="module")
def config(base_url: str, tmp_path_factory: pytest.TempPathFactory) -> CapfiltConfig:
    folder = tmp_path_factory.mktemp("cluster")
    config = small_config(str(folder / "corpus"), folder / "urls.parquet", base_url, 8 * PER_SHARD, PER_SHARD)
    pool = {"cpus": 1, "min_workers": 3, "max_workers": 3}
    # The crawl belongs on the head, by its label.
    crawl = {"labels": {"capfilt-kind": "head"}, "memory_gb": 0.1}
    return with_values(config, cluster={"crawl": crawl, "caption": pool, "requirements": "installed"})


def test_wrong_token_is_refused(cluster: ClusterProcess, config: CapfiltConfig, tmp_path: Path) -> None:
    os.environ["RAY_AUTH_TOKEN"] = "8" * 64
    try:
        refused = cli(
            "submit",
            "-c",
            str(config_file(config, tmp_path / "c.json")),
            "--address",
            cluster.address,
            "--",
            "run",
        )
    finally:
        del os.environ["RAY_AUTH_TOKEN"]
    assert refused.returncode == 2, refused.stderr
    assert "token" in refused.stderr and "Traceback" not in refused.stderr


def test_every_node_is_checked(
    cluster: ClusterProcess, config: CapfiltConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    broken = with_values(config, rank={"model": "local-dir:/nowhere"})
    done = cli(
        "doctor",
        "-c",
        str(config_file(broken, tmp_path / "c.json")),
        "--address",
        cluster.address,
        "--json",
    )
    assert done.returncode == 2, done.stdout + done.stderr
    rows = json.loads(done.stdout[done.stdout.index("[") :])
    by_check = {row["check"]: row for row in rows}
    assert {
        "capfilt",
        "python",
        "torch",
        "device",
        "scratch",
        "storage",
        "captioner",
        "ranker",
    } <= by_check.keys()
    assert all(len(row["nodes"]) == 3 for row in rows), "one machine, three nodes: each finding is of all"
    assert [row["check"] for row in rows if row["state"] == "fail"] == ["ranker"]
    assert "/nowhere" in by_check["ranker"]["found"] and rows[0]["check"] == "ranker"


def test_a_node_dies_while_captioning(
    cluster: ClusterProcess, config: CapfiltConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    file = str(config_file(config, tmp_path / "corpus.json"))
    submit = ("submit", "-c", file, "--address", cluster.address, "--", "run")
    job = start_cli(*submit)
    records = Records(Storage(config.corpus.path))
    victim = None
    deadline = time.monotonic() + 400
    while victim is None and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.05)
        assert not any(stage_workers(cluster.raylets[node], "crawl") for node in (1, 2))
        captioning = [node for node in (1, 2) if stage_workers(cluster.raylets[node], "caption")]
        if captioning and records.shards(("caption",)):
            victim = captioning[0]
    assert victim is not None, job.communicate()
    again = start_cli(*submit)  # while it runs: attaches
    before = len(records.shards(("caption",)))
    cluster.kill_node(victim)
    output, errors = job.communicate(timeout=300)
    assert job.returncode == 0, output + errors
    assert before < 8, "the node died after the captioning: give it more shards"
    _, errors_again = again.communicate(timeout=60)
    assert again.returncode == 0 and "attached to" in errors_again, errors_again

    local = with_values(config, corpus={"path": str(tmp_path / "local")})
    assert do_run(local).exit_code == 0
    assert committed_uids(config.corpus.path) == committed_uids(local.corpus.path)
    assert curated_files(config.corpus.path) == curated_files(local.corpus.path)
    here = cli_here("verify", config.corpus.path)
    assert here.returncode == 0
    verified = cli(*submit[:-1], "verify")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert here.stdout.strip() and here.stdout in verified.stdout


def _wait_for_attempt(
    records: Records, before: set[str], job: subprocess.Popen, cluster: ClusterProcess, nodes: Sequence[int]
) -> tuple[set[str], int]:
    """Wait for a crawl's attempt that was not noted before; return all that are noted now, and the node in work."""
    deadline = time.monotonic() + 120
    while job.poll() is None:
        noted = {info.path for info in records.storage.list("records/attempts/crawl")}
        busy = [node for node in nodes if stage_workers(cluster.raylets[node], "crawl")]
        if noted - before and busy:
            return noted, busy[0]
        assert time.monotonic() < deadline, "no shard was begun"
        time.sleep(0.05)
    raise AssertionError(job.communicate())


def test_nodes_that_die_charge_no_shard(
    cluster: ClusterProcess,
    base_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """One node is drained and goes, one after another dies under a shard: more often than the shard has attempts."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    one = {"labels": {"capfilt-kind": "added"}, "memory_gb": 0.1}
    corpus = str(tmp_path / "corpus")
    # Some six seconds a shard.
    kills = request.config.getoption("--node-kills")
    shards = 2 + kills
    few = small_config(corpus, tmp_path / "urls.parquet", base_url, shards * PER_SHARD, PER_SHARD)
    slow = with_values(
        few,
        crawl={"rate_per_host": 2.0},
        cluster={"crawl": one, "max_attempts": 1, "requirements": "installed"},
    )
    records = Records(Storage(corpus))
    node = cluster.add_node()
    file = str(config_file(slow, tmp_path / "c.json"))
    job = start_cli("submit", "-c", file, "--address", cluster.address, "--", "crawl")
    noted, node = _wait_for_attempt(records, set(), job, cluster, [node])
    cluster.drain_node(node, 20)
    deadline = time.monotonic() + 60
    while not records.shards(("crawl",)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert records.shards(("crawl",)), "the shard in work needs less than the notice"
    assert records.storage.list("records/lost_attempts") == []
    # Ray gives nothing more to a node that is drained, until it goes.
    added = [cluster.add_node()]
    cluster.kill_node(node)
    for _ in range(kills):
        # There before the other dies; the worker may be on either.
        added.append(cluster.add_node())
        noted, node = _wait_for_attempt(records, noted, job, cluster, added)
        cluster.kill_node(node)
        added.remove(node)
    output, errors = job.communicate(timeout=300)
    assert job.returncode == 0, output + errors
    assert records.storage.list("records/lost_attempts"), "no shard was in work where a node died"
    assert records.quarantined() == {}
    uids = committed_uids(corpus, "crawl")
    assert len(uids) == len(set(uids)) == shards * PER_SHARD


def test_a_stopped_job_is_recorded_as_interrupted_and_listed_with_its_log(
    cluster: ClusterProcess, config: CapfiltConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    # 96 requests at four a second: the crawl is still at work when the command that stops it has started.
    stopped = with_values(config, corpus={"path": str(tmp_path / "stopped")}, crawl={"rate_per_host": 4.0})
    job = start_cli(
        "submit",
        "-c",
        str(config_file(stopped, tmp_path / "c.json")),
        "--address",
        cluster.address,
        "--",
        "crawl",
    )
    records = Records(Storage(stopped.corpus.path))
    deadline = time.monotonic() + 120
    while not records.shards(("crawl",)) and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.05)
    job_id = submission_id(stopped, ["crawl"])
    asked = cli("stop", job_id, "--address", cluster.address)
    assert (asked.returncode, asked.stdout) == (0, f"{job_id}: STOPPED\n"), asked.stderr
    output, errors = job.communicate(timeout=120)
    assert "SIGTERM: stopping" in output, output + errors
    [ended] = records.runs()
    assert ended.outcome == "interrupted"
    assert 0 < ended.shards_done <= len(records.shards())
    listed = json.loads(cli("jobs", "--address", cluster.address, "--json").stdout)
    [row] = [row for row in listed if row["job"] == job_id]
    assert (row["status"], row["corpus"]) == ("STOPPED", stopped.corpus.path)
    assert row["started_at"] < row["ended_at"] and row == listed[0]
    log = cli("logs", job_id, "--address", cluster.address)
    assert log.returncode == 0 and "SIGTERM: stopping" in log.stdout
    unknown = cli("logs", "capfilt-run-0", "--address", cluster.address)
    assert unknown.returncode == 2 and "no such job; `capfilt jobs` lists them" in unknown.stderr


def test_exit_code_is_passed_on(
    cluster: ClusterProcess, config: CapfiltConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    empty = with_values(config, corpus={"path": str(tmp_path / "empty")})
    failed = cli(
        "submit",
        "-c",
        str(config_file(empty, tmp_path / "c.json")),
        "--address",
        cluster.address,
        "--",
        "rank",
    )
    assert failed.returncode == 2
    assert "capfilt:" in failed.stdout + failed.stderr


def test_a_training_is_a_job_too(
    cluster: ClusterProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    make_corpus(str(tmp_path / "corpus"))
    training = tiny_config(
        tmp_path,
        tmp_path / "corpus",
        cluster={"cpu_ranks": 1, "requirements": "installed"},
        optim={"steps": 4},
    )
    assert "pip" not in runtime_environment(training, tmp_path)
    file = tmp_path / "training.json"
    file.write_text(training.model_dump_json())
    done = cli("submit", "-c", str(file), "--address", cluster.address, "--", "pretrain", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    [committed] = Checkpoints(f"{training.run.output}/stage1/tiny").committed()
    assert committed.step == 4
