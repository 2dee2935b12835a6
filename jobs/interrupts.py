"""Requests to stop: Ctrl-C (SIGINT), or a scheduler, a spot machine, ``ray job stop`` (SIGTERM)."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_ENDS_AT_ONCE = 3
# Until a destructor that swallowed a KeyboardInterrupt is surely left.
_AGAIN_S = 0.1
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Interrupts:
    """While it is entered, SIGINT and SIGTERM are said at once and raise KeyboardInterrupt.

    The first asks for an orderly end. The second raises again, so that what the end waits for is left. The third
    ends the process. Work that asks ``asked`` between its steps is not interrupted by the first. A signal that is
    ignored (``nohup``, a background job) stays ignored. Outside the main thread, where no handler can be set,
    nothing changes.

    Args:
        first: what becomes of the work, and what a second signal does: for the line that the first one prints.
        second: what the second signal prints.
        quiet: print nothing: another process does.
        once: only the first signal counts: a launcher and its scheduler may both send it, and end what takes too long.
    """

    def __init__(self, first: str = "", second: str = "", quiet: bool = False, once: bool = False) -> None:
        self._words = (first, second)
        self._is_quiet, self._is_once = quiet, once
        self.count = 0
        self.number = int(signal.SIGINT)
        self._is_ignored = False
        self._is_polled = False
        self._is_delayed = False
        self._pass_on: Callable[[], None] | None = None
        self._again: threading.Timer | None = None
        self._grace_s = 0.0

    @property
    def exit_code(self) -> int:
        """Return what a shell calls a process that the signal ended: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number

    def __enter__(self) -> Self:
        # Of its own: Ray's start is silenced by pointing descriptor 2 elsewhere.
        self._stderr = os.dup(2)
        self._before: dict[int, Any] = {}
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._handle_unraisable
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in SIGNALS}
            self._before = {
                number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN
            }
            self.listen()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._cancel_again()
        sys.unraisablehook = self._unraisable
        os.close(self._stderr)

    def listen(self) -> None:
        """Take the signals; again after a library has set handlers of its own."""
        for number in self._before:
            signal.signal(number, self.handle)

    @contextlib.contextmanager
    def delayed(self) -> Iterator[None]:
        """Let the first signal wait for the end of the block: a library starts or ends that must not be cut short.

        Ray forks in its start, and what a signal raises in a fork's hooks is lost and leaves the lock of ``logging``
        taken. Nor can it take SIGTERM for itself, in Python or below it, to end the process.
        """
        set_handler = signal.signal

        def keep_sigterm(number: int, handler: Any) -> Any:
            return signal.getsignal(number) if number == signal.SIGTERM else set_handler(number, handler)

        signal.signal = keep_sigterm  # type: ignore[assignment]
        self._is_delayed = True
        try:
            yield
        finally:
            self._is_delayed = False
            signal.signal = set_handler
            self.listen()
        self._raise()

    @contextlib.contextmanager
    def ignored(self) -> Iterator[None]:
        """Let no further signal interrupt the block: it notes the end. The third still ends the process."""
        self._is_ignored = True
        try:
            yield
        finally:
            self._is_ignored = False

    def asked(self) -> bool:
        """Tell whether a signal came; once this was asked, the first signal waits for the next time."""
        self._is_polled = True
        return self.count > 0

    @contextlib.contextmanager
    def passed_on(self, call: Callable[[], None]) -> Iterator[None]:
        """Have signals call something instead of interrupting the block."""
        self._pass_on = call
        try:
            yield
        finally:
            self._pass_on = None

    @contextlib.contextmanager
    def graced(self, seconds: float) -> Iterator[None]:
        """Let the first signal interrupt the block so many seconds later, and a second one at once.

        The block ends by itself, before that, where it sees that ``count`` is not 0; it is interrupted then, too.
        """
        self._grace_s = seconds
        try:
            yield
        finally:
            self._grace_s = 0.0
            self._cancel_again()
        if self.count and seconds:
            raise KeyboardInterrupt

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """Handle one signal. Raises KeyboardInterrupt."""
        if self._again is not None:
            self._cancel_again()
            self._raise()
            return
        if self._is_once and self.count:
            return
        self.count += 1
        if self._is_delayed:
            signal.alarm(0)  # Ray's own handler, below Python, would abort the process after three seconds
        if self.count == 1:
            self.number = number
        if self.count >= _ENDS_AT_ONCE:
            os._exit(self.exit_code)
        words = self._words[self.count - 1]
        again = "" if self.count == 1 else " again"
        self.log(f"{_NAMES[signal.Signals(number)]}{again}: stopping{f'; {words}' if words else ''}")
        if self._pass_on is not None:
            self._pass_on()
        elif self._grace_s and self.count == 1:
            self._send_again(self._grace_s)
        else:
            self._raise()

    def _raise(self) -> None:
        """Interrupt the running code, unless it learns of the signal in another way."""
        waits = self._is_polled or self._is_delayed
        if self.count > waits and not self._is_ignored:
            raise KeyboardInterrupt

    def _handle_unraisable(self, error: Any) -> None:
        """Send the signal again if it came inside a destructor, as Ray's handles have: Python drops its exception."""
        if not issubclass(error.exc_type, KeyboardInterrupt):
            self._unraisable(error)
        elif self._before and self._again is None:
            self._send_again(_AGAIN_S)

    def _send_again(self, after_s: float) -> None:
        """Send the signal again to the main thread, where what its handler raises is noticed."""
        main = threading.main_thread().ident
        self._again = threading.Timer(after_s, signal.pthread_kill, (main, self.number))
        self._again.daemon = True
        self._again.start()

    def _cancel_again(self) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again = None

    def log(self, text: str) -> None:
        """Print a line on standard error, whatever the process was doing."""
        if self._is_quiet:
            return
        line = f"capfilt: {text}\n"
        if sys.stderr is not sys.__stderr__:  # a live table stands there: the line goes above it
            # RuntimeError: the signal came while it was written to.
            with contextlib.suppress(OSError, RuntimeError):
                sys.stderr.write(line)
                return
        with contextlib.suppress(OSError):  # the terminal is gone
            os.write(self._stderr, line.encode())
