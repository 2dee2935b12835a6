"""The shards that one rank has open: fetched and checked before it needs them, closed once the order left them."""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

from pipeline.corpus.records import Records
from pipeline.corpus.storage import Storage
from training.data.sampler import Draw
from training.data.shard_index import OpenShard, ShardRef, open_shard
from training.data.snapshot import Snapshot

_OPENERS = 4


class Shelf:
    """Open shards by their number in the snapshot. Use as a context manager, from one thread but for ``get``."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._refs = snapshot.shards
        self._source = [number for number, source in enumerate(snapshot.sources) for _ in source.shards]
        self._records = {shard.corpus: Records(Storage(shard.corpus)) for shard in snapshot.shards}
        self._opening: dict[int, Future[tuple[OpenShard, ExitStack]]] = {}
        # The last of its source's groups that wants a shard.
        self._last_group: dict[int, int] = {}

    def __enter__(self) -> "Shelf":
        self._openers = ThreadPoolExecutor(_OPENERS)
        return self

    def __exit__(self, *_: object) -> None:
        self._openers.shutdown(cancel_futures=True)
        for number in list(self._opening):
            self._close(number)

    def want(self, draws: Iterable[Draw]) -> int:
        """Begin to open the shards of samples to come; return how many were not open yet."""
        before = len(self._opening)
        for number, group in {(draw.shard, draw.group) for draw in draws}:
            self._last_group[number] = max(group, self._last_group.get(number, group))
            if number not in self._opening:
                self._opening[number] = self._openers.submit(self._open, self._refs[number])
        return len(self._opening) - before

    def get(self, number: int) -> OpenShard:
        """Return a wanted shard once it is open. Raises what opening it raised."""
        return self._opening[number].result()[0]

    def leave(self, draws: Iterable[Draw]) -> None:
        """Close the shards of groups before these samples': their sources do not come back to them."""
        group: dict[int, int] = {}
        for draw in draws:
            source = self._source[draw.shard]
            group[source] = min(draw.group, group.get(source, draw.group))
        for number in list(self._opening):
            if self._last_group[number] < group.get(self._source[number], 0):
                self._close(number)

    def _open(self, ref: ShardRef) -> tuple[OpenShard, ExitStack]:
        stack = ExitStack()
        return stack.enter_context(open_shard(self._records[ref.corpus], ref)), stack

    def _close(self, number: int) -> None:
        future = self._opening.pop(number)
        del self._last_group[number]
        if not future.cancel() and future.exception() is None:
            future.result()[1].close()
