"""A run whose storage goes away and comes back: connections before a real S3 server are refused, hang, break, crawl."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from subprocess import PIPE

import pytest

from jobs.bench.fixtures.s3 import S3Request, S3Server
from pipeline.corpus.records import Records
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig
from schemas.stages import STAGE_FOLDERS, Stage
from tests.faults.conftest import BUCKET, SHARDS
from tests.faults.proxy import Mode, Proxy
from tests.processes import ROOT, cli_here
from tests.runs import committed_uids, config_file, curated_files, with_values

STAGES: tuple[Stage, ...] = ("crawl", "caption", "rank", "select")
# As if five minutes and two, in a hundredth of the time; then what a bad line does.
OUTAGE: tuple[tuple[Mode, float], ...] = (("refuse", 1.5), ("hang", 1.5), ("cut", 0.7), ("slow", 0.7))
# Of crawl and select a tar and a Parquet, of the others a Parquet.
FILES_A_SHARD = 6


def begins(request: S3Request) -> str:
    """Return the stage whose first attempt of a shard a request notes; empty where it notes none."""
    parts = request.key.split("/")
    return parts[3] if request.kind == "PUT" and parts[1:3] == ["records", "attempts"] else ""


# A worker that has said that it works, and waits until its input ends; then it ends as the command line does.
WORKER = """
import sys, time
from jobs.cli.main import program
from pipeline.corpus.living_workers import LivingWorkers
from pipeline.manifest.manifest import Manifest
from pipeline.storage.patience import Patience
from pipeline.storage.storage import Storage

told = []
with LivingWorkers(Storage(sys.argv[1], Patience(3600)), "crawl", told.append).at_work():
    while not told:
        time.sleep(0.01)
print("counted", flush=True)
sys.stdin.read()
sys.argv[1:] = ["--version"]
program()
"""


def objects(folder: str) -> list[str]:
    return [info.path for info in Storage(f"s3://{BUCKET}/corpus").list(folder)]


def test_a_run_outlasts_a_storage_that_is_away_in_every_stage(
    undisturbed: CapfiltConfig,
    s3_server: S3Server,
    proxy: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = with_values(undisturbed, corpus={"path": f"s3://{BUCKET}/corpus"})
    disturbed: list[str] = []

    def go_away() -> None:
        for mode, seconds in OUTAGE:
            proxy.be(mode)
            time.sleep(seconds)
        proxy.be("pass")

    def watch(request: S3Request) -> None:
        stage = begins(request)
        if stage and stage not in disturbed:
            disturbed.append(stage)
            threading.Thread(target=go_away).start()

    monkeypatch.setattr(s3_server, "refuse", watch)
    done = cli_here("run", "--local", "-c", str(config_file(config, tmp_path / "c.json")))
    assert done.returncode == 0, done.stdout + done.stderr
    assert disturbed == list(STAGES)

    lines = [line for line in done.stderr.splitlines() if "images/s" not in line]
    away = [line for line in lines if "Waiting for it" in line]
    back = [line for line in lines if "the storage answers again" in line]
    # Spells that follow one another closely are one.
    assert len(away) == len(back) >= 1, done.stderr
    assert len(lines) <= 20, done.stderr
    # Nothing was done twice: what was ready waited where it was.
    made = Records(Storage(config.corpus.path)).shards().values()
    written = [path for folder in STAGE_FOLDERS.values() for path in objects(f"{folder}/world")]
    assert set(written) >= {file.path for record in made for file in record.outputs.values()}
    assert len([path for path in written if not path.startswith("urls/")]) == SHARDS * FILES_A_SHARD
    assert objects("records/quarantine") == objects("records/attempts") == []
    assert committed_uids(config.corpus.path) == committed_uids(undisturbed.corpus.path)
    assert curated_files(config.corpus.path) == curated_files(undisturbed.corpus.path)
    assert cli_here("verify", config.corpus.path).returncode == 0


@pytest.mark.parametrize("how", ["--local", pytest.param("", marks=pytest.mark.ray)], ids=["local", "ray"])
def test_patience_ends_with_exit_code_4_and_the_same_command_goes_on(
    undisturbed: CapfiltConfig,
    s3_server: S3Server,
    proxy: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    how: str,
) -> None:
    if not how:
        request.getfixturevalue("ray_here")
    path = f"s3://{BUCKET}/impatient{how}"
    config = with_values(undisturbed, corpus={"path": path}, cluster={"storage_patience_s": 2.0})
    arguments = ("run", "-c", str(config_file(config, tmp_path / "c.json")))
    refused = threading.Event()

    def watch(request: S3Request) -> None:
        if begins(request) == "caption" and not refused.is_set():
            refused.set()
            threading.Thread(target=proxy.be, args=("refuse",)).start()

    monkeypatch.setattr(s3_server, "refuse", watch)
    ended = cli_here(*arguments, *filter(None, [how]))
    assert ended.returncode == 4, ended.stderr
    assert "cluster.storage_patience_s = 2" in ended.stderr and "Traceback" not in ended.stderr
    proxy.be("pass")
    records = Records(Storage(path))
    before = records.shards()
    assert {stage for stage, _, _ in before} == {"crawl"} and records.quarantined() == {}
    assert cli_here(*arguments, "--local").returncode == 0
    after = records.shards()
    assert all(after[place] == record for place, record in before.items())
    assert len(after) == SHARDS * len(STAGES)


def test_an_endpoint_that_refuses_before_the_work_is_said_at_once(
    undisturbed: CapfiltConfig, proxy: Proxy, tmp_path: Path
) -> None:
    config = with_values(undisturbed, corpus={"path": f"s3://{BUCKET}/nowhere"})
    proxy.be("refuse")
    ended = cli_here("run", "--local", "-c", str(config_file(config, tmp_path / "c.json")))
    proxy.be("pass")
    assert (ended.returncode, len(ended.stderr.splitlines())) == (4, 1), ended.stderr


def test_a_process_ends_while_the_storage_is_away(proxy: Proxy) -> None:
    """A worker removes its file of ``records/at-work`` at its end: with an hour's patience, that took an hour."""
    command = [sys.executable, "-c", WORKER, f"s3://{BUCKET}/at-its-end"]
    with subprocess.Popen(command, cwd=ROOT, stdin=PIPE, stdout=PIPE, stderr=PIPE) as worker:
        assert worker.stdout and worker.stdout.readline() == b"counted\n"
        proxy.be("refuse")
        try:
            output, errors = worker.communicate(timeout=60)
        finally:
            worker.kill()
            proxy.be("pass")
    # The thread that still waits for the storage is not told of.
    assert (worker.returncode, errors) == (0, b"") and output.startswith(b"capfilt ")
