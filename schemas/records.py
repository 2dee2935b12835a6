"""The records: what a stage promises about a shard once it is committed, and the task that leads to it."""

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from schemas.json_record import Count, FileName, Finite, Json, Number, ShardName, Time
from schemas.marks import MarkRule, rules_digest
from schemas.names import is_confined, is_outside_tar, printable
from schemas.stages import STAGE_FOLDERS, STAGE_INFO, Stage

# The input of a selection that obeyed marks, beside ``stage.name``.
MARKS_INPUT = "marks.rules"
# Where a training saves what it reads: a SnapshotRecord under its name.
SNAPSHOT_FILE = re.compile(r".+/snapshot-[0-9a-f]{16}\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile(Json):
    """One file that a record commits. ``path`` is relative to the corpus, or a URL outside it (imported tars)."""

    path: str
    bytes: Count
    sha256: str
    rows: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram(Json):
    """``counts[i]`` values fell in ``[edges[i], edges[i+1])``; values outside go to the first or last bin."""

    edges: tuple[Finite, ...]
    counts: tuple[Count, ...]

    def require_bins(self) -> None:
        """Raise ValueError unless the edges rise and each two of them have a count."""
        if len(self.edges) != len(self.counts) + 1 or not self.counts:
            raise ValueError(f"{len(self.counts)} counts and {len(self.edges)} edges, which are not one more")
        if any(low >= high for low, high in itertools.pairwise(self.edges)):
            raise ValueError("edges that do not rise")


@dataclass(frozen=True, slots=True, kw_only=True)
class _ShardOfRun(Json):
    """One stage of one shard, and the run that dealt with it."""

    stage: Stage
    source: FileName
    shard: ShardName
    run_id: FileName

    @property
    def shard_id(self) -> tuple[Stage, str, str]:
        """Which stage of which shard."""
        return self.stage, self.source, self.shard


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord(_ShardOfRun):
    """The commit of one shard by one stage. Times are ISO 8601 in UTC.

    ``attempt`` is the id of the shard commit that wrote the outputs; their file names have it. ``adopted`` (in
    outputs and intake records) names a tar of img2dataset's that was imported without copying it.
    """

    _ADDED = ("cpus", "gpus", "node_type")

    attempt: FileName
    fingerprint: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, OutputFile]
    rows_in: Count
    rows_out: Count
    images: Count
    counts: Mapping[str, Count]
    started_at: Time
    finished_at: Time
    models: tuple[str, ...] = ()
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    seconds: Mapping[str, Finite] = field(default_factory=dict)
    host: str = ""
    device: str = "cpu"
    versions: Mapping[str, str] = field(default_factory=dict)
    # Of the worker.
    cpus: Finite | None = None
    gpus: Finite | None = None
    node_type: str | None = None

    @property
    def gpu_seconds(self) -> float:
        """Return the seconds of its worker times the worker's share of a GPU."""
        return self.seconds.get("worker", 0.0) * (self.gpus or 0.0)

    @property
    def path(self) -> str:
        """Where the record is while it is committed, relative to the corpus."""
        return shard_record_path(*self.shard_id)

    @property
    def retired_path(self) -> str:
        """Where the record is once a recomputation has replaced it."""
        return f"records/retired/{self.stage}/{self.source}/{self.shard}.{self.attempt}.json"

    def require_valid(self) -> None:
        """Raise ValueError unless the outputs are the stage's own files, and each histogram's counts fit its edges."""
        self._require_own_files()
        for name, histogram in self.histograms.items():
            try:
                histogram.require_bins()
            except ValueError as error:
                raise ValueError(f"histograms.{printable(name)[:200]}: it has {error}") from None

    def _require_own_files(self) -> None:
        """Raise ValueError unless the outputs are the stage's, each with the shard's name in the stage's folder.

        A tar that was imported without copying may be outside the corpus; ``pipeline.corpus.records``
        checks it against the intake records when it reads the record.
        """
        expected = STAGE_INFO[self.stage].outputs
        if self.stage != "urls" and self.outputs.keys() != set(expected):
            raise ValueError(f"outputs: {sorted(self.outputs)}, not {sorted(expected)}"[:200])
        for name, file in self.outputs.items():
            if not (
                is_own_file(file.path, self.stage, self.source, self.shard) or self._may_be_outside(name)
            ):
                raise ValueError(f"outputs.{name}.path: {file.path[:200]!r} is not a file of this shard")

    def _may_be_outside(self, name: str) -> bool:
        is_imported = (self.stage, name) in (("crawl", "tar"), ("urls", "adopted"))
        return is_imported and is_outside_tar(self.outputs[name].path)

    def input_digests(self) -> dict[str, str]:
        """Return the sha256 of each output by name: what the next stage's fingerprint takes in."""
        return {name: file.sha256 for name, file in sorted(self.outputs.items())}


def shard_record_path(stage: str, source: str, shard: str) -> str:
    """Return where the committed record of a shard is, relative to the corpus."""
    return f"records/{stage}/{source}/{shard}.json"


def is_own_file(path: str, stage: Stage, source: str, shard: str) -> bool:
    """Tell whether a path, relative to the corpus, is where a stage puts the files of a shard."""
    return (
        is_confined(path)
        and path.count("/") == 2
        and path.startswith(f"{STAGE_FOLDERS[stage]}/{source}/{shard}.")
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerShare(Json):
    """What a worker holds of its node: CPUs, GPUs (0.2 is a fifth of one), and the type that a price is given for.

    ``node_type``: empty where it is what the worker computes on, ``cpu`` or the GPU's name.
    """

    cpus: Finite = 0.0
    gpus: Finite = 0.0
    node_type: str = ""


NO_SHARE = WorkerShare()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask(Json):
    """The task of a worker: one stage on one shard. ``replaces`` is the stale record to retire, if any.

    ``inputs`` are the upstream records by stage name: ``urls`` for crawl; ``crawl`` for caption; ``crawl`` and,
    for a web source, ``caption`` for rank; these and ``rank`` for filter; ``crawl``, ``rank`` and ``filter`` for
    select, as far as the source goes through them. ``marks``, of select alone: those that concern samples of the shard.
    ``has_retries``: later shards may try URLs of this one again; a crawl then looks which.
    """

    corpus: str
    stage: Stage
    source: str
    kind: Literal["web", "human"]
    shard: str
    run_id: str
    fingerprint: str
    inputs: Mapping[str, ShardRecord]
    replaces: ShardRecord | None = None
    max_attempts: int = 3
    marks: tuple[MarkRule, ...] = ()
    has_retries: bool = True
    share: WorkerShare = NO_SHARE

    def input_digests(self) -> dict[str, str]:
        """Return the sha256 of each input file, by ``stage.name``; where there are marks, the digest of their rules."""
        files = {
            f"{stage}.{name}": sha256
            for stage, record in sorted(self.inputs.items())
            for name, sha256 in record.input_digests().items()
        }
        return files | ({MARKS_INPUT: rules_digest(self.marks)} if self.marks else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class IntakeRecord(Json):
    """The commit of one reading of a source's lists: which URLs became which shards.

    ``batch`` counts from 0 per source. A batch is atomic: its url files exist before its record does.
    ``signature`` digests (path, bytes, version) of every input file: equal signature, nothing to read.
    rows_in = rows_new + rows_duplicate + rows_known + rows_without_url. ``adopted`` and ``adopted_bytes`` give,
    by shard, the tars of img2dataset's that stay where they lie. ``taken_over`` gives, by shard that URLs failed in,
    the shards of this batch that try them again; batches of earlier versions do not say so.
    """

    _ADDED = ("taken_over",)

    source: FileName
    batch: Count
    kind: Literal["lists", "img2dataset", "retry"]
    run_id: FileName
    attempt: FileName
    signature: str
    shards: Mapping[ShardName, OutputFile]
    rows_in: Count
    rows_new: Count
    rows_duplicate: Count
    rows_known: Count
    finished_at: Time
    files: tuple[str, ...] = ()
    rows_without_url: Count = 0
    adopted: Mapping[ShardName, str] = field(default_factory=dict)
    adopted_bytes: Mapping[ShardName, Count] = field(default_factory=dict)
    taken_over: Mapping[ShardName, tuple[ShardName, ...]] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Where the record is, relative to the corpus."""
        return f"records/intake/{self.source}/{self.batch:05d}.json"

    def shard_records(self) -> list[ShardRecord]:
        """Return each url shard as a record of the stage ``urls``.

        Its outputs are ``parquet``, the rows, and of an imported img2dataset shard ``adopted``, the tar where it lies.
        """
        return [self._shard_record(shard, file) for shard, file in self.shards.items()]

    def _shard_record(self, shard: str, file: OutputFile) -> ShardRecord:
        outputs = {"parquet": file}
        if shard in self.adopted:
            size = self.adopted_bytes[shard]
            outputs["adopted"] = OutputFile(path=self.adopted[shard], bytes=size, sha256="", rows=0)
        return ShardRecord(
            stage="urls",
            source=self.source,
            shard=shard,
            run_id=self.run_id,
            attempt=self.attempt,
            fingerprint=file.sha256,
            inputs={},
            outputs=outputs,
            rows_in=file.rows,
            rows_out=file.rows,
            images=0,
            counts={},
            started_at=self.finished_at,
            finished_at=self.finished_at,
        )

    def retries_of(self, shard: str) -> Iterable[str]:
        """Return the shards of this batch that try URLs of another shard again, or may, where it does not say which."""
        if self.kind != "retry":
            return ()
        return self.taken_over.get(shard, ()) if self.taken_over else self.shards

    def require_valid(self) -> None:
        """Raise ValueError unless the url shards lie in the corpus, and each imported tar outside it."""
        for shard, retries in self.taken_over.items():
            if not self.shards.keys() >= set(retries):
                raise ValueError(
                    f"taken_over.{shard}: {sorted(retries)} are not all shards of this batch"[:200]
                )
        for shard, file in self.shards.items():
            if not is_own_file(file.path, "urls", self.source, shard):
                raise ValueError(
                    f"shards.{shard}.path: {file.path[:200]!r} is not a url shard of this source"
                )
        for shard, path in self.adopted.items():
            if self.kind != "img2dataset" or shard not in self.shards or shard not in self.adopted_bytes:
                raise ValueError(
                    f"adopted.{shard}: only a shard of img2dataset is imported, and only with its size in bytes"
                )
            if not is_outside_tar(path):
                raise ValueError(f"adopted.{shard}: {path[:200]!r} is not the absolute path or URL of a tar")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptNote(Json):
    """What stands under records/attempts while an attempt is under way. Its ``id`` makes the bytes its own.

    ``node``: the name of the node that it runs on, which no other ever has; empty without Ray.
    """

    id: str
    started_at: Time
    host: str
    share: WorkerShare
    node: str = ""


def lost_attempt_path(stage: Stage, source: str, shard: str, run_id: str, number: int) -> str:
    """Return where the record of a lost attempt is, relative to the corpus."""
    return f"records/lost_attempts/{stage}/{source}/{shard}/{run_id}.{number}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LostAttemptRecord(_ShardOfRun):
    """An attempt that did not commit its shard, and the seconds of a worker that it took.

    ``cause``: failed (the worker raised ``error``), or killed (its process or node died, or the run was stopped).
    """

    number: Count
    cause: Literal["failed", "killed"]
    started_at: Time
    ended_at: Time
    seconds: Finite
    error: str = ""
    host: str = ""
    cpus: Finite | None = None
    gpus: Finite | None = None
    node_type: str | None = None

    @property
    def path(self) -> str:
        """Where the record is, relative to the corpus."""
        return lost_attempt_path(*self.shard_id, self.run_id, self.number)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantineRecord(_ShardOfRun):
    """A shard that failed every attempt of a run; the next run tries it again."""

    attempts: Count
    error: str
    finished_at: Time

    @property
    def path(self) -> str:
        """Where the record is, relative to the corpus."""
        return f"records/quarantine/{self.stage}/{self.source}/{self.shard}.json"


RunOutcome = Literal["done", "partial", "interrupted", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord(Json):
    """The start (outcome None) or the end of a run; columns as in the table ``runs``."""

    run_id: FileName
    command: str
    config: Mapping[str, Any]
    config_digest: str
    started_at: Time
    host: str
    versions: Mapping[str, str]
    finished_at: Time | None = None
    outcome: RunOutcome | None = None
    shards_done: Count = 0
    shards_skipped: Count = 0
    shards_failed: Count = 0

    @property
    def path(self) -> str:
        """Where the record is, relative to the corpus: a run's start and its end have one each."""
        return f"records/runs/{self.run_id}.{'start' if self.outcome is None else 'end'}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord(Json):
    """A model that a run used; columns as in the table ``models``."""

    digest: FileName
    kind: str
    name: str
    revision: str
    files: Mapping[str, str]
    parameters: Count
    registered_at: Time

    @property
    def path(self) -> str:
        """Where the record is, relative to the corpus."""
        return f"records/models/{self.digest}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord(Json):
    """A complete checkpoint; columns as in the table ``checkpoints``."""

    path: str
    stage: str
    run_id: FileName
    step: Count
    samples: Count
    snapshot: str
    sha256: Mapping[str, str]
    metrics: Mapping[str, Number]
    created_at: str
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotShard(Json):
    """A shard that a training reads. ``parquet`` is None outside a corpus; ``held_out`` are uids it leaves out."""

    corpus: str
    source: str
    shard: str
    tar: OutputFile
    parquet: OutputFile | None = None
    held_out: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        """The samples that are trained on."""
        return self.tar.rows - len(self.held_out)


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotSource(Json):
    """The shards of one source; see ``training.data.snapshot.Source``."""

    slice: Count
    name: str
    kind: str
    shards: Annotated[tuple[SnapshotShard, ...], Field(min_length=1)]
    given_weight: Finite | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotRecord(Json):
    """What a training reads, as it saves it beside its checkpoints; in the corpora too if these lie elsewhere.

    ``folder``: where the checkpoints are, if that is not where this file is.
    """

    digest: FileName
    sources: tuple[SnapshotSource, ...]
    folder: str = ""

    @property
    def name(self) -> str:
        """The file's name in its folder."""
        return f"snapshot-{self.digest[:16]}.json"
