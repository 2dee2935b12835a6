"""Steps whose loss or gradient is not finite: each is skipped on all ranks and written down, but only a few of many.

A sample whose numbers overflow comes again whenever the run is started again, since the order is a function of the
seed: stopping at it would end the run for good.
"""

import json
import math
from collections.abc import Mapping, Sequence

from pipeline.storage.storage import Storage

MAX_SKIPPED = 10
WINDOW_STEPS = 1_000
_SHOWN_UIDS = 3


class SkippedSteps:
    """The skipped ones of the last ``WINDOW_STEPS`` steps, and a file of each in the run's folder.

    Args:
        storage: the run's folder.
        steps: the numbers of those that are known, from a checkpoint.
    """

    def __init__(self, storage: Storage, steps: Sequence[int] = ()) -> None:
        self.steps = tuple(steps)
        self._storage = storage

    @property
    def too_many(self) -> bool:
        """Return whether more steps were skipped than a run may skip."""
        return len(self.steps) > MAX_SKIPPED

    def forget(self, step: int) -> None:
        """Leave out the steps that are no longer among the last ones at ``step``."""
        self.steps = tuple(skipped for skipped in self.steps if skipped > step - WINDOW_STEPS)

    def add(self, step: int) -> None:
        """Count a step."""
        self.forget(step)
        self.steps = (*self.steps, step)

    def write(self, step: int, values: Mapping[str, float], uids: Sequence[str]) -> str:
        """Write a step's values and samples to a file, which a resumed run writes again; return both in words."""
        name = f"skipped-{step:08d}.json"
        readable = {key: value if math.isfinite(value) else str(value) for key, value in values.items()}
        content = json.dumps({"step": step, "values": readable, "uids": list(uids)}, indent=1)
        self._storage.write(name, content.encode())
        shown = ", ".join(uids[:_SHOWN_UIDS])
        more = f" and {len(uids) - _SHOWN_UIDS:,} more" if len(uids) > _SHOWN_UIDS else ""
        return f"the samples {shown}{more}, in {self._storage.url(name)}"


def not_finite(values: Mapping[str, float]) -> str:
    """Return which values are not finite, in words, or nothing."""
    return ", ".join(f"{name} is {value}" for name, value in values.items() if not math.isfinite(value))
