"""Items that pass through steps on threads."""

import threading
import time

import pytest

from pipeline.prefetch import run_steps


# Of 5 ahead each is begun by itself, of 50 six at a time.
@pytest.mark.parametrize("ahead", [5, 50])
@pytest.mark.parametrize("items", [0, 1, 500])
def test_each_item_passes_once_and_few_are_under_way(items: int, ahead: int) -> None:
    lock, under_way, most = threading.Lock(), 0, 0
    done: list[int] = []

    def begin(item: int) -> int:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        return item * 2

    def end(item: int) -> None:
        nonlocal under_way
        with lock:
            under_way -= 1
            done.append(item)

    run_steps(range(items), [(begin, 16), (end, 2)], ahead)
    assert sorted(done) == [2 * item for item in range(items)] and most <= ahead


def test_items_are_begun_several_at_a_time() -> None:
    begun, ended = list[int](), list[int]()
    counts: list[tuple[int, int]] = []

    def end(item: int) -> None:
        ended.append(item)
        counts.append((len(begun), len(ended)))

    run_steps(range(100), [(lambda item: begun.append(item) or item, 4), (end, 1)], 32)
    # Four in the place of four that are done.
    assert len(begun) == 100 and all(before <= 32 + 4 * (after // 4) for before, after in counts)


@pytest.mark.parametrize("faulty", [0, 1])
def test_an_exception_of_a_step_ends_the_work(faulty: int) -> None:
    begun: list[int] = []

    def step(number: int, item: int) -> int:
        if number == 0:
            begun.append(item)
        if number == faulty and item == 30:
            raise OSError("disk full")
        return item

    steps = [(lambda item: step(0, item), 2), (lambda item: step(1, item), 1)]
    before = threading.active_count()
    with pytest.raises(OSError, match="disk full"):
        run_steps(range(10_000), steps, 4)
    assert len(begun) < 10_000
    deadline = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < deadline, "threads are left"
        time.sleep(0.01)
