"""The commit of one shard: outputs are built locally, uploaded under unique names, and made visible by the record.

The record is written last, and only if the shard has none: of several commits of one shard exactly one counts.
"""

import contextlib
import functools
import platform
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, islice
from pathlib import Path
from threading import Lock
from typing import TypeVar

import numpy as np

from pipeline.corpus.records import Records
from pipeline.corpus.worker_time import WORKER_TIME
from pipeline.digests import sha256_file
from pipeline.prefetch import prefetch_map
from pipeline.storage.scratch import temporary_folder
from schemas.json_record import utc_now
from schemas.records import Histogram, OutputFile, ShardRecord, ShardTask
from schemas.stages import STAGE_FOLDERS

T = TypeVar("T")
U = TypeVar("U")

_LIBRARIES = (
    "capfilt",
    "torch",
    "transformers",
    "open_clip_torch",
    "img2dataset",
    "opencv-python-headless",
    "pillow",
    "pillow-heif",
    "pyarrow",
    "ray",
)

# Histograms have fixed edges, so that those of 13,000 shards can be added up.
# Cosine similarities. CLIP ViT-L/14 puts web pairs between 0.05 and 0.4; a CLIP made for one small world goes
# up to 0.9.
SCORE_EDGES = tuple(round(0.005 * step, 3) for step in range(-40, 201))
LENGTH_EDGES = tuple(float(length) for length in range(65))


def histogram(values: Sequence[float] | np.ndarray, edges: tuple[float, ...]) -> Histogram:
    """Count values into bins; those outside go to the first or last bin."""
    inside = np.clip(np.asarray(values, np.float64), edges[0], edges[-1])
    counts, _ = np.histogram(inside, np.asarray(edges))
    return Histogram(edges=edges, counts=tuple(counts.tolist()))


@functools.cache
def library_versions() -> Mapping[str, str]:
    """Return the versions that a record names, as this process found them first: reading them takes 7 ms."""
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[library] = version(library)
    return versions


@dataclass(slots=True, kw_only=True)
class ShardStats:
    """What a stage counted while it worked on a shard."""

    rows_in: int = 0
    rows_out: int = 0
    images: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    device: str = "cpu"

    def count(self, status: str, reason: str | None = None, rows: int = 1) -> None:
        """Count rows under their status and, where they have one, under ``status/reason``."""
        self.counts[status] = self.counts.get(status, 0) + rows
        if reason is not None:
            name = f"{status}/{reason}"
            self.counts[name] = self.counts.get(name, 0) + rows

    def note_device_batch(self, *images: int | None) -> None:
        """Note to how many images a device's memory has cut the batches; None of a model whose batches had room."""
        if cut := [number for number in images if number is not None]:
            self.counts["device_batch"] = min(cut)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the wall-clock seconds of the block to a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    @contextlib.contextmanager
    def on_device(
        self, lock: Lock, work: Callable[[T], U], batches: Iterator[T], *, ahead: int = 1
    ) -> Iterator[Iterator[U]]:
        """Hold the device for one shard, and yield what ``work`` makes of its batches, in order.

        The first batch is decoded while another shard has the device, so that the device does not wait for it. The part
        ``wait`` is the rest of the time that the other one holds it.
        """
        first = list(islice(batches, 1))
        with self.timed("wait"), WORKER_TIME.waiting():
            lock.acquire()
        try:
            # Closed before the lock is released, on errors too: the engine's buffers serve one batch at a time.
            with contextlib.closing(
                prefetch_map(work, chain(first, batches), ahead=ahead, threads=1)
            ) as results:
                yield results
        finally:
            lock.release()


class ShardCommit:
    """Build a shard's files in ``folder`` (local), then ``publish`` them. Use as a context manager.

    ``plain_names``: the output is a pure function of the input, byte for byte, so every commit may write the
    same name (curated shards, which others glob).
    """

    def __init__(self, records: Records, task: ShardTask, *, plain_names: bool = False) -> None:
        self.records = records
        self.task = task
        self.plain_names = plain_names
        self.id = uuid.uuid4().hex[:12]
        self.stats = ShardStats()

    def __enter__(self) -> "ShardCommit":
        self._start = time.perf_counter()
        self._started_at = utc_now()
        self._scratch = contextlib.ExitStack()
        self.folder = self._scratch.enter_context(temporary_folder())
        return self

    def __exit__(self, *_: object) -> None:
        self._scratch.close()

    def output_path(self, suffix: str) -> str:
        """Return the corpus path of an output: ``raw/cc3m/00000.<commit id>.tar``."""
        name = self.task.shard if self.plain_names else f"{self.task.shard}.{self.id}"
        return f"{STAGE_FOLDERS[self.task.stage]}/{self.task.source}/{name}.{suffix}"

    def publish(
        self, files: Mapping[str, tuple[Path, int]], imported: Mapping[str, OutputFile] | None = None
    ) -> ShardRecord:
        """Upload the files, then create the record if absent; return the shard's record.

        Args:
            files: by suffix, the local file and the rows (or samples) it holds.
            imported: files outside the corpus that the record refers to where they lie.

        If another commit won, its record is returned and this one's files are deleted. Between upload and record
        nothing is visible to a reader. A stale record is retired as late as possible: work that fails leaves the
        old shard in place.
        """
        if self.plain_names:
            # These uploads overwrite: never while a record refers to other bytes of that name.
            self._retire_replaced()
            if existing := self._committed():
                return existing
        with self.stats.timed("write"):
            uploaded = {suffix: self._upload(suffix, *file) for suffix, file in files.items()}
        record = self._record({**(imported or {}), **uploaded})
        self._retire_replaced()
        return record if self.records.commit(record) else self._withdraw(record, uploaded)

    def _upload(self, suffix: str, local: Path, rows: int) -> OutputFile:
        path = self.output_path(suffix)
        # The file is in this commit's own folder, which goes away: nobody changes it. It is hashed while the disk or
        # the store takes it.
        with ThreadPoolExecutor(1) as hashing:
            digest = hashing.submit(sha256_file, local)
            self.records.storage.share(local, path)
            return OutputFile(path=path, bytes=local.stat().st_size, sha256=digest.result(), rows=rows)

    def _record(self, outputs: Mapping[str, OutputFile]) -> ShardRecord:
        task, stats = self.task, self.stats
        # Without the time that another shard of the same worker had the device: else both would count it.
        stats.seconds["total"] = time.perf_counter() - self._start - stats.seconds.get("wait", 0.0)
        stats.seconds["worker"] = WORKER_TIME.seconds() or stats.seconds["total"]
        stats.seconds = {part: round(seconds, 4) for part, seconds in stats.seconds.items()}
        return ShardRecord(
            stage=task.stage,
            source=task.source,
            shard=task.shard,
            run_id=task.run_id,
            attempt=self.id,
            fingerprint=task.fingerprint,
            inputs=task.input_digests(),
            outputs=outputs,
            started_at=self._started_at,
            finished_at=utc_now(),
            host=socket.gethostname(),
            versions=library_versions(),
            cpus=task.share.cpus,
            gpus=task.share.gpus,
            node_type=task.share.node_type or stats.device,
            **{part.name: getattr(stats, part.name) for part in fields(stats)},
        )

    def _retire_replaced(self) -> None:
        if self.task.replaces is not None:
            self.records.retire(self.task.replaces)

    def _committed(self) -> ShardRecord | None:
        return self.records.read(self.task.stage, self.task.source, self.task.shard)

    def _withdraw(self, record: ShardRecord, uploaded: Mapping[str, OutputFile]) -> ShardRecord:
        """Undo the uploads of a commit whose record came second; return the record that came first."""
        winner = self._committed()
        if winner is None:
            raise RuntimeError("the record that won was retired meanwhile: two recomputations at once")
        if not self.plain_names:
            # The shard is committed, and gc finds what stays: a storage that refuses this undoes nothing.
            with contextlib.suppress(OSError):
                for file in uploaded.values():
                    self.records.storage.delete(file.path)
        elif winner.input_digests() != record.input_digests():
            # Made under another config, and overwritten by this commit: the files now belong to no record.
            self.records.retire(winner)
            raise RuntimeError(
                "two runs with different configs select the same shard at once; stop one of them"
            )
        return winner
