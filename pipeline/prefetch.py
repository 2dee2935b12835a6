"""Work on threads, bounded: images are decoded while the model computes, and fetched while others are decoded."""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import islice
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
U = TypeVar("U")

# Of the items that may be begun ahead, so many batches.
_BATCHES_AHEAD = 8
# Sixteen threads decode ten times as many images as a GPU captions.
_MOST_THREADS = 16


def decode_threads(cpus: float, *, feeds_gpu: bool) -> int:
    """Return how many threads decode for a worker that reserved ``cpus``.

    A worker on the CPU takes what it reserved, because its cores are busy computing. A worker on a GPU leaves its cores
    idle, so it takes as many as the process may use; idle threads cost nothing.
    """
    reserved = max(1, int(cpus))
    if not feeds_gpu:
        return reserved
    return max(reserved, min(len(os.sched_getaffinity(0)), _MOST_THREADS))


def prefetch_map(
    work: Callable[[T], U], items: Iterable[T], ahead: int, threads: int
) -> Generator[U, None, None]:
    """Yield ``work(item)`` for each item, in order, at most ``ahead`` begun before they are asked for.

    Memory is bounded by ``threads`` calls under way and ``ahead`` results. An exception of ``work`` is raised where its
    result would have been yielded.
    """
    items = iter(items)
    with ThreadPoolExecutor(max(1, threads)) as pool:
        pending: deque[Future[U]] = deque(pool.submit(work, item) for item in islice(items, max(1, ahead)))
        try:
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(work, item) for item in islice(items, 1))
                yield result
        finally:
            for future in pending:
                future.cancel()


def in_batches(
    items: Iterable[T], size: int, waiting: Callable[[], AbstractContextManager[object]]
) -> Iterator[list[T]]:
    """Yield the items in lists of ``size``, the last one shorter; ``waiting()`` is open while a list fills."""
    items = iter(items)
    while True:
        with waiting():
            batch = list(islice(items, size))
        if not batch:
            return
        yield batch


def run_steps(items: Sequence[Any], steps: Sequence[tuple[Callable[[Any], Any], int]], ahead: int) -> None:
    """Pass each item through the steps, each a function and its number of threads; return when all have passed.

    At most ``ahead`` items are begun and not yet done. The first exception of a step is raised here. The threads are
    daemons and are not waited for: a caller that is interrupted leaves the calls under way to end by themselves.
    """
    if items:
        _Steps(items, steps, ahead).run()


class _Steps:
    """The queues between the steps. The caller's thread waits once, not for each item: waking it costs a switch."""

    def __init__(
        self, items: Sequence[Any], steps: Sequence[tuple[Callable[[Any], Any], int]], ahead: int
    ) -> None:
        self._steps, self._ahead = steps, ahead
        self._rest, self._not_done = iter(items), len(items)
        # Items are begun several at a time: one by one, each would find the caches full of the other steps' data.
        self._batch, self._to_begin = max(1, ahead // _BATCHES_AHEAD), 0
        self._lock = threading.Lock()
        self._queues: list[SimpleQueue[Any]] = [SimpleQueue() for _ in steps]
        # Of None, or of the exception that ended the work.
        self._end: SimpleQueue[BaseException | None] = SimpleQueue()
        self._is_over = False

    def run(self) -> None:
        for item in islice(self._rest, self._ahead):
            self._queues[0].put(item)
        for number, (_, threads) in enumerate(self._steps):
            for _ in range(threads):
                threading.Thread(target=self._work, args=(number,), daemon=True).start()
        try:
            if (fault := self._end.get()) is not None:
                raise fault
        finally:
            self._is_over = True
            for (_, threads), queue in zip(self._steps, self._queues, strict=True):
                for _ in range(threads):
                    queue.put(None)

    def _work(self, number: int) -> None:
        """Do one step of the items that come, until None does."""
        work, inbox = self._steps[number][0], self._queues[number]
        next_put = self._queues[number + 1].put if number + 1 < len(self._steps) else self._done
        try:
            while (item := inbox.get()) is not None and not self._is_over:
                next_put(work(item))
        except BaseException as error:
            self._end.put(error)

    def _done(self, _: Any) -> None:
        """Begin others in the place of those that are done, once they are a batch."""
        with self._lock:
            self._not_done -= 1
            self._to_begin += 1
            if self._to_begin == self._batch:
                for item in islice(self._rest, self._batch):
                    self._queues[0].put(item)
                self._to_begin = 0
            if not self._not_done:
                self._end.put(None)
