"""The bodies of a shard's answers: their bytes together are bounded, and nobody waits for ever."""

import threading

import pytest

from pipeline.web.bodies import Body, BodyMemory
from pipeline.web.urls import FetchError


def body(memory: BodyMemory) -> Body:
    return Body(memory, lambda _: None)


def test_bodies_that_grow_at_once_stay_within_the_bound_and_all_end() -> None:
    memory, most, lock = BodyMemory(100), [0], threading.Lock()
    held: dict[int, int] = {}
    together = threading.Barrier(10)

    def grow(number: int) -> None:
        growing = body(memory)
        for chunk in range(6):
            growing.write(bytes(10))
            with lock:
                held[number] = held.get(number, 0) + 10
                most[0] = max(most[0], sum(held.values()))
            if not chunk:
                together.wait(10)
        with lock:
            held[number] = 0
        growing.close()

    threads = [threading.Thread(target=grow, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    # All have ten bytes when each wants more: one may go on. The bound, and one whole body beyond it.
    assert 100 < most[0] <= 160


def test_the_time_that_a_body_waits_is_told() -> None:
    memory, waits = BodyMemory(10), list[float]()
    first, beyond, waiting = body(memory), body(memory), Body(memory, waits.append)
    first.write(bytes(10))
    beyond.write(bytes(10))
    threading.Timer(0.2, first.close).start()
    threading.Timer(0.2, beyond.close).start()
    waiting.write(bytes(10))
    assert 0.1 < sum(waits) < 10


def test_those_that_wait_give_up_when_the_crawl_ends() -> None:
    memory = BodyMemory(10)
    full, beyond = body(memory), body(memory)
    full.write(bytes(10))
    beyond.write(bytes(10))
    ended: list[FetchError] = []

    def wait() -> None:
        with pytest.raises(FetchError) as raised:
            body(memory).write(bytes(1))
        ended.append(raised.value)

    thread = threading.Thread(target=wait)
    with memory:
        thread.start()
    thread.join(10)
    assert [error.again for error in ended] == [False]


def test_bytes_that_are_taken_are_held_once_and_count_until_the_body_is_closed() -> None:
    memory = BodyMemory(10)
    taken, beyond = body(memory), body(memory)
    taken.write(b"0123456789")
    assert taken.take() == b"0123456789" and taken.getbuffer().nbytes == 0
    beyond.write(bytes(10))
    written = threading.Event()

    def wait() -> None:
        body(memory).write(bytes(10))
        written.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    assert not written.wait(0.2)
    taken.close()
    beyond.close()
    assert written.wait(10)
