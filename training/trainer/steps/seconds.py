"""Seconds of a step's parts on one rank, by the clock of its device: a GPU works behind the program."""

import time
from typing import Any, Literal

import torch

Part = Literal["losses", "ahead", "sum", "update"]
# losses: forward and backward passes; ahead: the next step's images, read and encoded; sum: of the gradients, as far as
# it is waited for; update: the ranks' agreement and the optimiser.
PARTS: tuple[Part, ...] = ("losses", "ahead", "sum", "update")


class StepSeconds:
    """Adds up the seconds of each part over the steps between two reports.

    Args:
        device: that computes the steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._spans: list[tuple[Part, Any, Any]] = []
        self._last: Any = None

    def start(self) -> None:
        """Begin the first part of a step."""
        self._last = self._now()

    def done(self, part: Part) -> None:
        """End a part, and begin the next one."""
        now = self._now()
        self._spans.append((part, self._last, now))
        self._last = now

    def take(self) -> dict[Part, float]:
        """Return the seconds of each part since the last call; waits for the device."""
        seconds = dict.fromkeys(PARTS, 0.0)
        for part, begin, end in self._spans:
            seconds[part] += self._between(begin, end)
        self._spans = []
        return seconds

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        if not self._is_cuda:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1000  # milliseconds
