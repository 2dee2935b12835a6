"""The records: what a stage promises about a shard once it is committed, and the task that leads to it.

Frozen dataclasses that go to and from JSON without loss. The JSON is canonical (sorted keys, no spaces), so a
record's digest is the digest of its bytes.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

Stage = Literal["urls", "crawl", "caption", "rank", "select"]

# Order of the work; ``urls`` is made by the intake, the others by workers.
STAGES: tuple[Stage, ...] = ("crawl", "caption", "rank", "select")

# The folder under the corpus in which a stage's files lie.
STAGE_FOLDERS: dict[Stage, str] = {
    "urls": "urls",
    "crawl": "raw",
    "caption": "captions",
    "rank": "scores",
    "select": "curated",
}

# What a worker's output is a function of, apart from config, weights and input: raise it when code changes it.
STAGE_VERSIONS: dict[Stage, int] = {"urls": 1, "crawl": 1, "caption": 2, "rank": 2, "select": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Json:
    """Base of the records: canonical JSON and back."""

    def to_json(self) -> str:
        """Return canonical JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what ``to_json`` wrote."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a dict of JSON values."""
        return cls(**values)

    def digest(self) -> str:
        """Return the sha256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile(Json):
    """One file that a record commits. ``path`` is relative to the corpus, or a URL outside it (adopted tars)."""

    path: str
    bytes: int
    sha256: str
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram(Json):
    """``counts[i]`` values fell in ``[edges[i], edges[i+1])``; values outside go to the first or last bin."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord(Json):
    """The commit of one shard by one stage. Times are ISO 8601 in UTC."""

    stage: Stage
    source: str
    shard: str
    run_id: str
    attempt: str
    fingerprint: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, OutputFile]
    rows_in: int
    rows_out: int
    images: int
    counts: Mapping[str, int]
    started_at: str
    finished_at: str
    models: tuple[str, ...] = ()
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    host: str = ""
    device: str = "cpu"
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a dict of JSON values, nested parts included."""
        values = dict(values)
        values["outputs"] = {name: OutputFile.from_dict(file) for name, file in values["outputs"].items()}
        values["histograms"] = {
            name: Histogram(edges=tuple(part["edges"]), counts=tuple(part["counts"]))
            for name, part in values["histograms"].items()
        }
        values["models"] = tuple(values["models"])
        return cls(**values)

    def input_digests(self) -> dict[str, str]:
        """Return the sha256 of each output by name: what the next stage's fingerprint takes in."""
        return {name: file.sha256 for name, file in sorted(self.outputs.items())}


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask(Json):
    """What a worker is told to do: one stage on one shard. ``replaces`` is the stale record to retire, if any.

    ``inputs`` are the upstream records by stage name: ``urls`` for crawl; ``crawl`` for caption; ``crawl`` and,
    for a web source, ``caption`` for rank; ``crawl`` and ``rank`` for select.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class IntakeRecord(Json):
    """The commit of one reading of a source's lists: which URLs became which shards.

    ``batch`` counts from 0 per source. A batch is atomic: its url files exist before its record does.
    ``signature`` digests (path, bytes, version) of every input file: equal signature, nothing to read.
    rows_in = rows_new + rows_duplicate + rows_known + rows_without_url. ``adopted`` and ``adopted_bytes`` give,
    by shard, the tars of img2dataset's that stay where they lie.
    """

    source: str
    batch: int
    kind: Literal["lists", "img2dataset", "retry"]
    run_id: str
    attempt: str
    signature: str
    shards: Mapping[str, OutputFile]
    rows_in: int
    rows_new: int
    rows_duplicate: int
    rows_known: int
    finished_at: str
    files: tuple[str, ...] = ()
    rows_without_url: int = 0
    adopted: Mapping[str, str] = field(default_factory=dict)
    adopted_bytes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a dict of JSON values, nested parts included."""
        values = dict(values)
        values["shards"] = {name: OutputFile.from_dict(file) for name, file in values["shards"].items()}
        values["files"] = tuple(values["files"])
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantineRecord(Json):
    """A shard that failed every attempt of a run; the next run tries it again."""

    stage: Stage
    source: str
    shard: str
    run_id: str
    attempts: int
    error: str
    finished_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord(Json):
    """The start (outcome None) or the end of a run; columns as in the table ``runs``."""

    run_id: str
    command: str
    config: Mapping[str, Any]
    config_digest: str
    started_at: str
    host: str
    versions: Mapping[str, str]
    finished_at: str | None = None
    outcome: Literal["done", "partial", "interrupted", "error"] | None = None
    shards_done: int = 0
    shards_skipped: int = 0
    shards_failed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord(Json):
    """A model that a run used; columns as in the table ``models``."""

    digest: str
    kind: str
    name: str
    revision: str
    files: Mapping[str, str]
    parameters: int
    registered_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord(Json):
    """A complete checkpoint; columns as in the table ``checkpoints``."""

    path: str
    stage: str
    run_id: str
    step: int
    samples: int
    snapshot: str
    sha256: Mapping[str, str]
    metrics: Mapping[str, float]
    created_at: str
    models: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a dict of JSON values."""
        return cls(**values | {"models": tuple(values.get("models", ()))})
