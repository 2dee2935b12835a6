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


def pipelined(
    items: Sequence[T], steps: Sequence[tuple[Callable[[Any], Any], int]], ahead: int
) -> Generator[Any, None, None]:
    """Pass each item through the steps, each a function and its number of threads; yield results as they end.

    At most ``ahead`` items are begun and not yet yielded. An exception of a step is raised in its item's place. The
    threads are daemons and are not waited for: a consumer that stops early leaves the calls under way to end by
    themselves.
    """
    queues: list[SimpleQueue[Any]] = [SimpleQueue() for _ in range(len(steps) + 1)]
    is_over = threading.Event()
    rest = iter(items)
    for item in islice(rest, ahead):
        queues[0].put(item)
    for (work, count), inbox, outbox in zip(steps, queues, queues[1:], strict=False):
        for _ in range(count):
            threading.Thread(target=_work, args=(work, inbox, outbox, is_over), daemon=True).start()
    try:
        for _ in items:
            result = queues[-1].get()
            if isinstance(result, BaseException):
                raise result
            yield result
            for item in islice(rest, 1):
                queues[0].put(item)
    finally:
        is_over.set()
        for (_, count), inbox in zip(steps, queues, strict=False):
            for _ in range(count):
                inbox.put(None)


def _work(
    work: Callable[[Any], Any], inbox: SimpleQueue[Any], outbox: SimpleQueue[Any], is_over: threading.Event
) -> None:
    """Process items until None; pass on an exception, a step's own or that of a step before it."""
    while (item := inbox.get()) is not None and not is_over.is_set():
        try:
            outbox.put(item if isinstance(item, BaseException) else work(item))
        except BaseException as error:
            outbox.put(error)
