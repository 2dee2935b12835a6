"""How often this process asked its storages, and how often it had to ask again."""

from collections import Counter
from threading import Lock


class CallCounts:
    """Calls by operation, such as ``read`` and ``create``, and the repeated ones as ``retries``. For several threads.

    A call may be several requests (a file in parts), and what the client itself repeats is not seen here.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: Counter[str] = Counter()

    def add(self, operation: str) -> None:
        """Count one."""
        with self._lock:
            self._counts[operation] += 1

    def take(self) -> dict[str, int]:
        """Return what was counted since the last time."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return dict(counts)


RETRIES = "retries"
CALLS = CallCounts()
