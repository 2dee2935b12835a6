"""A signal to stop with a grace: what is in work is committed, nothing else begins, and the end is written."""

import os
import signal
import time
from pathlib import Path

import pytest

from pipeline.corpus.records import Records
from pipeline.storage.storage import Storage
from schemas.config import CapfiltConfig
from tests.processes import cli_here, meanwhile
from tests.runs import curated_files, do_run, with_values


@pytest.mark.parametrize("local", [True, pytest.param(False, marks=pytest.mark.ray)], ids=["local", "ray"])
def test_what_is_in_work_is_committed_within_the_grace(
    undisturbed: CapfiltConfig, tmp_path: Path, local: bool, request: pytest.FixtureRequest
) -> None:
    if not local:
        request.getfixturevalue("ray_here")
    corpus = str(tmp_path / "corpus")
    config = with_values(undisturbed, corpus={"path": corpus}, cluster={"stop_grace_s": 120.0})
    records = Records(Storage(corpus))

    def stop_in_a_caption() -> None:
        deadline = time.monotonic() + 120
        while not records.storage.list("records/attempts/caption") and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    with meanwhile(stop_in_a_caption):
        result = do_run(config, local=local)
    assert (result.record.outcome, result.exit_code) == ("interrupted", 128 + signal.SIGTERM)
    committed = records.shards()
    assert any(stage == "caption" for stage, _, _ in committed), "the shard in work was committed"
    assert not all(("rank", "world", shard) in committed for _, _, shard in committed), "and no other began"
    # An attempt that was cut off would have left its note.
    assert records.storage.list("records/attempts") == [] and records.quarantined() == {}
    [ended] = records.runs()
    assert (ended.outcome, ended.shards_done) == ("interrupted", len(committed))
    assert do_run(config).exit_code == 0
    assert curated_files(corpus) == curated_files(undisturbed.corpus.path)
    assert cli_here("verify", corpus).returncode == 0
