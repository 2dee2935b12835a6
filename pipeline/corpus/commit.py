"""One attempt at one shard: outputs made locally, checked, uploaded under the attempt's name, committed last."""

import contextlib
import platform
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.corpus.records import Records, now
from pipeline.corpus.storage import temporary_folder
from pipeline.digests import sha256_file
from schemas.records import STAGE_FOLDERS, Histogram, OutputFile, ShardRecord, ShardTask

_LIBRARIES = (
    "capfilt",
    "torch",
    "transformers",
    "open_clip_torch",
    "img2dataset",
    "pillow",
    "pyarrow",
    "ray",
)


def library_versions() -> dict[str, str]:
    """Return the versions that a record names."""
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[library] = version(library)
    return versions


@dataclass(slots=True, kw_only=True)
class Tally:
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

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the wall-clock seconds of the block to a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


class Attempt:
    """Make a shard's files in ``folder`` (local), then ``commit`` them. Use as a context manager.

    ``plain_names``: the output is a pure function of the input, byte for byte, so every attempt may write the
    same name (curated shards, which others glob).
    """

    def __init__(self, records: Records, task: ShardTask, *, plain_names: bool = False) -> None:
        self.records = records
        self.task = task
        self.plain_names = plain_names
        self.id = uuid.uuid4().hex[:12]
        self.tally = Tally()

    def __enter__(self) -> "Attempt":
        self._start = time.perf_counter()
        self._started_at = now()
        self._scratch = contextlib.ExitStack()
        self.folder = self._scratch.enter_context(temporary_folder())
        return self

    def __exit__(self, *_: object) -> None:
        self._scratch.close()

    def output_path(self, suffix: str) -> str:
        """Return the corpus path of an output: ``raw/cc3m/00000.<attempt>.tar``."""
        name = self.task.shard if self.plain_names else f"{self.task.shard}.{self.id}"
        return f"{STAGE_FOLDERS[self.task.stage]}/{self.task.source}/{name}.{suffix}"

    def commit(
        self, files: Mapping[str, tuple[Path, int]], adopted: Mapping[str, OutputFile] | None = None
    ) -> ShardRecord:
        """Upload the files, then create the record if absent; return the record that stands.

        Args:
            files: by suffix, the local file and the rows (or samples) it holds.
            adopted: files outside the corpus that the record refers to where they lie.

        A loser deletes its own files. Between upload and record nothing is visible to a reader. A stale record
        is retired no earlier than it must be: work that fails leaves the old shard standing.
        """
        outputs = dict(adopted or {})
        if self.plain_names:
            # These uploads overwrite: never under a record that stands for other bytes.
            if self.task.replaces is not None:
                self.records.retire(self.task.replaces)
            if standing := self._standing():
                return standing
        with self.tally.timed("write"):
            for suffix, (local, rows) in files.items():
                path = self.output_path(suffix)
                outputs[suffix] = OutputFile(
                    path=path, bytes=local.stat().st_size, sha256=sha256_file(local), rows=rows
                )
                self.records.storage.put(local, path)
        task, tally = self.task, self.tally
        # Not the time that another shard of the same worker had the device: both count that once.
        tally.seconds["total"] = time.perf_counter() - self._start - tally.seconds.get("wait", 0.0)
        record = ShardRecord(
            stage=task.stage,
            source=task.source,
            shard=task.shard,
            run_id=task.run_id,
            attempt=self.id,
            fingerprint=task.fingerprint,
            inputs={
                f"{stage}.{name}": sha
                for stage, upstream in sorted(task.inputs.items())
                for name, sha in upstream.input_digests().items()
            },
            outputs=outputs,
            rows_in=tally.rows_in,
            rows_out=tally.rows_out,
            images=tally.images,
            counts=tally.counts,
            histograms=tally.histograms,
            seconds={part: round(seconds, 4) for part, seconds in tally.seconds.items()},
            models=tally.models,
            device=tally.device,
            started_at=self._started_at,
            finished_at=now(),
            host=socket.gethostname(),
            versions=library_versions(),
        )
        if task.replaces is not None:
            self.records.retire(task.replaces)
        if self.records.commit(record):
            self.records.end_attempts(task.stage, task.source, task.shard)
            return record
        return self._lose(record, set(files))

    def _standing(self) -> ShardRecord | None:
        return self.records.read(self.task.stage, self.task.source, self.task.shard)

    def _lose(self, record: ShardRecord, suffixes: set[str]) -> ShardRecord:
        """Take back what another attempt's record does not stand for; return that record."""
        winner = self._standing()
        if winner is None:
            raise RuntimeError("the record that won was retired meanwhile: two recomputations at once")
        if not self.plain_names:
            for suffix in suffixes:
                self.records.storage.delete(record.outputs[suffix].path)
        elif winner.input_digests() != record.input_digests():
            # Another config's bytes, and ours lie over them now: nobody's, so the shard is to be made again.
            self.records.retire(winner)
            raise RuntimeError(
                "two runs with different configs select the same shard at once; stop one of them"
            )
        return winner
