"""Whether one more stage of a shard may begin in a run: until the run is stopped, or one of its limits is reached."""

from collections import Counter
from typing import Literal

from pipeline.runs.limits import RunLimits
from schemas.records import ShardRecord
from schemas.stages import Stage

# wait: ask again in a while.
Permission = Literal["begin", "wait", "stop"]


class Admission:
    """Lets shards begin, and knows which ones are in work.

    What is in work counts against the limit of GPU-hours as what such a shard has taken so far. Before the first shard
    of a stage is committed nobody knows that: until then a worker has one in work, not two. So a run takes more than
    its limit by less than a shard a worker.
    """

    def __init__(self, limits: RunLimits) -> None:
        self._limits = limits
        self._worker_of: dict[tuple[Stage, str, str], str] = {}
        self._gpu_seconds: Counter[Stage] = Counter()
        self._committed: Counter[Stage] = Counter()
        self._is_stopping = False
        self.limit = ""
        """Which limit is reached; empty where none is."""

    def ask(self, place: tuple[Stage, str, str], worker: str, gpu_seconds: float) -> Permission:
        """Return whether a worker may begin a stage of a shard; then it is in work until ``end``.

        Args:
            gpu_seconds: of the run until now, without what is in work.
        """
        self.limit = self.limit or self._limits.reached(gpu_seconds + self._in_work_gpu_seconds())
        if self.limit or self._is_stopping:
            self._is_stopping = True
            self._worker_of.pop(place, None)  # of a worker that died: it is in work no more
            return "stop"
        if self._limits.gpu_hours is not None and not self._committed[place[0]] and self._is_busy(worker):
            return "wait"
        self._worker_of[place] = worker
        return "begin"

    def end(self, place: tuple[Stage, str, str], record: ShardRecord | None) -> None:
        """Note that a shard is in work no more, and what it has committed."""
        self._worker_of.pop(place, None)
        if record is not None:
            self._committed[record.stage] += 1
            self._gpu_seconds[record.stage] += record.gpu_seconds  # type: ignore[assignment]  # a Counter of floats

    def stop(self) -> None:
        """Let nothing begin any more."""
        self._is_stopping = True

    @property
    def is_stopped(self) -> bool:
        """Tell whether nothing begins any more and nothing is in work."""
        return self._is_stopping and not self._worker_of

    def _in_work_gpu_seconds(self) -> float:
        in_work = Counter(stage for stage, _, _ in self._worker_of)
        return sum(
            number * self._gpu_seconds[stage] / max(self._committed[stage], 1)
            for stage, number in in_work.items()
        )

    def _is_busy(self, worker: str) -> bool:
        return worker in self._worker_of.values()
