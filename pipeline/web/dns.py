"""Look-ups of host names, each in a thread of its own, so that names which never answer hold up no other.

getaddrinfo has no time limit and cannot be stopped: for a name whose servers are silent it takes half a minute.
A fetch waits for its name only as long as for a connection, then leaves the look-up to end by itself. Meanwhile
nobody asks for that name again, and whoever needs it fails at once.
"""

import socket
import threading
import time
from concurrent.futures import Future
from typing import Any

SocketAddress = tuple[socket.AddressFamily, Any]

_ANSWER_FRESH_S = 300.0
_FAILURE_FRESH_S = 60.0
# A temporary failure that took longer has had its second try, by the system's resolver.
_QUICK_S = 2.0
_CACHED_NAMES = 50_000
_ROOM_TIMEOUT_S = 60.0


class Lookup:
    """The look-up of one name, shared by everyone who asks for it."""

    def __init__(self) -> None:
        self._answer: Future[list[SocketAddress]] = Future()
        self._started = time.monotonic()
        self._seconds = 0.0

    def run(self, host: str, port: int) -> None:
        """Ask the system's resolver."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            outcome: Any = [(family, address) for family, _, _, _, address in found]
        except Exception as error:
            outcome = error
        self._seconds = time.monotonic() - self._started
        if isinstance(outcome, Exception):
            self._answer.set_exception(outcome)
        else:
            self._answer.set_result(outcome)

    def result(self, timeout_s: float) -> list[SocketAddress]:
        """Return the addresses.

        Raises TimeoutError so long after the look-up began, however late one asks; else what getaddrinfo raised.
        """
        try:
            return self._answer.result(max(0.0, self._started + timeout_s - time.monotonic()))
        except TimeoutError:
            raise TimeoutError(f"no answer within {timeout_s:.3g} s") from None

    @property
    def under_way(self) -> bool:
        """Tell whether the answer is still awaited."""
        return not self._answer.done()

    @property
    def worth_another(self) -> bool:
        """Tell whether it failed in a way that another try right away may mend."""
        error = None if self.under_way else self._answer.exception()
        temporary = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
        return temporary and self._seconds < _QUICK_S

    @property
    def fresh(self) -> bool:
        """Tell whether nobody needs to ask again."""
        if self.under_way:
            return True
        kept_s = _ANSWER_FRESH_S if self._answer.exception() is None else _FAILURE_FRESH_S
        return not self.worth_another and time.monotonic() < self._started + self._seconds + kept_s


class Lookups:
    """The look-ups of one worker, under way and remembered.

    Args:
        at_once: how many may be under way, those that everyone gave up included.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._room = threading.Semaphore(at_once)
        self._lock = threading.Lock()
        self._lookups: dict[tuple[str, int], Lookup] = {}

    def of(self, host: str, port: int) -> Lookup:
        """Return the look-up of a name, begun now unless there is one. Raises TimeoutError for want of room."""
        if (known := self._known(host, port)) is not None:
            return known
        if not self._room.acquire(timeout=_ROOM_TIMEOUT_S):
            raise TimeoutError(f"not looked up: {self._at_once} names of other hosts do not answer")
        with self._lock:
            # Another thread may have begun it meanwhile.
            if (known := self._lookups.get((host, port))) is not None and known.fresh:
                self._room.release()
                return known
            if len(self._lookups) >= _CACHED_NAMES:
                self._lookups = {name: lookup for name, lookup in self._lookups.items() if lookup.under_way}
            lookup = self._lookups[host, port] = Lookup()
        thread = threading.Thread(target=self._run, args=(lookup, host, port), name="dns", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no thread left: wait for the answer here
            self._run(lookup, host, port)
        return lookup

    def _known(self, host: str, port: int) -> Lookup | None:
        with self._lock:
            known = self._lookups.get((host, port))
            return known if known is not None and known.fresh else None

    def _run(self, lookup: Lookup, host: str, port: int) -> None:
        try:
            lookup.run(host, port)
        finally:
            self._room.release()
