"""Waiting for a storage, or a node, that is away: growing pauses, told once, up to a limit."""

import itertools
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from pipeline.faults import is_waited_for
from pipeline.storage.call_counts import CALLS, RETRIES
from pipeline.storage.errors import storage_error_message
from schemas.errors import TryAgainLaterError, first_line

T = TypeVar("T")

PAUSES_S = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
# How often a pause looks whether it is to end.
_LOOK_S = 0.2


class Patience:
    """Repeats calls that fail through the storage's or the node's fault; threads may share it.

    Args:
        limit_s: how long a call may go on failing; 0: not at all.
        tell: called with what is away, at each pause anew, and with nothing once the last waiting call has succeeded.
        is_stopping: asked while it waits: nothing is waited for any more.
        pauses_s: before the second try and so on; the last one stays.
    """

    def __init__(
        self,
        limit_s: float,
        tell: Callable[[str], object] = lambda _: None,
        is_stopping: Callable[[], bool] = lambda: False,
        pauses_s: Sequence[float] = PAUSES_S,
    ) -> None:
        self._limit_s, self._tell, self._is_stopping, self._pauses_s = limit_s, tell, is_stopping, pauses_s
        self._lock = threading.Lock()
        self._waiting = 0

    def call(self, function: Callable[[], T], *, is_writing: bool = False) -> T:
        """Return what the function returns, once it fails through nobody else's fault; it is called again until then.

        Raises TryAgainLaterError at the limit, and at once what the function raises through a fault of its own.
        """
        try:
            return function()
        except Exception as error:
            if not is_waited_for(error, is_writing=is_writing) or not self._limit_s or self._is_stopping():
                raise
            away = _line(error)
        return self._call_again(function, away, is_writing)

    def _call_again(self, function: Callable[[], T], away: str, is_writing: bool) -> T:
        since = time.monotonic()
        self._begin_waiting()
        for pause_s in itertools.chain(self._pauses_s, itertools.repeat(self._pauses_s[-1])):
            self._tell(away)
            CALLS.add(RETRIES)
            # By chance, so that hundreds of workers do not come back in the same second.
            self._pause(min(pause_s * random.uniform(0.5, 1.0), since + self._limit_s - time.monotonic()))
            try:
                result = function()
            except Exception as error:
                if not is_waited_for(error, is_writing=is_writing):
                    self._end_waiting()
                    raise
                away = _line(error)
                if self._is_stopping():
                    raise
                if time.monotonic() - since >= self._limit_s:
                    raise TryAgainLaterError(
                        f"{away}. Waited for {time.monotonic() - since:,.0f} s (cluster.storage_patience_s = "
                        f"{self._limit_s:g}); run the same command again later"
                    ) from error
            else:
                self._end_waiting()
                return result
        raise AssertionError

    def _begin_waiting(self) -> None:
        with self._lock:
            self._waiting += 1

    def _end_waiting(self) -> None:
        with self._lock:
            self._waiting -= 1
            if not self._waiting:
                self._tell("")

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._is_stopping() and (left_s := end - time.monotonic()) > 0:
            time.sleep(min(left_s, _LOOK_S))


NO_PATIENCE = Patience(0.0)


def _line(error: Exception) -> str:
    return storage_error_message(error) or f"{type(error).__name__}: {first_line(error)}"
