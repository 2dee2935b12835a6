"""The most that a run may take: GPU-hours of its workers, hours since it began."""

import time
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLimits:
    """Once one is reached, no stage of a shard begins; what is in work is finished and committed."""

    gpu_hours: float | None = None
    hours: float | None = None
    # Unix time.
    began: float = field(default_factory=time.time)

    def __bool__(self) -> bool:
        return self.gpu_hours is not None or self.hours is not None

    def reached(self, gpu_seconds: float) -> str:
        """Return which limit is reached, in words; empty where none is."""
        if self.gpu_hours is not None and gpu_seconds >= 3600 * self.gpu_hours:
            return f"--max-gpu-hours {self.gpu_hours:g} is reached"
        if self.hours is not None and time.time() - self.began >= 3600 * self.hours:
            return f"--max-hours {self.hours:g} is reached"
        return ""
