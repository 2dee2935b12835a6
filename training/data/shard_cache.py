"""The shards that one rank has open: fetched and checked before they are needed, closed after their last sample."""

import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

from pipeline.corpus.records import Records
from pipeline.storage.scratch import free_scratch
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.records import SnapshotShard
from training.data.node_files import remove_unused
from training.data.sampler import SampleIndex
from training.data.shard_index import OpenShard, open_shard
from training.data.snapshot import Snapshot

_OPENERS = 4


def require_scratch(snapshot: Snapshot, shuffle_shards: int, read_ahead: int) -> None:
    """Raise CapfiltError where the scratch space cannot hold the shards of remote corpora that are open at once."""
    remote = [source for source in snapshot.sources if not Storage(source.shards[0].corpus).is_local]
    # Of each source its largest group, and the shards that are fetched ahead.
    sizes = [sorted((shard.tar.bytes for shard in source.shards), reverse=True) for source in remote]
    needed = sum(sum(largest[:shuffle_shards]) for largest in sizes)
    needed += read_ahead * max((largest[0] for largest in sizes), default=0)
    if needed > (free := free_scratch()):
        raise CapfiltError(
            f"TMPDIR: {tempfile.gettempdir()} has {free / 1e9:,.1f} GB free, and the shards that are open at once take "
            f"up to {needed / 1e9:,.1f} GB of each node; name a larger disk, or lower data.shuffle_shards"
        )


class ShardCache:
    """Open shards by their number in the snapshot.

    A context manager. ``get`` may be called from any thread, the other methods from one.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._refs = snapshot.shards
        self._source = [number for number, source in enumerate(snapshot.sources) for _ in source.shards]
        self._records = {shard.corpus: Records(Storage(shard.corpus)) for shard in snapshot.shards}
        self._shards: dict[int, Future[tuple[OpenShard, ExitStack]]] = {}
        # By shard: the last of its source's groups that needs it.
        self._last_group: dict[int, int] = {}

    def __enter__(self) -> "ShardCache":
        remove_unused()
        self._openers = ThreadPoolExecutor(_OPENERS)
        return self

    def __exit__(self, *_: object) -> None:
        self._openers.shutdown(cancel_futures=True)
        for number in list(self._shards):
            self._close(number)

    def prefetch(self, indices: Iterable[SampleIndex]) -> int:
        """Begin to open the shards of these samples; return how many were not open yet."""
        num_before = len(self._shards)
        for number, group in {(index.shard, index.group) for index in indices}:
            self._last_group[number] = max(group, self._last_group.get(number, group))
            if number not in self._shards:
                self._shards[number] = self._openers.submit(self._open, self._refs[number])
        return len(self._shards) - num_before

    def get(self, number: int) -> OpenShard:
        """Return a prefetched shard once it is open. Raises what opening it raised."""
        return self._shards[number].result()[0]

    def release(self, indices: Iterable[SampleIndex]) -> None:
        """Close the shards of groups before these samples': their sources do not come back to them."""
        first_group: dict[int, int] = {}
        for index in indices:
            source = self._source[index.shard]
            first_group[source] = min(index.group, first_group.get(source, index.group))
        for number in list(self._shards):
            if self._last_group[number] < first_group.get(self._source[number], 0):
                self._close(number)

    def _open(self, ref: SnapshotShard) -> tuple[OpenShard, ExitStack]:
        stack = ExitStack()
        return stack.enter_context(open_shard(self._records[ref.corpus], ref)), stack

    def _close(self, number: int) -> None:
        future = self._shards.pop(number)
        del self._last_group[number]
        if not future.cancel() and future.exception() is None:
            future.result()[1].close()
