"""Verification on a Ray cluster: a task reads the files of one shard, the driver gathers what they hold."""

import contextlib
from collections.abc import Iterator, Mapping
from itertools import islice

import ray

from jobs.cluster.session import joined_ray, living_nodes
from jobs.interrupts import Interrupts
from pipeline.manifest.verify.corpus import ReadShards, ShardRecords, check_shard
from pipeline.manifest.verify.progress import ShardFindings
from pipeline.storage.storage import Storage

# Tasks that wait for each CPU: enough for a cluster that grows by what waits.
_TASKS_PER_CPU = 2
# Of a task whose node dies.
_MAX_RETRIES = 3


@contextlib.contextmanager
def reading_on_ray(address: str) -> Iterator[ReadShards]:
    """Yield what reads shards on the Ray cluster at an address, which is joined while the block runs."""
    if ray.is_initialized():
        yield read_on_ray
        return
    with Interrupts() as interrupts, joined_ray(address, interrupts):
        yield read_on_ray


def read_on_ray(
    storage: Storage, shards: Iterator[ShardRecords], needed: Mapping[str, list[str]]
) -> Iterator[tuple[ShardRecords, ShardFindings]]:
    """Read the files of shards, one a task of one CPU: see ``ReadShards``. Ray is joined."""
    in_work: dict[ray.ObjectRef, ShardRecords] = {}
    while True:
        for records in islice(shards, max(0, _most_tasks() - len(in_work))):
            in_work[_read_shard.remote(storage, records, needed)] = records
        if not in_work:
            return
        # All that are done, at least one: asked for one by one, each would cost a round of all.
        [first], rest = ray.wait(list(in_work))
        done, _ = ray.wait(rest, num_returns=len(rest), timeout=0) if rest else ([], [])
        for answer in (first, *done):
            yield in_work.pop(answer), ray.get(answer)


def _most_tasks() -> int:
    cpus = sum(node["Resources"].get("CPU", 0) for node in living_nodes())
    return _TASKS_PER_CPU * max(1, int(cpus))


@ray.remote(num_cpus=1, max_retries=_MAX_RETRIES, scheduling_strategy="SPREAD")
def _read_shard(storage: Storage, records: ShardRecords, needed: Mapping[str, list[str]]) -> ShardFindings:
    return check_shard(storage, records, needed)
