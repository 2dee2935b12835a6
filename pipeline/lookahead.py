"""Work done ahead of its use, in order, on threads: images are decoded while the model computes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def look_ahead(work: Callable[[T], U], items: Iterable[T], ahead: int, threads: int) -> Iterator[U]:
    """Yield ``work(item)`` for each item, in order, at most ``ahead`` begun before they are asked for.

    An exception of ``work`` is raised where its result would have been.
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
