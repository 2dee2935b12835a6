"""One stage on one shard: what a runner does when the storage, the worker or the run is at fault."""

import errno
import os
from pathlib import Path

import pytest
import torch

from jobs.executor import RunMonitor
from pipeline.corpus.lost_attempts import RunAttempts
from pipeline.corpus.records import Records
from pipeline.runs.progress import ProgressCounter, ShardOutcome
from pipeline.runs.runner import Node, RunSettings, ShardRunner
from schemas.config import CapfiltConfig
from schemas.errors import CapfiltError, DeviceLostError, TryAgainLaterError
from schemas.records import ShardRecord, ShardTask
from schemas.stages import Stage
from tests.corpora import Corpus
from tests.runners import Work, select_shards

RUN = "20260102T000000-test"


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """A corpus of one shard whose selection is to be done."""
    corpus = Corpus(str(tmp_path / "corpus"))
    corpus.add_urls("cc", ["00000"], images=6)
    corpus.make("cc", "00000", ("crawl", "caption", "rank"))
    return corpus


def select(corpus: Corpus, *failures: Exception) -> tuple[ShardOutcome, int]:
    """Run the selection with a worker whose first calls fail; return the outcome, and how often it was loaded."""
    left = list(failures)

    def failing(work: Work) -> Work:
        def call(task: ShardTask) -> ShardRecord:
            if left:
                raise left.pop(0)
            return work(task)

        return call

    selected = select_shards(corpus, failing)
    [outcome] = selected.outcomes
    return outcome, selected.loads


def patient(config: CapfiltConfig, patience_s: float) -> CapfiltConfig:
    return config.model_copy(
        update={"cluster": config.cluster.model_copy(update={"storage_patience_s": patience_s})}
    )


def test_a_worker_that_fails_is_loaded_again_and_the_shard_tried_again(corpus: Corpus) -> None:
    outcome, loads = select(corpus, RuntimeError("no such file"), OSError("no space"))
    assert (outcome.state, loads) == ("done", 3)
    record = corpus.records.read("select", "cc", "00000")
    assert record is not None and outcome.record is not None
    assert (outcome.record.rows_in, outcome.record.rows_out) == (record.rows_in, record.rows_out)
    assert corpus.storage.list("records/attempts") == [], "the commit ends the attempts"


def test_a_shard_that_fails_every_attempt_is_quarantined_with_its_last_error(corpus: Corpus) -> None:
    outcome, loads = select(corpus, *(RuntimeError(f"try {number}") for number in range(5)))
    assert (outcome.state, loads) == ("quarantined", corpus.config.cluster.max_attempts)
    [quarantine] = corpus.records.quarantined().values()
    assert quarantine.attempts == 3 and quarantine.error.endswith("RuntimeError: try 2")


def test_an_error_that_stays_with_the_device_charges_the_shard_once_and_ends_the_process(
    corpus: Corpus,
) -> None:
    error = torch.AcceleratorError(
        "CUDA error: an illegal memory access was encountered\nCUDA kernel errors ..."
    )
    with pytest.raises(
        DeviceLostError, match=r"^select cc/00000: CUDA error: an illegal memory access was enc"
    ):
        select(corpus, error)
    [lost] = corpus.records.storage.list("records/lost_attempts")
    assert lost.path.endswith(f"{RUN}.1.json") and corpus.records.quarantined() == {}
    outcome, loads = select(corpus)  # as in another process
    assert (outcome.state, loads) == ("done", 1)
    assert corpus.records.storage.list("records/lost_attempts") == [lost]


def test_a_shard_that_loses_its_device_every_time_is_quarantined_with_its_error(corpus: Corpus) -> None:
    for number in range(3):
        with pytest.raises(DeviceLostError):
            select(corpus, RuntimeError(f"CUDA error: device-side assert triggered, try {number}"))
    outcome, loads = select(corpus)
    assert (outcome.state, loads) == ("quarantined", 0)
    assert outcome.error.endswith("device-side assert triggered, try 2")


def test_attempts_of_killed_workers_count(corpus: Corpus) -> None:
    for _ in range(corpus.config.cluster.max_attempts):
        corpus.records.attempts("select", "cc", "00000", RUN).begin(is_retry=True)
    outcome, loads = select(corpus)
    assert (outcome.state, outcome.error, loads) == ("quarantined", "the worker died on every attempt", 0)


def test_a_storage_that_refuses_to_clean_up_undoes_no_commit(corpus: Corpus) -> None:
    class NoDeletes(Records):
        def attempts(self, stage: Stage, source: str, shard: str, run_id: str) -> RunAttempts:
            return Undeleted(self.storage, stage, source, shard, run_id)

    class Undeleted(RunAttempts):
        def end(self, begun: int) -> None:
            raise OSError("503 SlowDown")

    selected = select_shards(corpus, records=NoDeletes(corpus.storage))
    assert (selected.states, selected.calls) == (["done"], ["00000"])


def test_a_commit_whose_answer_was_lost_is_not_worked_on_again(corpus: Corpus) -> None:
    def answer_lost(work: Work) -> Work:
        def call(task: ShardTask) -> ShardRecord:
            work(task)
            raise OSError("connection reset")

        return call

    selected = select_shards(corpus, answer_lost)
    assert (selected.states, selected.calls) == (["done"], ["00000"])
    assert corpus.storage.list("records/attempts") == []


def test_an_error_of_the_run_is_raised_and_quarantines_nothing(corpus: Corpus) -> None:
    with pytest.raises(CapfiltError, match="other weights"):
        select(corpus, CapfiltError("other weights"))
    assert corpus.records.quarantined() == {}


@pytest.mark.parametrize(("outages", "patience_s"), [(3, 60.0), (3, 0.0), (10_000, 0.2)])
def test_a_storage_that_does_not_answer_is_waited_for(
    corpus: Corpus, outages: int, patience_s: float
) -> None:
    class Away(Records):
        left = outages

        def read(self, stage: Stage, source: str, shard: str) -> ShardRecord | None:
            if self.left:
                self.left -= 1
                raise TimeoutError("the bucket does not answer")
            return super().read(stage, source, shard)

    outcomes: list[ShardOutcome] = []
    told: list[str] = []
    runner = ShardRunner(
        "select",
        RunSettings(config=patient(corpus.config, patience_s), models={}, run_id=RUN),
        note=outcomes.append,
        report_state=lambda stage, state: None,
        report_away=lambda _, error: told.append(error),
        pauses_s=(0.01,),
    )
    runner.records = Away(corpus.storage)
    shard = corpus.records.url_shards()["cc", "00000"]
    if (outages, patience_s) == (3, 60.0):
        runner.run_shard("web", shard)
        assert [outcome.state for outcome in outcomes] == ["done"]
        assert told == ["TimeoutError: the bucket does not answer"] * 3 + [""]
    else:
        error = TryAgainLaterError if patience_s else TimeoutError
        with pytest.raises(error, match="the bucket does not answer"):
            runner.run_shard("web", shard)
        assert outcomes == [] and "" not in told
    assert corpus.records.quarantined() == {}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ESTALE])
def test_a_disk_that_is_full_or_away_is_waited_for_and_charges_no_shard(corpus: Corpus, number: int) -> None:
    failures = [OSError(number, os.strerror(number)) for _ in range(corpus.config.cluster.max_attempts + 2)]
    outcome, loads = select(corpus, *failures)
    assert (outcome.state, loads) == ("done", 1)
    assert corpus.storage.list("records/attempts") == []


def test_what_a_disk_cannot_read_is_its_shards_fault(corpus: Corpus) -> None:
    outcome, _ = select(corpus, *(OSError(errno.EIO, os.strerror(errno.EIO)) for _ in range(3)))
    assert outcome.state == "quarantined" and "Input/output error" in outcome.error


def test_attempts_on_nodes_that_are_gone_do_not_count(corpus: Corpus) -> None:
    attempts = 14
    for number in range(attempts):
        corpus.records.attempts("select", "cc", "00000", RUN).begin(is_retry=True, node=f"node{number}")
    gone = {f"node{number}" for number in range(attempts)}
    selected = select_shards(corpus, node=Node(name="here", gone=gone.intersection, noticed_s=0))
    assert selected.states == ["done"] and corpus.storage.list("records/attempts") == []


def test_a_node_that_is_noticed_late_does_not_count_either(corpus: Corpus) -> None:
    for number in range(3):
        corpus.records.attempts("select", "cc", "00000", RUN).begin(is_retry=True, node=f"node{number}")
    answers = iter([set(), {"node1"}])
    selected = select_shards(corpus, node=Node(name="here", gone=lambda _: next(answers), noticed_s=0))
    assert selected.states == ["done"]


def test_a_shard_that_kills_its_workers_on_living_nodes_is_quarantined(corpus: Corpus) -> None:
    for number in range(3):
        corpus.records.attempts("select", "cc", "00000", RUN).begin(is_retry=True, node=f"node{number}")
    selected = select_shards(corpus, node=Node(name="here", noticed_s=0))
    assert selected.states == ["quarantined"] and selected.calls == []


def test_a_run_gives_up_where_too_many_shards_fail() -> None:
    counter = ProgressCounter()

    def finish(number: int, state: str) -> bool:
        counter.note(ShardOutcome(stage="crawl", source="cc", shard=f"{number:05d}", state=state))
        return RunMonitor.has_failed_too_often(counter.snapshot())

    assert [finish(number, "quarantined") for number in range(21)] == [False] * 20 + [True]
    finish(20, "quarantined")
    assert counter.snapshot().failed == 21, "a shard counts once"
    # More than twenty may fail where they are no more than one in twenty of the finished shards.
    assert [finish(number, "done") for number in range(21, 420)][-2:] == [True, False]
