"""What a rank and the process that started it share: how the rank ended, its log lines, the time for a collective."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from training.trainer.summary import Summary

# A collective that takes longer counts as failed; a first step may compile for minutes.
TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOutcome:
    """How a rank ended, or all of them. Its values can be sent between processes."""

    kind: Literal["ended", "refused", "stopped", "fault", "interrupted", "lost"]
    text: str = ""
    summary: Summary | None = None


# The most severe first.
_SEVERITY = ("refused", "stopped", "fault", "interrupted", "lost", "ended")


def log(text: str) -> None:
    """Print a progress line where it does not disturb ``--json``."""
    print(text, file=sys.stderr, flush=True)


def worst_outcome(outcomes: Sequence[RankOutcome]) -> RankOutcome:
    """Return the most severe outcome: a rank's own error takes precedence over "lost contact with another"."""
    return min(outcomes, key=lambda outcome: _SEVERITY.index(outcome.kind))
