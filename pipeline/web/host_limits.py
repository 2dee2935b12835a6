"""Turns at a host, so many at once and so many a second; and hosts that are down, which are left alone."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.web.urls import FetchError

_IDLE_HOSTS_KEPT = 4096
_FAILING_HOSTS_KEPT = 65_536

# Failures of a host itself: whatever else it answers, it is there.
_HOST_FAILURES = frozenset({"dns", "connect", "timeout"})
_DOWN_AFTER = 20
_MAX_DOWN_S = 600.0


class _Host:
    def __init__(self, at_once: int) -> None:
        self.slots = threading.Semaphore(at_once)
        self.users = 0
        self.next_start = 0.0


class HostTurns:
    """Hands out turns; shared by the threads of one worker."""

    def __init__(self, at_once: int, per_second: float) -> None:
        self._at_once = at_once
        self._interval_s = 1.0 / per_second
        self._lock = threading.Lock()
        self._hosts: dict[str, _Host] = {}

    @contextlib.contextmanager
    def turn(self, name: str) -> Iterator[float]:
        """Wait for a turn at a host, hold it for the block, and yield the seconds waited."""
        asked = time.monotonic()
        with self._used(name) as host, host.slots:
            with self._lock:
                start = max(time.monotonic(), host.next_start)
                host.next_start = start + self._interval_s
            time.sleep(max(0.0, start - time.monotonic()))
            yield time.monotonic() - asked

    @contextlib.contextmanager
    def _used(self, name: str) -> Iterator[_Host]:
        with self._lock:
            if len(self._hosts) > _IDLE_HOSTS_KEPT:
                self._hosts = {name: host for name, host in self._hosts.items() if host.users}
            host = self._hosts.setdefault(name, _Host(self._at_once))
            host.users += 1
        try:
            yield host
        finally:
            with self._lock:
                host.users -= 1


@dataclass(slots=True)
class _Failing:
    """A host's failures since it last answered."""

    since: float
    times: int = 0
    down_until: float = 0.0


class HostHealth:
    """Knows which hosts are down, so that a dead one costs a shard minutes; shared by a worker's threads.

    A host that failed 20 times in a row is left alone for as long again as it has been failing, ten minutes at
    most: one that hangs is soon asked no more, and one that restarts within seconds loses hardly a URL. The
    next failure after that leaves it alone anew; one answer, of whatever status, and it is up.
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
        """Note how a block that asks a host ends: the FetchError that leaves it says so.

        ``answers``: that it did not fail means that the host answered; looking up its name does not.
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
        now = time.monotonic()
        with self._lock:
            if len(self._hosts) >= _FAILING_HOSTS_KEPT:
                self._hosts = {kept: host for kept, host in self._hosts.items() if host.down_until > now}
            failing = self._hosts.setdefault(name, _Failing(since=started))
            failing.times += 1
            if failing.times >= _DOWN_AFTER:
                failing.down_until = now + min(now - failing.since, _MAX_DOWN_S)
