"""Calls that run together in one process, and the one that must run alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition


class Calls:
    """A readers-writer lock: any number of calls together, or one alone, which the others then wait for."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._together = 0
        self._asked_alone = 0
        self._is_alone = False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run beside others, once nobody is or waits to be alone."""
        with self._changed:
            self._changed.wait_for(lambda: not self._asked_alone)
            self._together += 1
        try:
            yield
        finally:
            with self._changed:
                self._together -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Run once all others have ended, and let none begin meanwhile."""
        with self._changed:
            self._asked_alone += 1
            self._changed.wait_for(lambda: not self._together and not self._is_alone)
            self._is_alone = True
        try:
            yield
        finally:
            with self._changed:
                self._is_alone = False
                self._asked_alone -= 1
                self._changed.notify_all()
