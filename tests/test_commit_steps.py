"""Two attempts that replace one record, stopped at every step of both: no commit that was acknowledged is lost."""

import itertools
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from pipeline.corpus.commit import ShardCommit
from pipeline.corpus.records import Records
from pipeline.digests import sha256_file
from pipeline.storage.storage import Storage
from schemas.records import ShardRecord
from tests.test_records import make, task

_STEPS = ("read", "create", "swap", "put", "share", "delete")


class SteppedStorage(Storage):
    """Waits before each request until it may go on."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.may_go, self.has_stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.is_free = False

    def __getattribute__(self, name: str) -> object:
        if name in _STEPS:
            self.stop()
        return super().__getattribute__(name)

    def stop(self) -> None:
        self.has_stopped.release()
        if not self.is_free:
            self.may_go.acquire()


class Attempt:
    """An attempt in a thread of its own, one request at a time."""

    def __init__(self, root: str, replaces: ShardRecord, content: bytes, plain: bool) -> None:
        self.storage = SteppedStorage(root)
        self.commit = ShardCommit(Records(self.storage), self._task(root, replaces), plain_names=plain)
        self.acknowledged: ShardRecord | None = None
        self._content = content
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.storage.has_stopped.acquire()

    @staticmethod
    def _task(root: str, replaces: ShardRecord):
        return replace(task(root, "e" * 64), replaces=replaces)

    def _run(self) -> None:
        try:
            with self.commit as commit:
                (commit.folder / "out").write_bytes(self._content)
                self.acknowledged = commit.publish({"parquet": (commit.folder / "out", 1)})
        except RuntimeError as error:  # this attempt has failed, and says so: it is made again
            assert "retired meanwhile" in str(error)
        finally:
            self.storage.has_stopped.release()

    def go(self, steps: int) -> bool:
        """Let it make so many requests; tell whether there are more."""
        for _ in range(steps):
            if not self._thread.is_alive():
                return False
            self.storage.may_go.release()
            self.storage.has_stopped.acquire()
        return self._thread.is_alive()

    def finish(self) -> None:
        self.storage.is_free = True
        self.storage.may_go.release()
        self._thread.join(60)
        assert not self._thread.is_alive()


def orders() -> list[Callable[[Attempt, Attempt], bool]]:
    """Each way to stop the one, go some steps with the other, and finish either first."""

    def order(first: int, second: int, swapped: bool) -> Callable[[Attempt, Attempt], bool]:
        def run(one: Attempt, other: Attempt) -> bool:
            more = one.go(first) & other.go(second)
            for attempt in (other, one) if swapped else (one, other):
                attempt.finish()
            return more

        return run

    return [order(*steps) for steps in itertools.product(range(9), range(9), (False, True))]


@pytest.mark.parametrize("plain", [False, True], ids=["own names", "plain names"])
def test_no_acknowledged_commit_is_lost(tmp_path, plain: bool) -> None:
    for number, run in enumerate(orders()):
        root = str(tmp_path / f"{number}")
        records = Records(Storage(root))
        _, old = make(records, b"old", root, plain=plain)
        contents = (b"new", b"new") if plain else (b"one's", b"other's")
        attempts = [Attempt(root, old, content, plain) for content in contents]
        run(*attempts)
        standing = list(records.shards().values())
        known = {record.attempt for record in [*standing, *records.retired()]}
        acknowledged = {attempt.acknowledged.attempt for attempt in attempts if attempt.acknowledged}
        assert acknowledged and acknowledged | {old.attempt} <= known, number
        assert len(standing) == 1, number
        [file] = standing[0].outputs.values()
        with records.storage.local_copy(file.path) as path:
            assert sha256_file(path) == file.sha256, number
