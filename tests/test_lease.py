"""Two drivers of one run: one of them trains, on local disk and on S3; a dead one is not waited for.

GCS and Azure: ``tests/test_object_stores.py``.
"""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from jobs.run_record import begin_run
from pipeline.corpus.checkpoint_files import run_folder
from pipeline.storage.file_info import FileInfo
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from tests.corpora import make_corpus
from tests.small_stage import Kept, batches, config, make_loop
from tests.tiny_training import tiny_config
from training.checkpoint import read_model
from training.distributed import World
from training.lease import Lease, LeaseHolder, LostLeaseError, wait_until_free
from training.trainer.loop import TrainingStopped
from training.trainer.metrics import FILE, JsonLines
from training.trainer.run import pretrain

ELSEWHERE = replace(LeaseHolder.of_this_process("other"), machine="another", host="node7", pid=77)


_taken: list[Lease] = []


@pytest.fixture(autouse=True)
def no_heartbeats_afterwards() -> Iterator[None]:
    """Give back what a test took: its threads would go on asking the S3 server of other tests."""
    yield
    while _taken:
        _taken.pop().release()


def take(
    storage: Storage, run_id: str = "mine", log: Callable[[str], None] = print, **options: float
) -> Lease:
    _taken.append(Lease.take(storage, run_id, log=log, **options))
    return _taken[-1]


def hold(storage: Storage, number: int, holder: LeaseHolder = ELSEWHERE) -> None:
    storage.write(f"lease/{number:08d}.json", holder.to_json().encode())


def held(storage: Storage) -> list[str]:
    return [info.path for info in storage.list("lease") if info.path != "lease/clock"]


def test_a_second_driver_is_told_who_trains_and_until_when(root: str) -> None:
    storage = Storage(root)
    first = take(storage, "20261129T090000-aaaaaa")
    with pytest.raises(CapfiltError, match="another process trains this run") as refused:
        take(storage, "second")
    message = str(refused.value)
    assert "\n" not in message and message.startswith(f"{root}: ")
    assert f"process {os.getpid()} of " in message and "run 20261129T090000-aaaaaa, since 20" in message
    assert "its lease ends 20" in message and "set run.name to another" in message
    first.require()
    first.release()
    second = take(storage, "second")
    assert (first.number, second.number, held(storage)) == (1, 2, ["lease/00000002.json"])
    second.release()
    # A number above that of the checkpoint, though the files of the lease are gone.
    storage.delete("lease/00000002.json")
    assert take(storage, above=second.number).number == 3


def _take_and_say(root: str, said: multiprocessing.Queue) -> None:
    said.put(take(Storage(root), "killed").number)
    time.sleep(600)


def test_a_killed_driver_of_this_machine_is_not_waited_for(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    said = context.Queue()
    process = context.Process(target=_take_and_say, args=(str(tmp_path), said))
    process.start()
    assert said.get() == 1
    with pytest.raises(CapfiltError, match=f"process {process.pid} of .*, run killed"):
        take(Storage(str(tmp_path)))
    os.kill(process.pid, signal.SIGKILL)
    # Not yet waited for by its parent, it is a zombie, and as dead.
    while (lives := LeaseHolder.from_json((tmp_path / "lease/00000001.json").read_text()).lives()) is True:
        time.sleep(0.01)
    assert lives is False
    assert take(Storage(str(tmp_path)), expires_s=1e6).number == 2
    process.join()
    # Another process that got its number is not it.
    hold(Storage(str(tmp_path)), 3, replace(LeaseHolder.of_this_process("x"), process_start=1))
    assert take(Storage(str(tmp_path)), expires_s=1e6).number == 4


def test_a_driver_elsewhere_that_sends_no_heartbeat_is_succeeded(root: str) -> None:
    storage = Storage(root)
    hold(storage, 4)
    told: list[str] = []
    lease = take(storage, "mine", log=told.append, heartbeat_s=1.0, expires_s=3.0)
    assert lease.number == 5 and held(storage) == ["lease/00000005.json"]
    (line,) = told
    assert "process 77 of node7, run other" in line and "waiting" in line


def test_one_that_sends_heartbeats_is_not(root: str) -> None:
    storage = Storage(root)
    hold(storage, 4)
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(0.5):
            hold(storage, 4)

    living = threading.Thread(target=live)
    living.start()
    try:
        with pytest.raises(CapfiltError, match="process 77 of node7"):
            wait_until_free(storage, "mine", log=print, heartbeat_s=1.0, expires_s=600.0)
    finally:
        ended.set()
        living.join()


class OtherClock(Storage):
    """A storage whose clock is three days ahead of this machine's."""

    def info(self, path: str) -> FileInfo:
        info = super().info(path)
        return info._replace(modified=info.modified + timedelta(days=3))


def _stop(line: str) -> None:
    raise TimeoutError(line)


def test_only_the_clock_of_the_storage_counts(root: str) -> None:
    hold(OtherClock(root), 1)
    with pytest.raises(TimeoutError, match="(89|90) s"):
        take(OtherClock(root), "mine", log=_stop)
    with pytest.raises(TimeoutError, match="(89|90) s"):
        take(Storage(root), "mine", log=_stop)
    time.sleep(2)
    assert take(OtherClock(root), "mine", log=_stop, expires_s=1).number == 2


def test_heartbeats_are_sent_until_the_lease_is_lost(root: str) -> None:
    storage = Storage(root)
    lease = take(storage, heartbeat_s=0.05)
    storage.delete("lease/00000001.json")
    while not held(storage):
        time.sleep(0.01)
    lease.check()
    hold(storage, 2)
    with pytest.raises(LostLeaseError, match=r"trains this run now \(process 77 of node7"):
        while True:
            lease.check()
            time.sleep(0.01)
    lease.release()
    assert json.loads(storage.read("lease/00000001.json"))["ended_at"] == ""


@pytest.mark.training
@pytest.mark.parametrize("asynchronous", [True, False])
def test_who_lost_the_lease_publishes_and_prunes_nothing(root: str, asynchronous: bool) -> None:
    settings = config(root, checkpoint={"every_steps": 2, "keep_last": 1, "asynchronous": asynchronous})
    loop = make_loop(settings, sinks=[Kept()])
    storage = loop.checkpoints.storage
    loop.checkpoints.lease = take(storage, above=6)
    lines = JsonLines(storage, 0, loop.checkpoints.lease)

    def lose() -> bool:
        if loop.step == 3:
            loop.checkpoints.wait()
            storage.write(FILE, b"of the other")
            hold(storage, 9)
        return False

    loop.stop_asked = lose
    with pytest.raises(TrainingStopped, match="trains this run now"):
        loop.run(batches())
    (kept,) = loop.checkpoints.committed()
    assert kept.step == 2 and loop.checkpoints.read(kept).progress.lease == 7
    folders = {info.path.partition("/")[0] for info in storage.list("") if "/" in info.path}
    assert folders == {kept.path, "lease"}
    if not storage.is_local:
        lines.close()
        assert storage.read(FILE) == b"of the other"


@pytest.mark.training
def test_two_drivers_of_one_run(root: str, tmp_path: Path) -> None:
    """The second one starts while the first one trains: the first goes on as if alone."""
    make_corpus(str(tmp_path / "corpus"))

    def settings(name: str, output: str) -> object:
        run = {"name": name, "output": output}
        return tiny_config(
            tmp_path, tmp_path / "corpus", run=run, checkpoint={"every_steps": 2, "keep_last": 9}
        )

    def drive(config: object, stop_asked: Callable[[], bool] = lambda: False) -> object:
        run = begin_run("pretrain", config)
        return pretrain(config, World(), run, stop_asked=stop_asked, log=print)

    alone = settings("alone", str(tmp_path / "alone"))
    drive(alone)
    shared = settings("shared", root)
    reached, refused = threading.Event(), threading.Event()
    asked: Iterator[int] = iter(range(100))
    ends: list[object] = []

    def wait_at_step_5() -> bool:
        if next(asked) == 4:
            reached.set()
            assert refused.wait(60)
        return False

    first = threading.Thread(target=lambda: ends.append(drive(shared, wait_at_step_5)))
    first.start()
    assert reached.wait(60)
    before = Storage(run_folder(shared)).list("")
    with pytest.raises(CapfiltError, match="another process trains this run"):
        drive(shared)
    after = Storage(run_folder(shared)).list("")
    assert [info for info in after if info.path != "lease/clock"] == before
    refused.set()
    first.join()
    assert ends[0].outcome == "done"

    def lines(config: object) -> list[tuple]:
        rows = Storage(run_folder(config)).read(FILE).decode().splitlines()
        return [(row["step"], row["loss"]) for row in map(json.loads, rows)]

    assert lines(shared) == lines(alone) and len(lines(shared)) == 8
    (_, state), (_, expected) = read_model(run_folder(shared)), read_model(run_folder(alone))
    assert all(state.model[name].equal(tensor) for name, tensor in expected.model.items())
