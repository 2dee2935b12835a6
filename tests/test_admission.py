"""A limit of GPU-hours under workers that have two shards in work at once, in simulated time."""

import random
from dataclasses import dataclass, field

import pytest

from pipeline.runs.limits import RunLimits
from pipeline.runs.progress import ProgressCounter, ShardOutcome
from schemas.records import ShardRecord

WORKERS, AT_ONCE, SHARDS = 3, 2, 60
LONGEST_S = 1.3


@dataclass
class Simulation:
    """Workers of a whole GPU each, which their shards in work share evenly."""

    limit_s: float
    chance: random.Random = field(default_factory=lambda: random.Random(5))
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> float:
        """Return the GPU-seconds that all workers took until nothing was in work."""
        counter = ProgressCounter(RunLimits(gpu_hours=self.limit_s / 3600))
        left = [f"{number:05d}" for number in range(SHARDS)]
        in_work: list[dict[str, float]] = [{} for _ in range(WORKERS)]
        taken_s = 0.0
        while True:
            for number, shards in enumerate(in_work):
                while left and len(shards) < AT_ONCE:
                    if counter.ask_to_begin("caption", "cc", left[0], f"worker{number}") != "begin":
                        break
                    shard = left.pop(0)
                    shards[shard] = self.seconds[shard] = self.chance.uniform(0.7, LONGEST_S)
            busy = [shards for shards in in_work if shards]
            if not busy:
                assert counter.snapshot().is_stopped == (counter.snapshot().limit != "")
                return taken_s
            step_s = min(min(shards.values()) * len(shards) for shards in busy)
            taken_s += step_s * len(busy)
            for shards in busy:
                self.compute(shards, step_s / len(shards), counter)

    def compute(self, shards: dict[str, float], seconds: float, counter: ProgressCounter) -> None:
        for shard in list(shards):
            shards[shard] -= seconds
            if shards[shard] < 1e-9:
                del shards[shard]
                counter.note(ShardOutcome.committed(a_record(shard, self.seconds[shard])))


def a_record(shard: str, seconds: float) -> ShardRecord:
    return ShardRecord(
        stage="caption",
        source="cc",
        shard=shard,
        run_id="r",
        attempt="a",
        fingerprint="f",
        inputs={},
        outputs={},
        rows_in=1,
        rows_out=1,
        images=1,
        counts={},
        started_at="",
        finished_at="",
        seconds={"worker": seconds},
        gpus=1.0,
    )


@pytest.mark.parametrize("limit_s", [0.01, 0.5, 1, 2, 3, 4.5, 6, 7, 10, 20.2, 31])
def test_a_run_takes_more_than_its_gpu_hours_by_less_than_a_shard_a_worker(limit_s: float) -> None:
    taken_s = Simulation(limit_s).run()
    assert limit_s - LONGEST_S * AT_ONCE < taken_s < limit_s + WORKERS * LONGEST_S


def test_a_run_that_stops_waits_for_no_shard_whose_worker_died() -> None:
    counter = ProgressCounter()
    assert counter.ask_to_begin("crawl", "cc", "00000", "dies") == "begin"
    counter.stop()
    assert not counter.snapshot().is_stopped
    assert counter.ask_to_begin("crawl", "cc", "00000", "follows it") == "stop"
    assert counter.snapshot().is_stopped
