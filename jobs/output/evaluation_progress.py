"""How far an evaluation is, on standard error: one line rewritten on a terminal, a line now and then elsewhere."""

import shutil
import sys
import threading
import time
from typing import TextIO

from pipeline.text import readable_duration

_TERMINAL_INTERVAL_S, _LINE_INTERVAL_S = 2.0, 30.0
_ERASE_LINE = "\r\x1b[K"


class EvaluationProgress:
    """Call it with what is done; use it as a context manager. A thread writes, so that a slow batch is not silent.

    Args:
        quiet: write nothing.
        stream: where to write; standard error unless told.
        interval_s: between lines; None: what fits a terminal or a file.
    """

    def __init__(
        self, *, quiet: bool = False, stream: TextIO | None = None, interval_s: float | None = None
    ) -> None:
        self._stream = stream or sys.stderr
        self._on_terminal = self._stream.isatty()
        self._interval_s = interval_s or (_TERMINAL_INTERVAL_S if self._on_terminal else _LINE_INTERVAL_S)
        self._quiet = quiet
        self._what, self._done, self._total = "", 0, 0
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._writer = threading.Thread(target=self._write_lines, daemon=True)

    def __enter__(self) -> "EvaluationProgress":
        if not self._quiet:
            self._writer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._writer.is_alive():
            self._writer.join()
        if self._on_terminal and not self._quiet:
            self._stream.write(_ERASE_LINE)
            self._stream.flush()

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        """Take note that ``done`` of ``total`` images are done; of what has no parts, that it began."""
        if what != self._what:
            self._what, self._began = what, time.monotonic()
        self._done, self._total = done, total

    def line(self) -> str:
        """Return where the evaluation is: share done and time left, or the time it has taken so far."""
        seconds = time.monotonic() - self._began
        if not self._total:
            return f"{self._what}: {readable_duration(seconds)}"
        line = f"{self._what}: {self._done:,} of {self._total:,} images ({self._done / self._total:.0%})"
        if not self._done:
            return f"{line}, {readable_duration(seconds)} so far"
        return f"{line}, {readable_duration(seconds * (self._total - self._done) / self._done)} left"

    def _write_lines(self) -> None:
        while not self._ended.wait(self._interval_s):
            line = self.line()
            if self._on_terminal:
                columns = shutil.get_terminal_size().columns
                self._stream.write(_ERASE_LINE + line[: columns - 1])
            else:
                self._stream.write(f"[{time.strftime('%H:%M:%S')}] {line}\n")
            self._stream.flush()
