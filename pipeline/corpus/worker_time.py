"""The time of a worker, divided among the shards that it works on at once: what a shard cost adds up to what there was.

A worker of a GPU takes two shards: while one computes, the other is read, decoded or written. The sum of their wall
clocks is more than the worker's own.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from threading import Lock, get_ident


class WorkerTime:
    """At each moment, the time is divided evenly among the threads that are at work. One thread has one shard."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = Lock()
        self._at_work: set[int] = set()
        self._seconds: dict[int, float] = {}
        self._divided_until = clock()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Count the block, in this thread, from zero on."""
        self._seconds[get_ident()] = 0.0
        with self._at(work=True):
            yield

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Leave the time of the block to the other threads."""
        if get_ident() not in self._at_work:
            yield
            return
        with self._at(work=False):
            yield

    def seconds(self) -> float:
        """Return what this thread has got, since it last began to work."""
        with self._lock:
            self._divide()
            return self._seconds.get(get_ident(), 0.0)

    @contextlib.contextmanager
    def _at(self, *, work: bool) -> Iterator[None]:
        self._switch(work)
        try:
            yield
        finally:
            self._switch(not work)

    def _switch(self, to_work: bool) -> None:
        with self._lock:
            self._divide()
            (self._at_work.add if to_work else self._at_work.discard)(get_ident())

    def _divide(self) -> None:
        now = self._clock()
        for thread in self._at_work:
            self._seconds[thread] += (now - self._divided_until) / len(self._at_work)
        self._divided_until = now


# A worker is a process.
WORKER_TIME = WorkerTime()
