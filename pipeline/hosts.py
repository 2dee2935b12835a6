"""Turns at a host: so many requests at once, so many a second."""

import contextlib
import threading
import time
from collections.abc import Iterator

_IDLE_HOSTS_KEPT = 4096


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
