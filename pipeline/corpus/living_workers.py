"""How many workers of one kind are at work on a corpus now, over all runs, nodes and clusters: each keeps a file fresh.

    records/at-work/crawl/<id>        written again while its worker works; dead once it is not

The storage's clock alone decides what is fresh, so the clocks of the nodes do not matter.
"""

import atexit
import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta

from pipeline.storage.storage import Storage

AT_WORK_FOLDER = "records/at-work"

_EVERY_S = 20.0
_DEAD_AFTER = 3
# What a killed worker has left is in nobody's way: the others remove it at leisure.
_REMOVED_AFTER = 30
_LEAVE_S = 5.0


class LivingWorkers:
    """One worker of many: says that it works, and learns how many do.

    Args:
        kind: which workers are counted together.
        tell: called with their number, this one included, each time that it was counted.
        every_s: seconds between two counts.
    """

    def __init__(
        self, storage: Storage, kind: str, tell: Callable[[int], None], every_s: float = _EVERY_S
    ) -> None:
        self._storage = storage
        self._folder = f"{AT_WORK_FOLDER}/{kind}"
        self._path = f"{self._folder}/{uuid.uuid4().hex}"
        self._tell = tell
        self._every_s = every_s
        self._working = 0
        self._next_count = 0.0
        # Set while nobody works; ends the wait between two counts.
        self._idle = threading.Event()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Count as a living worker while the block runs, and up to a minute longer."""
        with self._lock:
            self._working += 1
            if self._working == 1:
                self._idle = threading.Event()
                threading.Thread(target=self._count_while_working, args=(self._idle,), daemon=True).start()
        try:
            yield
        finally:
            with self._lock:
                self._working -= 1
                if not self._working:
                    self._idle.set()

    def _count_while_working(self, idle: threading.Event) -> None:
        while not idle.wait(max(0.0, self._next_count - time.monotonic())):
            if not self._next_count:
                atexit.register(self._leave)
            self._next_count = time.monotonic() + self._every_s
            # A storage that does not answer now is the work's problem: the shares stay as they are.
            with contextlib.suppress(Exception):
                self.count()

    def _leave(self) -> None:
        """Remove the file, if the storage answers soon; one that is away must not keep this process from its end."""
        leaving = threading.Thread(target=self._remove, daemon=True)
        leaving.start()
        leaving.join(_LEAVE_S)

    def _remove(self) -> None:
        with contextlib.suppress(Exception):
            self._storage.delete(self._path)

    def count(self) -> None:
        """Say that this worker works, and tell how many do."""
        self._storage.write(self._path, b"")
        files = self._storage.list(self._folder)
        now = next(info.modified for info in files if info.path == self._path)
        ages = {info.path: now - info.modified for info in files}
        for path, age in ages.items():
            if age > timedelta(seconds=_REMOVED_AFTER * self._every_s):
                self._storage.delete(path)
        self._tell(sum(age <= timedelta(seconds=_DEAD_AFTER * self._every_s) for age in ages.values()))
