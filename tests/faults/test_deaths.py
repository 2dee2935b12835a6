"""Deaths on a real Ray: a shard that kills its worker every time, the actor that a training's ranks talk to."""

import os
import time
from pathlib import Path

import pytest
import ray
from ray.data.exceptions import omit_traceback_stdout

from jobs.cluster import actors
from jobs.cluster.train import _progress_actor
from pipeline.corpus.records import Records
from pipeline.manifest.manifest import Manifest
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig
from tests.processes import cli_here, descendants, kill, meanwhile, stage_workers
from tests.runs import curated_files, do_run, with_values
from tests.tampered_actors import Calls, LosesItsDevice

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_here")]

POISONED = LosesItsDevice.poisoned


def test_a_shard_that_kills_its_worker_every_time_is_quarantined_alone(
    undisturbed: CapfiltConfig, tmp_path: Path
) -> None:
    config = with_values(undisturbed, corpus={"path": str(tmp_path / "corpus")}, cluster={"max_attempts": 2})
    records = Records(Storage(config.corpus.path))
    attempts = Path(config.corpus.path, "records/attempts/crawl/world", POISONED)

    def poison() -> None:
        """Kill the crawl's worker as soon as it has begun the shard, as often as it does."""
        deadline = time.monotonic() + 120
        killed = 0
        while killed < 2 and time.monotonic() < deadline:
            workers = stage_workers(os.getpid(), "crawl")
            while workers and not list(attempts.glob(f"*.{killed + 1}")) and time.monotonic() < deadline:
                time.sleep(0.001)
            killed += any(map(kill, workers))

    with meanwhile(poison):
        result = do_run(config, local=False, stages=("crawl",))
    assert result.exit_code == 3
    assert list(result.quarantined) == [f"crawl world/{POISONED}"]
    assert result.quarantined[f"crawl world/{POISONED}"] == "the worker died on every attempt"
    assert len(records.shards(("crawl",))) == 2
    with Manifest(records.storage).open() as query:
        costs = query.rows("SELECT outcome, attempts, cpu_hours FROM costs ORDER BY outcome")
    assert [(row["outcome"], row["attempts"]) for row in costs] == [("committed", 2), ("lost", 2)]
    assert all(row["cpu_hours"] > 0 for row in costs), "what the killed attempts took counts"
    assert do_run(config).exit_code == 0, "the next run tries it again"
    assert curated_files(config.corpus.path) == curated_files(undisturbed.corpus.path)
    assert cli_here("verify", config.corpus.path).returncode == 0


def test_a_process_whose_device_is_lost_works_on_nothing_more(
    undisturbed: CapfiltConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_values(undisturbed, corpus={"path": str(tmp_path / "corpus")}, cluster={"max_attempts": 2})
    assert do_run(config, stages=("crawl", "caption", "rank")).exit_code == 0
    monkeypatch.setattr(actors, "_actor_class", lambda stage: LosesItsDevice)
    result = do_run(config, local=False, stages=("select",))
    assert result.exit_code == 3
    [(place, error)] = result.quarantined.items()
    assert place == f"select world/{POISONED}" and "CUDA error: device-side assert triggered" in error
    calls = Calls(config.corpus.path).all()
    poisoned = [process for process, shard in calls if shard == POISONED]
    assert len(poisoned) == len(set(poisoned)) == 2, "two attempts, each in a process of its own"
    last_call_of = dict(calls)
    assert {last_call_of[process] for process in poisoned} == {POISONED}
    assert sorted(shard for _, shard in calls if shard != POISONED) == ["00000", "00002"], (
        "no other one is charged"
    )
    with Manifest(Records(Storage(config.corpus.path)).storage).open() as query:
        lost_attempts = query.rows("SELECT shard, number, cause FROM lost_attempts ORDER BY number")
    assert lost_attempts == [{"shard": POISONED, "number": number, "cause": "failed"} for number in (1, 2)]
    assert do_run(config).exit_code == 0
    assert curated_files(config.corpus.path) == curated_files(undisturbed.corpus.path)
    assert cli_here("verify", config.corpus.path).returncode == 0


def test_the_actor_of_a_training_is_restarted_where_its_driver_is() -> None:
    actor = _progress_actor()
    assert not ray.get(actor.is_stopping.remote())
    [process] = [
        pid
        for pid in descendants(os.getpid())
        if "_ProgressActor" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    kill(process)
    assert ray.get(actor.new_lines.remote(), timeout=60) == []
    ray.kill(actor)


def test_a_broken_execution_prints_no_trace(capfd: pytest.CaptureFixture[str]) -> None:
    ray.data.range(1).materialize()  # sets up the handlers of Ray Data's loggers

    @omit_traceback_stdout
    def execute() -> None:
        raise ray.exceptions.ActorDiedError

    capfd.readouterr()
    with pytest.raises(ray.exceptions.ActorDiedError):
        execute()
    assert capfd.readouterr().err == ""
