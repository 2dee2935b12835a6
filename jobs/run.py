"""A run: read the lists, see what is missing, stream the shards through the stages, keep the manifest fresh."""

import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Literal

import ray
from ray.data.exceptions import ExecutionTimeoutError
from rich.console import Console
from rich.markup import escape

from jobs.cluster import ray_session
from jobs.progress import Progress, open_progress
from jobs.stages import build_dataset, dataset_row
from jobs.tracker import Tracker
from pipeline.attempt import library_versions
from pipeline.configfile import config_digest, dump_config
from pipeline.intake import queue_retries, read_lists
from pipeline.manifest import Manifest
from pipeline.plan import ModelDigests, Survey, survey
from pipeline.records import Records, now
from pipeline.storage import Storage
from pipeline.urlshards import url_shards
from pipeline.weights import Weights, captioner_weights, ranker_weights
from schemas.config import CapfiltConfig
from schemas.errors import CapfiltError
from schemas.records import STAGES, RunRecord, ShardRecord, Stage

_POLL_S = 0.5

# Times that a broken execution (not a broken shard) is started anew within one run.
_PASSES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What the command line says beyond the config."""

    command: str = "run"
    stages: tuple[Stage, ...] = STAGES
    recompute: bool = False
    retry: Literal["transient"] | None = None
    limit: int | None = None
    quiet: bool = False


@dataclass(slots=True, kw_only=True)
class RunResult:
    """What a run did: the record of its end, where the corpus stands, and the shards it could not do."""

    record: RunRecord
    survey: Survey
    quarantined: dict[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """Return 0 where everything is done, 3 where shards are quarantined, 130 after Ctrl-C."""
        return {"done": 0, "partial": 3, "interrupted": 130}.get(self.record.outcome or "", 1)


def new_run_id() -> str:
    """Return an id that sorts by start."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def model_weights(config: CapfiltConfig, stages: tuple[Stage, ...]) -> dict[Stage, list[Weights]]:
    """Find (fetching if need be) the weights that the stages load; refuse what is missing before any work."""
    weights: dict[Stage, list[Weights]] = {}
    if "caption" in stages and any(source.kind == "web" for source in config.source):
        weights["caption"] = [captioner_weights(config.caption)]
    if "rank" in stages:
        weights["rank"] = [ranker_weights(config.rank.model, config.rank.pretrained)]
        if config.rank.rerank:
            rerank = config.rank.rerank
            weights["rank"].append(ranker_weights(rerank.model, rerank.pretrained, "rank.rerank"))
    return weights


def digests_of(weights: dict[Stage, list[Weights]]) -> ModelDigests:
    """Return what the fingerprints take in of the weights."""
    return {stage: tuple(model.digest for model in models) for stage, models in weights.items()}


def survey_corpus(
    config: CapfiltConfig,
    records: Records,
    models: ModelDigests,
    stages: tuple[Stage, ...],
    unread_rows: Mapping[str, int] = MappingProxyType({}),
) -> tuple[Survey, dict[tuple[str, str], ShardRecord]]:
    """Return where the corpus stands, and its url shards."""
    urls = url_shards(records)
    found = survey(config, models, urls, records.shards(), records.quarantined(), stages, unread_rows)
    return found, urls


def run(config: CapfiltConfig, options: RunOptions, console: Console) -> RunResult:
    """Do what is missing of the chosen stages. Safe to repeat, to kill, and to start twice at once.

    Raises CapfiltError before any work where the input is at fault: lists, weights, stale shards without
    ``recompute``, a stage whose own input does not exist yet.
    """
    records = Records(Storage(config.corpus.path))
    manifest = Manifest(records.storage)
    weights = model_weights(config, options.stages)
    models = digests_of(weights)
    run_record = RunRecord(
        run_id=new_run_id(),
        command=options.command,
        config=dump_config(config),
        config_digest=config_digest(config),
        started_at=now(),
        host=socket.gethostname(),
        versions=library_versions(),
    )
    if "crawl" in options.stages:
        _take_in_lists(config, records, run_record.run_id, options, console)
    before, urls = survey_corpus(config, records, models, options.stages)
    _refuse(before, options)
    _say_before(before, options, console)
    todo = before.todo[: options.limit]
    if not todo:
        manifest.compact()
        done = replace(run_record, outcome="done", finished_at=now())
        return RunResult(record=done, survey=before)
    records.write_run(run_record)
    for models_of_stage in weights.values():
        for model in models_of_stage:
            records.register_model(model.to_record())
    kinds = {source.name: source.kind for source in config.source}
    rows = [dataset_row(kinds[source], urls[source, shard]) for source, shard in todo]
    progress = open_progress(console, before, options.stages, options.quiet)
    try:
        outcome = _stream(rows, config, models, run_record.run_id, options, manifest, progress)
    except BaseException:
        records.write_run(replace(run_record, outcome="error", finished_at=now()))
        raise
    return _finish(run_record, outcome, records, manifest, config, models, options, before)


def _take_in_lists(
    config: CapfiltConfig, records: Records, run_id: str, options: RunOptions, console: Console
) -> None:
    if options.retry is not None:
        taken = queue_retries(config, records, run_id)
    else:
        taken = read_lists(config, records, run_id)
    for intake in taken:
        if intake.record is not None and not options.quiet:
            console.print(escape(str(intake)), highlight=False)


def _refuse(before: Survey, options: RunOptions) -> None:
    """Stop before any spending where the run would not do what the user expects."""
    if before.stale and not options.recompute:
        named = ", ".join("/".join(shard) for shard in before.stale[:3])
        raise CapfiltError(
            f"{len(before.stale)} committed shards are stale ({named}{', ...' if len(before.stale) > 3 else ''}): "
            "they were made with another config, other weights or other input. Restore the config, make a "
            "corpus at another corpus.path, or run again with --recompute to replace them"
        )
    total = sum(count.total for count in before.counts)
    waiting = sum(count.waiting for count in before.counts)
    if "crawl" not in options.stages and total == waiting:
        raise CapfiltError(
            f"no shard is ready for {' and '.join(options.stages)}: run the stages before it first (capfilt run)"
        )


def _say_before(before: Survey, options: RunOptions, console: Console) -> None:
    if options.quiet:
        return
    for stage in options.stages:
        count = before.of(stage)
        if not count.total:
            continue
        rest = "".join(
            f", {value} {name}"
            for name, value in (
                ("stale", count.stale),
                ("waiting", count.waiting),
                ("quarantined", count.quarantined),
            )
            if value
        )
        console.print(f"{stage:8} {count.done:,} of {count.total:,} shards done{rest}", highlight=False)


def _stream(
    rows: list[dict[str, str]],
    config: CapfiltConfig,
    models: ModelDigests,
    run_id: str,
    options: RunOptions,
    manifest: Manifest,
    progress: Progress,
) -> Literal["done", "interrupted"]:
    """Drive the rows through the actor pools while threads show progress and compact the manifest."""
    with _terminated_as_interrupt(), ray_session(config, options.stages):
        # On the driver's node, so that no other node's death takes it along.
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        )
        tracker = Tracker.options(scheduling_strategy=here).remote()
        stop = threading.Event()
        watcher = threading.Thread(
            target=_watch,
            args=(stop, tracker, manifest, progress, config.cluster.compact_interval_s),
            daemon=True,
        )
        watcher.start()
        try:
            for attempt in range(_PASSES):
                dataset = build_dataset(
                    rows, options.stages, config, models, run_id, options.recompute, tracker
                )
                try:
                    for _ in dataset.iter_batches(batch_size=None, prefetch_batches=0):
                        pass
                    return "done"
                except (ray.exceptions.RayError, ExecutionTimeoutError):
                    # A node went and took the pool's actors or objects along. What was committed is skipped.
                    if attempt == _PASSES - 1:
                        raise
            raise AssertionError
        except KeyboardInterrupt:
            return "interrupted"
        finally:
            stop.set()
            watcher.join(timeout=30)
            progress.close()


def _watch(
    stop: threading.Event,
    tracker: ray.actor.ActorHandle,
    manifest: Manifest,
    progress: Progress,
    compact_interval_s: float,
) -> None:
    compacted = time.monotonic()
    last = False
    while not last:
        last = stop.wait(_POLL_S)
        try:
            progress.update(ray.get(tracker.snapshot.remote(), timeout=10))
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            continue  # the tracker is being restarted, or Ray is going down
        if time.monotonic() - compacted >= compact_interval_s:
            manifest.compact()
            compacted = time.monotonic()


@contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM (a scheduler's stop) like Ctrl-C, where signals can be set at all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _finish(
    run_record: RunRecord,
    outcome: Literal["done", "interrupted"],
    records: Records,
    manifest: Manifest,
    config: CapfiltConfig,
    models: ModelDigests,
    options: RunOptions,
    before: Survey,
) -> RunResult:
    """Recount from the records, write the run's end and the manifest."""
    after, _ = survey_corpus(config, records, models, options.stages)
    quarantined = {
        f"{stage} {source}/{shard}": record.error
        for (stage, source, shard), record in records.quarantined().items()
        if record.run_id == run_record.run_id
    }
    done = sum(1 for record in records.shards(options.stages).values() if record.run_id == run_record.run_id)
    ended = replace(
        run_record,
        outcome="partial" if outcome == "done" and quarantined else outcome,
        finished_at=now(),
        shards_done=done,
        shards_skipped=sum(count.done for count in before.counts),
        shards_failed=len(quarantined),
    )
    records.write_run(ended)
    manifest.compact()
    return RunResult(record=ended, survey=after, quarantined=quarantined)
