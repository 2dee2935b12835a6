"""Workers that share a host's limits: they are counted over runs, and each takes its part."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

from pipeline.corpus.garbage_collection import find_orphans
from pipeline.corpus.living_workers import AT_WORK_FOLDER, LivingWorkers
from pipeline.corpus.records import Records
from pipeline.storage.storage import Storage
from pipeline.web.host_limits import HostLimits
from tests.corpora import make_corpus


def test_workers_of_all_runs_are_counted_and_dead_ones_are_not(tmp_path: Path) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"), shards=1)
    folder = tmp_path / "corpus" / AT_WORK_FOLDER / "crawl"
    told: dict[str, list[int]] = {"a": [], "b": []}
    one, other = (LivingWorkers(Storage(corpus.root), "crawl", told[name].append) for name in told)
    one.count()
    [first] = [path.name for path in folder.iterdir()]
    other.count()
    one.count()
    assert told == {"a": [1, 2], "b": [2]}
    # The other stopped two minutes ago, by the storage's clock; after eleven minutes its file goes.
    [its_file] = [path for path in folder.iterdir() if path.name != first]
    for minutes, files in ((2, 2), (11, 1)):
        then = time.time() - 60 * minutes
        os.utime(its_file, (then, then))
        one.count()
        assert told["a"][-1] == 1 and len([*folder.iterdir()]) == files


def test_a_worker_counts_while_it_works_and_no_longer(tmp_path: Path) -> None:
    told: list[int] = []
    counted = threading.Event()

    def tell(workers: int) -> None:
        told.append(workers)
        counted.set()

    living = LivingWorkers(Storage(str(tmp_path)), "crawl", tell, every_s=0.01)
    with living.at_work():
        for _ in range(3):
            counted.clear()
            assert counted.wait(30)
    # One count may be under way.
    time.sleep(0.1)
    number = len(told)
    time.sleep(0.2)
    assert len(told) == number and set(told) == {1}
    with living.at_work():
        counted.clear()
        assert counted.wait(30)


def test_what_is_left_of_killed_workers_is_removed_by_gc(tmp_path: Path) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"), shards=1)
    LivingWorkers(corpus.storage, "crawl", lambda _: None).count()
    left = find_orphans(Records(corpus.storage), older_than=timedelta(seconds=-5))
    assert [file.path.rpartition("/")[0] for file in left if "at-work" in file.path] == [
        f"{AT_WORK_FOLDER}/crawl"
    ]


def test_a_share_grows_for_those_that_wait_and_shrinks() -> None:
    limits = HostLimits(at_once=4, per_second=1e6, workers=4)
    inside, most, release = [], [], threading.Event()
    lock = threading.Lock()

    def ask() -> None:
        with limits.slot("a.b"):
            with lock:
                inside.append(1)
                most.append(len(inside))
            release.wait(30)
            with lock:
                inside.pop()

    with ThreadPoolExecutor(6) as threads:
        asked = [threads.submit(ask) for _ in range(6)]
        deadline = time.monotonic() + 30
        while len(inside) < 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert len(inside) == 1
        limits.share(2)
        while len(inside) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert len(inside) == 2
        limits.share(4)
        release.set()
        for each in asked:
            each.result()
    assert max(most) == 2 and len(most) == 6
