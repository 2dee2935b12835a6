"""Per-host limits: concurrent requests, requests per second, and a back-off for hosts that do not answer."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.web.urls import FetchError

_IDLE_HOSTS_KEPT = 4096
_FAILING_HOSTS_KEPT = 65_536

# Failures of the host itself: after any other one the host has answered.
_HOST_FAILURES = frozenset({"dns", "connect", "timeout"})
_DOWN_AFTER = 20
_MAX_DOWN_S = 600.0


class _Host:
    def __init__(self, lock: threading.Lock) -> None:
        # Waited for by who finds all slots in use.
        self.freed = threading.Condition(lock)
        self.in_use = 0
        self.users = 0
        self.next_start = 0.0


class HostLimits:
    """Limits concurrent requests and requests per second of each host; shared by the threads of one worker.

    Args:
        at_once, per_second: over all workers.
        workers: how many there are. Each keeps to an equal part, of the concurrent requests at least one.
    """

    def __init__(self, at_once: int, per_second: float, workers: int = 1) -> None:
        self._of_all = (at_once, per_second)
        self._lock = threading.Lock()
        self._hosts: dict[str, _Host] = {}
        self.share(workers)

    def share(self, workers: int) -> None:
        """Keep from now on to the part of one of so many workers."""
        at_once, per_second = self._of_all
        with self._lock:
            self._at_once = max(1, at_once // workers)
            self._interval_s = workers / per_second
            for host in self._hosts.values():
                host.freed.notify_all()

    @contextlib.contextmanager
    def slot(self, name: str) -> Iterator[float]:
        """Wait for a slot of a host's limits, hold it for the block, and yield the seconds waited."""
        queued = time.monotonic()
        with self._lock:
            if len(self._hosts) > _IDLE_HOSTS_KEPT:
                self._hosts = {name: host for name, host in self._hosts.items() if host.users}
            host = self._hosts.setdefault(name, _Host(self._lock))
            host.users += 1
            try:
                while host.in_use >= self._at_once:
                    host.freed.wait()
            except BaseException:
                host.users -= 1
                raise
            host.in_use += 1
            start = max(time.monotonic(), host.next_start)
            host.next_start = start + self._interval_s
        try:
            if (wait_s := start - time.monotonic()) > 0:
                time.sleep(wait_s)
            yield time.monotonic() - queued
        finally:
            with self._lock:
                host.users -= 1
                host.in_use -= 1
                host.freed.notify()


@dataclass(slots=True)
class _Failing:
    """A host's failures since it last answered."""

    since: float
    times: int = 0
    down_until: float = 0.0


class HostHealth:
    """Back-off for hosts that do not answer, so that a dead host costs a shard minutes; shared by a worker's threads.

    After 20 failures in a row a host gets no requests for as long as it has been failing, at most ten minutes: a host
    that hangs soon gets none, and a host that restarts within seconds loses hardly a URL. The next failure after
    that time starts the back-off again; any answer, of whatever status, ends it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hosts: dict[str, _Failing] = {}

    def check(self, name: str) -> None:
        """Raise FetchError where a host is down."""
        failing = self._hosts.get(name)
        if failing is not None and failing.down_until > time.monotonic():
            raise FetchError("host_down", f"{name}: {failing.times} failures in a row", again=False)

    @contextlib.contextmanager
    def watched(self, name: str, *, answers: bool = True) -> Iterator[None]:
        """Record success or failure of a block that contacts a host, by the FetchError that leaves it.

        ``answers``: whether the block's success means that the host answered; a look-up of its name does not.
        """
        started = time.monotonic()
        try:
            yield
        except FetchError as error:
            if error.reason in _HOST_FAILURES:
                self._failed(name, started)
            elif answers:
                self._answered(name)
            raise
        if answers:
            self._answered(name)

    def _answered(self, name: str) -> None:
        with self._lock:
            self._hosts.pop(name, None)

    def _failed(self, name: str, started: float) -> None:
        now_s = time.monotonic()
        with self._lock:
            if len(self._hosts) >= _FAILING_HOSTS_KEPT:
                self._hosts = {kept: host for kept, host in self._hosts.items() if host.down_until > now_s}
            failing = self._hosts.setdefault(name, _Failing(since=started))
            failing.times += 1
            if failing.times >= _DOWN_AFTER:
                failing.down_until = now_s + min(now_s - failing.since, _MAX_DOWN_S)
