"""Two shards at once in one worker: what overlaps, what comes out the same, and what one does to the other."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jobs.bench.fixtures.corpus import SOURCE, SyntheticCorpus
from pipeline.corpus.records import Records
from pipeline.models.weights import captioner_weights
from pipeline.runs.plan import ModelDigests
from pipeline.runs.progress import ShardOutcome
from pipeline.runs.runner import RunSettings, RWLock, ShardRunner
from pipeline.stages.caption import CaptionWorker
from schemas.config import CapfiltConfig
from schemas.records import ShardRecord, ShardTask
from schemas.stages import Stage
from tests.raw_shards import encoded, picture
from tests.runs import with_values
from tests.tiny_models import save_captioner

RUN = "20260101T000000-test"
# Longer than anything here takes: what does not happen by then will not.
PATIENCE_S = 60


# -- the readers-writer lock ---------------------------------------------------------------------------------


def test_readers_hold_the_lock_together() -> None:
    lock, both = RWLock(), threading.Barrier(2, timeout=PATIENCE_S)

    def work() -> None:
        with lock.shared():
            both.wait()

    in_two_threads(work, work)


def test_a_writer_waits_for_the_readers_and_comes_before_those_that_follow() -> None:
    lock, order = RWLock(), []
    inside, may_end = threading.Event(), threading.Event()

    def first() -> None:
        with lock.shared():
            inside.set()
            may_end.wait(PATIENCE_S)
            order.append("first")

    def writer() -> None:
        with lock.exclusive():
            order.append("writer")

    def later() -> None:
        with lock.shared():
            order.append("later")

    threads = [threading.Thread(target=first)]
    threads[0].start()
    inside.wait(PATIENCE_S)
    for work in (writer, later):
        threads.append(threading.Thread(target=work))
        threads[-1].start()
        wait_until(lambda: lock._waiting_writers == 1)
    assert order == []
    may_end.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert order == ["first", "writer", "later"]


def test_an_exception_releases_the_lock() -> None:
    lock = RWLock()
    for enter in (lock.shared, lock.exclusive):
        with pytest.raises(RuntimeError), enter():
            raise RuntimeError
    with lock.exclusive():
        pass
    with lock.shared():
        pass


# -- one runner, in two threads -------------------------------------------------------------------------------


class Watched(CaptionWorker):
    """A captioner that knows how many of its calls run, in whichever of its instances, and obeys a script."""

    running = 0
    most = 0
    loads = 0
    script: Callable[[str], None]
    _lock = threading.Lock()

    def __init__(self, config: CapfiltConfig, records: Records) -> None:
        super().__init__(config, records)
        Watched.loads += 1
        # The old weights must be out of use before the new ones take their memory.
        assert Watched.loads == 1 or Watched.running == 0

    def __call__(self, task: ShardTask) -> ShardRecord:
        with Watched._lock:
            Watched.running += 1
            Watched.most = max(Watched.most, Watched.running)
        try:
            Watched.script(task.shard)
            return super().__call__(task)
        finally:
            with Watched._lock:
                Watched.running -= 1


@pytest.fixture
def crawled(tmp_path: Path) -> SyntheticCorpus:
    """A corpus of two raw shards with six images each, and a tiny captioner for it."""
    pictures = [encoded(picture(seed)) for seed in range(5)]
    corpus = SyntheticCorpus(tmp_path, 12, samples_per_shard=8, pictures=pictures)
    assert corpus.shards == ["00000", "00001"]
    for shard in corpus.shards:
        corpus.crawl(shard)
    model = {"model": str(save_captioner(tmp_path / "captioner")), "batch_size": 2}
    corpus.config = with_values(corpus.config, caption=model)
    return corpus


@pytest.fixture
def watched() -> type[Watched]:
    Watched.running = Watched.most = Watched.loads = 0
    Watched.script = staticmethod(lambda shard: None)
    return Watched


def caption_both(corpus: SyntheticCorpus) -> dict[str, ShardOutcome]:
    """Have one runner caption both shards, each in a thread of its own, at once; return the outcomes."""
    outcomes: list[ShardOutcome] = []
    models: ModelDigests = {"caption": (captioner_weights(corpus.config.caption).digest,)}

    def load(stage: Stage, config: CapfiltConfig, records: Records) -> Watched:
        return Watched(config, records)

    runner = ShardRunner(
        "caption",
        RunSettings(config=corpus.config, models=models, run_id=RUN, load=load),
        note=outcomes.append,
        report_state=lambda stage, state: None,
    )
    shards = corpus.records.url_shards().values()
    in_two_threads(*(lambda urls=urls: runner.run_shard("web", urls) for urls in shards))
    return {outcome.shard: outcome for outcome in outcomes}


def test_two_calls_share_one_worker_and_its_captions_do_not_change(
    crawled: SyntheticCorpus, watched: type[Watched]
) -> None:
    both = threading.Barrier(2, timeout=PATIENCE_S)
    watched.script = staticmethod(lambda shard: both.wait())
    outcomes = caption_both(crawled)
    assert {shard: outcome.state for shard, outcome in outcomes.items()} == {"00000": "done", "00001": "done"}
    assert (watched.loads, watched.most) == (1, 2)
    by_itself = CaptionWorker(crawled.config, crawled.records)
    for shard in crawled.shards:
        together = crawled.records.read("caption", SOURCE, shard)
        crawled.records.retire(together)
        alone = by_itself(crawled.task("caption", shard, crawl=crawled.records.read("crawl", SOURCE, shard)))
        assert alone.attempt != together.attempt
        assert alone.outputs["parquet"].sha256 == together.outputs["parquet"].sha256


def test_a_shard_that_fails_leaves_the_other_undisturbed(
    crawled: SyntheticCorpus, watched: type[Watched]
) -> None:
    begun, failed = threading.Event(), threading.Event()

    def script(shard: str) -> None:
        if shard == "00001":
            # In the midst of the other one's work.
            assert begun.wait(PATIENCE_S)
            failed.set()
            raise RuntimeError("device-side assert")
        begun.set()
        assert failed.wait(PATIENCE_S)

    watched.script = staticmethod(script)
    outcomes = caption_both(crawled)
    done = outcomes["00000"]
    assert done.state == "done" and done.record is not None and done.record.images == 6
    assert outcomes["00001"].state == "quarantined" and "device-side assert" in outcomes["00001"].error
    assert watched.most == 2
    # Loaded anew for each further attempt, and never while the other shard used the old weights.
    assert watched.loads == crawled.config.cluster.max_attempts
    [(_, quarantine)] = crawled.records.quarantined().items()
    assert (quarantine.shard, quarantine.attempts) == ("00001", 3)


def test_what_died_with_its_worker_is_tried_again_alone(
    crawled: SyntheticCorpus, watched: type[Watched]
) -> None:
    # A worker that was killed leaves attempts that began and nothing else.
    for shard in crawled.shards:
        crawled.records.attempts("caption", SOURCE, shard, RUN).begin(is_retry=True)
    outcomes = caption_both(crawled)
    assert [outcome.state for outcome in outcomes.values()] == ["done", "done"]
    assert (watched.loads, watched.most) == (1, 1)


# -- aids ----------------------------------------------------------------------------------------------------


def in_two_threads(*works: Callable[[], Any]) -> None:
    with ThreadPoolExecutor(len(works)) as pool:
        for result in [pool.submit(work) for work in works]:
            result.result(PATIENCE_S)


def wait_until(condition: Callable[[], bool]) -> None:
    patience = threading.Event()
    while not condition():
        patience.wait(0.001)
