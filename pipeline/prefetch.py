"""Prefetching on threads, in order: images are decoded while the model computes."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import islice
from typing import TypeVar

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
