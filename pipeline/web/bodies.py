"""The bodies of answers, in memory: all those of a crawled shard together have a bound."""

import io
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from pipeline.web.urls import FetchError

_MAX_BYTES = 32_000_000


class BodyMemory(AbstractContextManager["BodyMemory", None]):
    """A bound on the bytes of all bodies that are being received or wait for the decoder; shared by threads.

    A body takes its bytes as they arrive, so that neither a declared length nor a slow server holds more than it sent.
    At the bound a body waits until others are decoded. One body at a time may grow beyond it: else bodies that are all
    unfinished would wait for one another for ever. So the bytes are at most ``max_bytes`` and one whole body.

    Use as a context manager: after it no body grows any more, and those that wait give up.
    """

    def __init__(self, max_bytes: int = _MAX_BYTES) -> None:
        self._max_bytes, self._used = max_bytes, 0
        self._changed = threading.Condition()
        self._beyond: Body | None = None
        self._is_over = False

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def take(self, body: "Body", size: int) -> None:
        """Wait until ``body`` may grow by ``size`` bytes. Raises FetchError where nobody needs it any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._fits(size) or self._beyond in (None, body))
            if self._is_over:
                raise FetchError("timeout", "the crawl of its shard has ended", again=False)
            if not self._fits(size):
                self._beyond = body
            self._used += size

    def _fits(self, size: int) -> bool:
        return self._used + size <= self._max_bytes

    def free(self, body: "Body", size: int) -> None:
        """Give back the bytes of a body that is closed."""
        with self._changed:
            self._used -= size
            if self._beyond is body:
                self._beyond = None
            self._changed.notify_all()


class Body(io.BytesIO):
    """The bytes of one answer; frees its part of the memory when it is closed.

    Args:
        on_wait: called with the seconds that a write waited for memory.
    """

    def __init__(self, memory: BodyMemory, on_wait: Callable[[float], None]) -> None:
        super().__init__()
        self._memory, self._on_wait, self._taken = memory, on_wait, 0

    def write(self, chunk: Any) -> int:
        """Append a chunk, once there is memory for it."""
        started = time.monotonic()
        self._memory.take(self, len(chunk))
        self._taken += len(chunk)
        self._on_wait(time.monotonic() - started)
        return super().write(chunk)

    def take(self) -> bytes:
        """Return the bytes and hold them no longer; they count until the body is closed."""
        data = self.getvalue()
        self.seek(0)
        self.truncate()
        return data

    def close(self) -> None:
        if not self.closed:
            self._memory.free(self, self._taken)
        super().close()
