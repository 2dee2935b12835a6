"""What a corpus cost: the share of a device, the attempts that were lost, and the prices of the config."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.corpus.worker_time import WorkerTime
from pipeline.manifest import status
from pipeline.manifest.compaction import CompactedRecords
from pipeline.manifest.manifest import Manifest
from pipeline.runs.events import ShardEvent
from pipeline.runs.runner import RunSettings, ShardRunner, load_worker
from schemas.json_record import utc_now
from schemas.records import RunRecord, WorkerShare
from tests.corpora import RUN, Corpus
from tests.runs import with_values

FIFTH = WorkerShare(cpus=2.0, gpus=0.2, node_type="H100")


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """A corpus of one shard whose selection is to be done."""
    corpus = Corpus(str(tmp_path / "corpus"))
    corpus.add_urls("cc", ["00000"], images=6)
    corpus.make("cc", "00000", ("crawl", "caption", "rank"))
    return corpus


def start_run(corpus: Corpus, prices: dict[str, float], run_id: str = RUN) -> None:
    config = with_values(corpus.config, cluster={"prices": prices}).model_dump(mode="json")
    record = RunRecord(
        run_id=run_id,
        command="run",
        config=config,
        config_digest="0" * 64,
        started_at=utc_now(),
        host="here",
        versions={},
    )
    corpus.records.write_run(record)


def select(corpus: Corpus, *failures: Exception) -> list[ShardEvent]:
    """Select the shard with a worker of a fifth of a GPU whose first calls fail after a while; return the events."""
    left, events = list(failures), []

    def load(*arguments):
        work = load_worker(*arguments)

        def call(task):
            if left:
                time.sleep(0.05)
                raise left.pop(0)
            return work(task)

        return call

    runner = ShardRunner(
        "select",
        RunSettings(config=corpus.config, models={}, run_id=RUN, load=load),
        note=lambda outcome: None,
        report_state=lambda stage, state: None,
        log_event=events.append,
        share=FIFTH,
    )
    runner.run_shard("web", corpus.records.url_shards()["cc", "00000"])
    return events


def costs(corpus: Corpus, stage: str = "select") -> list[dict]:
    with Manifest(corpus.storage).open() as query:
        return query.rows("SELECT * FROM costs WHERE stage = $1", (stage,))


def test_a_worker_of_a_fifth_of_a_gpu_counts_as_a_fifth_and_lost_attempts_count(corpus: Corpus) -> None:
    start_run(corpus, {"H100": 2.5, "cpu": 0.04})
    # Killed before: it has a note, and nobody knows when it died.
    corpus.records.attempts("select", "cc", "00000", RUN).begin(is_retry=False, share=FIFTH)
    time.sleep(0.1)
    events = select(corpus, RuntimeError("no such file"))
    assert [(event.event, event.attempt, event.cause) for event in events] == [
        ("lost", 1, "killed"),
        ("retry", 2, ""),
        ("lost", 2, "failed"),
        ("retry", 3, ""),
        ("commit", 3, ""),
    ]
    record = corpus.records.read("select", "cc", "00000")
    assert (record.gpus, record.cpus, record.node_type) == (0.2, 2.0, "H100")
    assert 0 < record.seconds["worker"] < 60
    with Manifest(corpus.storage).open() as query:
        lost = query.rows("SELECT * FROM lost_attempts ORDER BY number")
    assert [(row["number"], row["cause"], row["gpus"]) for row in lost] == [
        (1, "killed", 0.2),
        (2, "failed", 0.2),
    ]
    assert lost[0]["seconds"] >= 0.1 and lost[1]["seconds"] >= 0.05
    assert lost[1]["error"].endswith("RuntimeError: no such file")
    committed, gone = costs(corpus)
    assert (committed["outcome"], gone["outcome"]) == ("committed", "lost")
    assert committed["worker_hours"] == pytest.approx(record.seconds["worker"] / 3600)
    assert committed["gpu_hours"] == pytest.approx(0.2 * committed["worker_hours"])
    assert gone["gpu_hours"] == pytest.approx(0.2 * sum(row["seconds"] for row in lost) / 3600)
    assert gone["cost"] == pytest.approx((0.2 * 2.5 + 2 * 0.04) * gone["worker_hours"])
    [run] = status.runs(Manifest(corpus.storage))
    assert run["gpu_hours"] == pytest.approx(committed["gpu_hours"] + gone["gpu_hours"], abs=1e-4)
    assert run["cost"] == pytest.approx(committed["cost"] + gone["cost"], abs=0.01)


def test_a_commit_at_the_first_attempt_leaves_nothing_behind(corpus: Corpus) -> None:
    assert [event.event for event in select(corpus)] == ["start", "commit"]
    assert corpus.storage.list("records/attempts") == corpus.storage.list("records/lost_attempts") == []


def test_what_a_stopped_run_had_begun_is_lost_up_to_its_end(corpus: Corpus) -> None:
    records = corpus.records
    start_run(corpus, {}, "stopped")
    records.attempts("select", "cc", "00000", "stopped").begin(is_retry=False, share=FIFTH)
    records.attempts("select", "cc", "00000", "alive").begin(is_retry=False, share=FIFTH)
    time.sleep(0.1)
    records.forget_settled({}, ended_run="stopped")
    records.forget_settled({}, ended_run="stopped")  # once
    [lost] = costs(corpus)
    assert (lost["run_id"], lost["outcome"], lost["attempts"]) == ("stopped", "lost", 1)
    assert lost["worker_hours"] >= 0.1 / 3600
    # The run that is killed says no end: what it had begun lasted until the shard was committed at most.
    select(corpus)
    records.forget_settled(records.shards())
    assert {(row["run_id"], row["outcome"]) for row in costs(corpus)} == {
        ("stopped", "lost"),
        ("alive", "lost"),
        (RUN, "committed"),
    }
    assert corpus.storage.list("records/attempts") == []


def test_attempts_of_a_quarantined_shard_count_once(corpus: Corpus) -> None:
    select(corpus, *(RuntimeError("no") for _ in range(3)))
    corpus.records.forget_settled({}, ended_run=RUN)
    assert [row["attempts"] for row in costs(corpus)] == [3]


def test_records_and_parts_of_an_earlier_version_are_read_and_their_share_is_that_of_the_config(
    corpus: Corpus,
) -> None:
    start_run(corpus, {})
    select(corpus)
    record = corpus.records.read("select", "cc", "00000")
    old = replace(record, seconds={"total": 7.2}, cpus=None, gpus=None, node_type=None)
    assert "gpus" not in old.to_json()
    corpus.storage.write(record.path, old.to_json().encode())
    corpus.manifest.compact()
    for info in corpus.storage.list("manifest/shards"):
        path = corpus.storage.url(info.path)
        pq.write_table(pq.read_table(path).drop_columns(["cpus", "gpus", "node_type"]), path)
    compacted = CompactedRecords(corpus.storage)
    [read] = compacted.shard_records(corpus.records.list_shards(("select",))).values()
    assert (read.gpus, read.fingerprint) == (None, record.fingerprint)
    [row] = costs(corpus)
    assert (row["worker_hours"], row["cpu_hours"], row["node_type"]) == (0.002, 0.002, "cpu")
    assert row["cost"] is None, "no run names prices"
    start_run(corpus, {"cpu": 5}, "99990101T000000-later")
    assert costs(corpus)[0]["cost"] == pytest.approx(0.01)


def test_a_workers_time_is_divided_among_its_shards() -> None:
    now = [0.0]
    time_of = WorkerTime(clock=lambda: now[0])
    got: dict[str, float] = {}
    steps = threading.Barrier(2)

    def second() -> None:
        steps.wait()
        with time_of.working():
            with time_of.waiting():  # the other one has the device
                steps.wait()
                steps.wait()
            steps.wait()
            steps.wait()
            got["second"] = time_of.seconds()
        steps.wait()

    thread = threading.Thread(target=second)
    thread.start()
    with time_of.working():
        now[0] = 4.0
        steps.wait()
        steps.wait()
        now[0] = 6.0
        steps.wait()
        steps.wait()  # the second one works again
        now[0] = 10.0
        steps.wait()
        steps.wait()
        got["first"] = time_of.seconds()
    thread.join()
    assert got == {"first": 8.0, "second": 2.0}
