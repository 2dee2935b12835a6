"""A corpus in Python: opened for SQL, samples and traces; and the run that makes or continues one."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

from capfilt.query_result import QueryResult
from capfilt.samples import Sample, SampleView, read_curated, view
from jobs.cli.options import open_manifest
from pipeline.config import load_config
from pipeline.corpus.records import Records
from pipeline.lineage.sample_trace import trace as trace_sample
from pipeline.manifest import status
from pipeline.manifest.manifest import Manifest
from schemas.config import CapfiltConfig
from schemas.errors import CapfiltError, did_you_mean
from schemas.names import printable
from schemas.stages import STAGES, Stage


class SampleTrace(TypedDict):
    """How a sample came about, as ``capfilt trace --json`` prints it; times are datetimes here.

    ``fetches``: oldest first. ``candidates``: those that were kept first, then best first, each with its ``outcome``
    in words. ``selection`` is None until the sample's shard is selected. ``marks``: taken back or not.
    ``checkpoints``: those whose training had the image; ``use``: trained on, held out or not known. ``taught_by``: the
    checkpoints and sources that the sample's models were trained on.
    """

    uid: str
    source: str
    url: str
    captions: list[str]
    extra: str | None
    shard: str
    key: str
    tar: str | None
    curated_tar: str | None
    fetches: list[dict[str, Any]]
    candidates: list[dict[str, Any]]
    selection: dict[str, Any] | None
    marks: list[dict[str, Any]]
    checkpoints: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    runs: list[dict[str, Any]]
    models: list[dict[str, Any]]
    taught_by: list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Run:
    """What a run did; its ``repr`` are its lines.

    Attributes:
        corpus: the corpus, opened.
        run_id: as in the table ``runs``.
        outcome: ``done``, ``partial`` (shards are quarantined) or ``interrupted``.
        exit_code: the one that ``capfilt run`` would end with: 0 where all is well.
        summary: what ``capfilt run --json`` prints.
        lines: what ``capfilt run`` prints at its end.
    """

    corpus: "Corpus"
    run_id: str
    outcome: str
    exit_code: int
    summary: dict[str, Any]
    lines: tuple[str, ...]

    def __repr__(self) -> str:
        return "\n".join(self.lines)


class Corpus:
    """A corpus on local disk, S3 or GCS, read as it stands at each call, also while a run works on it."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._records = Records(manifest.storage)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Corpus":
        """Open the corpus in a folder or below a URL (``s3://``, ``gs://``).

        Raises CapfiltError where there is none.
        """
        return cls(open_manifest(os.fspath(path)))

    @classmethod
    def run(
        cls,
        config: str | os.PathLike[str] | CapfiltConfig,
        *,
        overrides: Sequence[str] = (),
        local: bool = False,
        stages: Sequence[Stage] = STAGES,
        recompute: bool = False,
        retry: str | None = None,
        limit: int | None = None,
        max_gpu_hours: float | None = None,
        max_hours: float | None = None,
        quiet: bool = True,
    ) -> Run:
        """Do what is missing of the corpus that a config describes, as ``capfilt run`` does.

        Safe to interrupt and to repeat.

        Args:
            config: the TOML file, or a config that was loaded.
            overrides: as ``--set``: ``("caption.num_captions=5",)``.
            local: in this process, a shard at a time, without Ray; else on Ray, on the cluster of ``cluster.address``.
            stages: of ``crawl``, ``caption``, ``rank``, ``filter`` and ``select``, in this order.
            recompute: replace stale shards.
            retry: as ``--retry``: ``"transient"``, or statuses or reasons.
            limit: work on at most so many shards.
            max_gpu_hours: begin no shard once the run's workers have used so many.
            max_hours: begin no shard after so many.
            quiet: show no progress on standard error.

        Raises:
            CapfiltError: the config, a list or a model is at fault; nothing was done.
        """
        # Here: they import torch's and open_clip's neighbours, which reading a corpus does not need.
        from rich.console import Console

        from jobs.cli.summary import result_json, result_lines
        from jobs.run import RunOptions, run
        from pipeline.runs.limits import RunLimits

        for argument, values in (("overrides", overrides), ("stages", stages)):
            if isinstance(values, str):
                raise CapfiltError(f"{argument}: a list is expected; put a single one into brackets")
        if unknown := set(stages) - set(STAGES):
            raise CapfiltError(f"stages: {', '.join(sorted(unknown))} is not of {', '.join(STAGES)}")
        if not stages:
            raise CapfiltError(f"stages: there is none; name some of {', '.join(STAGES)}")
        if limit is not None and limit < 1:
            raise CapfiltError(f"limit: {limit}: at least 1 is expected, or None")
        if isinstance(config, CapfiltConfig):
            if overrides:
                raise CapfiltError("overrides are of a config file: change the loaded config itself")
            loaded, name = config, "FILE"
        else:
            name = os.fspath(config)
            loaded = load_config(name, overrides)
        chosen = tuple(stage for stage in STAGES if stage in stages)
        options = RunOptions(
            command=chosen[0] if len(chosen) == 1 else "run",
            stages=chosen,
            local=local,
            recompute=recompute,
            retry=retry,
            limit=limit,
            limits=RunLimits(gpu_hours=max_gpu_hours, hours=max_hours),
            quiet=quiet,
        )
        result = run(loaded, options, Console(stderr=True))
        return Run(
            corpus=cls.open(result.corpus),
            run_id=result.record.run_id,
            outcome=result.record.outcome or "",
            exit_code=result.exit_code,
            summary=result_json(result, name),
            lines=tuple(map(printable, result_lines(result, name))),
        )

    @property
    def path(self) -> str:
        """The folder or URL of the corpus."""
        return self._manifest.storage.root

    def __repr__(self) -> str:
        return f"Corpus({self.path!r})"

    def sql(
        self,
        query: str,
        parameters: Sequence[Any] | Mapping[str, Any] = (),
        *,
        timeout_s: float = 600.0,
        memory: str = "50%",
    ) -> QueryResult:
        """Answer one SELECT over the tables of docs/manifest.md, as ``capfilt sql`` does: nothing else can be read.

        Args:
            query: DuckDB's SQL, with ``?``, ``$1`` or ``$name`` in the place of values.
            parameters: the values: in order, or by name.
            timeout_s: after which the query is given up.
            memory: that it may use: a size such as ``4GB``, or a share of this machine's.

        Raises:
            CapfiltError: the SQL is wrong, is not a read, or takes too long or too much.
        """
        return QueryResult(self._manifest.table(query, parameters, timeout_s=timeout_s, memory=memory))

    def samples(self, *, source: str | None = None, shard: str | None = None) -> Iterator[Sample]:
        """Return an iterator over the curated samples, by source, shard and key.

        Streams: an image is read when its turn comes, and one is in memory at a time. A shard's files are checked
        against its record first; on object storage they are copied to this machine one shard at a time.

        Args:
            source: only those of this ``[[source]]``.
            shard: only those of the shards with this number: five digits, as the tables have it.

        Raises:
            CapfiltError: no curated shard has this source or this shard.
            CorruptShardError: while iterating, a file that is not that of its record.
        """
        curated = {place[1:]: record for place, record in sorted(self._records.shards(("select",)).items())}
        for word, wanted, known in (
            ("source", source, {name for name, _ in curated}),
            ("shard", shard, {number for name, number in curated if source in (None, name)}),
        ):
            if wanted is not None and wanted not in known:
                raise CapfiltError(
                    f"{self.path} has no curated {word} {wanted!r}{did_you_mean(wanted, known)}"
                )
        return (
            sample
            for (name, number), record in curated.items()
            if source in (None, name) and shard in (None, number)
            for sample in read_curated(self._records, record)
        )

    def trace(self, uid_or_url: str) -> list[SampleTrace]:
        """Return how the sample with this uid or URL came about; one trace for each source that lists the URL.

        Raises CapfiltError where no crawled sample has it.
        """
        return cast(list[SampleTrace], trace_sample(self._manifest, uid_or_url))

    def show(self, uid_or_url: str, *, source: str | None = None) -> SampleView:
        """Return a sample for display: its image, and each candidate with score, and whether and why it was kept.

        Args:
            uid_or_url: as the tables have it.
            source: which of the sources that list the URL.

        Raises:
            CapfiltError: no crawled sample has it, or several sources list the URL and ``source`` is None.
        """
        by_source = {trace["source"]: trace for trace in self.trace(uid_or_url)}
        if (len(by_source) > 1 and source is None) or source not in (None, *by_source):
            raise CapfiltError(
                f"{uid_or_url!r} is listed by {', '.join(by_source)}: give one of them as source"
            )
        return view(self._records, by_source[source] if source else next(iter(by_source.values())))

    def stats(self) -> dict[str, list[dict[str, Any]]]:
        """Return success, outcomes, score and length quantiles, and rates, as ``capfilt stats --json`` does."""
        return status.stats(self._manifest)

    def failures(
        self, *, hosts: bool = False, source: str | None = None, limit: int = 50
    ) -> list[dict[str, Any]]:
        """Return the reasons why URLs gave no image, the commonest first, as ``capfilt failures --json`` does.

        Args:
            hosts: count by host too.
            source: only this ``[[source]]``.
            limit: at most so many rows.
        """
        return status.failures(self._manifest, hosts=hosts, source=source, limit=limit)
