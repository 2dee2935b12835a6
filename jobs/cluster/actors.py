"""The stages as Ray Data sees them: a row is one shard, a stage is a pool of actors that hand the row on."""

import os
import socket
import time
import traceback
from collections.abc import Mapping
from threading import Lock
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from jobs.cluster.progress_actor import Outcome
from jobs.cluster.sharing import Calls
from pipeline.corpus.records import Records
from pipeline.corpus.scratch import sweep_temporary_folders
from pipeline.corpus.storage import Storage
from pipeline.stages.plan import ModelDigests, next_step, stages_of, upstream_of
from schemas.config import CapfiltConfig, StageResources
from schemas.errors import CapfiltError, CorruptShardError, NotFiniteError
from schemas.records import QuarantineRecord, ShardRecord, ShardTask, Stage, utc_now

# Between tries of a step whose storage fails outside the worker's own attempts.
_STORAGE_WAITS_S = (1.0, 10.0, 60.0)


def stage_worker(stage: Stage, config: CapfiltConfig, records: Records) -> Any:
    """Return the stage's worker: ``worker(ShardTask) -> ShardRecord``. Imports only what the stage needs."""
    match stage:
        case "crawl":
            from pipeline.stages.crawl import CrawlWorker

            return CrawlWorker(config, records)
        case "caption":
            from pipeline.stages.caption import CaptionWorker

            return CaptionWorker(config, records)
        case "rank":
            from pipeline.stages.rank import RankWorker

            return RankWorker(config, records)
        case "select":
            from pipeline.stages.selection import SelectWorker

            return SelectWorker(config, records)
    raise AssertionError(stage)


class StageActor:
    """One actor of a stage's pool. Takes rows ``{source, shard, kind, urls}`` and hands every one of them on.

    Ray runs a task at least once; what it has done before is skipped by its record. An exception is tried again
    here (Ray restarts only killed actors), up to ``cluster.max_attempts`` begun attempts in this run, whoever
    began them: a shard that kills its worker ends in quarantine too. Where calls run at once, a shard whose
    attempt did not end well is tried again alone, so that it costs its neighbours one attempt at most.
    """

    stage: Stage
    calls_at_once = 1

    def __init__(
        self,
        config: CapfiltConfig,
        models: ModelDigests,
        run_id: str,
        recompute: bool,
        tracker: ray.actor.ActorHandle,
    ) -> None:
        self.config = config
        self.models = models
        self.run_id = run_id
        self.recompute = recompute
        self.tracker = tracker
        self.records = Records(Storage(config.corpus.path))
        self._worker: Any = None
        self._loading = Lock()
        self._calls = Calls()
        sweep_temporary_folders()
        tracker.tell.remote(self.stage, "waiting for a shard")

    def __call__(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        for source, shard, kind, urls in zip(
            batch["source"], batch["shard"], batch["kind"], batch["urls"], strict=True
        ):
            outcome = self._persist(str(source), str(shard), str(kind), str(urls))
            self.tracker.note.remote(outcome)
        return batch

    def _persist(self, source: str, shard: str, kind: Any, urls: str) -> Outcome:
        """Do the step, through a spell in which the storage does not answer; then give the shard up."""
        for wait_s in (*_STORAGE_WAITS_S, None):
            try:
                return self._advance(source, shard, kind, urls)
            except CapfiltError as mistake:
                # Told, not raised: across Ray Data an exception arrives as text alone.
                return Outcome(
                    stage=self.stage, source=source, shard=shard, state="refused", error=str(mistake)
                )
            except OSError as failure:
                if wait_s is None:
                    return Outcome(
                        stage=self.stage, source=source, shard=shard, state="quarantined", error=repr(failure)
                    )
                time.sleep(wait_s)
        raise AssertionError

    def _advance(self, source: str, shard: str, kind: Any, urls: str) -> Outcome:
        """Do this stage of the shard if it is to be done, and say what came of it."""
        if self.stage not in stages_of(kind):
            return Outcome(stage=self.stage, source=source, shard=shard, state="absent")
        upstream: dict[Stage, ShardRecord] = {"urls": ShardRecord.from_json(urls)}
        for name in upstream_of(self.stage, kind):
            if name != "urls" and (record := self.records.read(name, source, shard)) is not None:
                upstream[name] = record
        committed = self.records.read(self.stage, source, shard)
        step = next_step(
            self.config, self.models, self.stage, (source, shard), kind, upstream, committed, self.run_id
        )
        if step.task is None or (step.state == "stale" and not self.recompute):
            state = "skipped" if step.state == "done" else step.state
            return Outcome.of(state, self.stage, source, shard, committed)
        return self._attempt(step.task)

    def _attempt(self, task: ShardTask) -> Outcome:
        """Try until the shard is committed or its attempts are used up. Raises CapfiltError: the run is wrong."""
        error = "the worker died on every attempt"
        shard = (task.stage, task.source, task.shard)
        while True:
            again = self.records.attempts_begun(*shard, task.run_id) > 0
            with self._calls.alone() if again else self._calls.together():
                begun = self.records.begin_attempt(*shard, os.urandom(6).hex(), task.run_id)
                if begun > task.max_attempts:
                    break
                try:
                    record = self._ready_worker()(task)
                    return Outcome.of("done", *shard, record)
                except (CorruptShardError, NotFiniteError) as damaged:
                    error = str(damaged)
                    break  # another try reads the same bytes, and computes the same
                except CapfiltError:
                    raise
                except Exception as failure:
                    error = "".join(traceback.format_exception(failure, limit=-4)).strip()
            # Fresh weights, fresh device memory, once nobody uses the old ones.
            with self._calls.alone():
                self._worker = None
        standing = self.records.read(task.stage, task.source, task.shard)
        if standing is not None and standing.fingerprint == task.fingerprint:
            return Outcome.of("done", task.stage, task.source, task.shard, standing)
        self.records.quarantine(
            QuarantineRecord(
                stage=task.stage,
                source=task.source,
                shard=task.shard,
                run_id=task.run_id,
                attempts=min(begun, task.max_attempts),
                error=error[-4000:],
                finished_at=utc_now(),
            )
        )
        return Outcome(
            stage=task.stage, source=task.source, shard=task.shard, state="quarantined", error=error
        )

    def _ready_worker(self) -> Any:
        """Return the worker, its weights loaded and found to be those that the fingerprints name."""
        with self._loading:
            if self._worker is None:
                if self.models.get(self.stage):
                    self.tracker.tell.remote(self.stage, "loading weights")
                worker = stage_worker(self.stage, self.config, self.records)
                planned = self.models.get(self.stage, ())
                if getattr(worker, "models", ()) != planned:
                    raise CapfiltError(
                        f"{socket.gethostname()} has other weights for {self.stage} than the driver: pin "
                        "caption.revision (or hf-hub:...@REVISION), or make the model folder the same on every "
                        "node"
                    )
                self._worker = worker
                self.tracker.tell.remote(self.stage, "at work")
            return self._worker


# A class a stage, because its name is what Ray's dashboard and ``ps`` show.
class CrawlActor(StageActor):
    """Fetches."""

    stage = "crawl"


class CaptionActor(StageActor):
    """Captions: one shard has the device while the other is read, decoded or written."""

    stage = "caption"
    calls_at_once = 2


class RankActor(StageActor):
    """Ranks, two shards at once as ``CaptionActor``."""

    stage = "rank"
    calls_at_once = 2


class SelectActor(StageActor):
    """Selects."""

    stage = "select"


_ACTORS: dict[Stage, type[StageActor]] = {
    actor.stage: actor for actor in (CrawlActor, CaptionActor, RankActor, SelectActor)
}


def build_dataset(
    rows: list[dict[str, str]],
    stages: tuple[Stage, ...],
    config: CapfiltConfig,
    models: ModelDigests,
    run_id: str,
    recompute: bool,
    tracker: ray.actor.ActorHandle,
) -> Dataset:
    """Chain the stages' actor pools over the shards, one block a shard, so that shards flow as they are ready."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    context.print_on_execution_start = False
    # An actor killed while it starts is replaced, as one killed at work is; by default it would fail the job.
    context.max_consecutive_actor_init_deaths = 10
    context.execution_no_progress_timeout_s = config.cluster.stall_timeout_s
    # Shards in flight over calls at once: Ray's 1.75 is out of reach for two calls and two shards. Down under a
    # half, where one actor's two shards leave a second one that just came up.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    context.autoscaling_config.actor_pool_util_downscaling_threshold = 0.4
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    for stage in stages:
        actor = _ACTORS[stage]
        resources: StageResources = getattr(config.cluster, stage)
        dataset = dataset.map_batches(
            actor,
            batch_size=1,
            fn_constructor_args=(config, models, run_id, recompute, tracker),
            num_cpus=resources.cpus,
            num_gpus=resources.gpus or None,
            compute=ActorPoolStrategy(
                min_size=resources.min_workers,
                max_size=resources.max_workers,
                # One in work, one at hand: a deeper queue leaves shards behind a slow worker at the end.
                max_tasks_in_flight_per_actor=2,
                max_concurrent_calls_per_actor=actor.calls_at_once,
                # Otherwise Ray Data overlaps its own part of the calls, and not ours.
                enable_true_multi_threading=actor.calls_at_once > 1,
            ),
        )
    return dataset


def dataset_row(kind: str, urls: ShardRecord) -> dict[str, str]:
    """Return the row that carries a shard through the stages."""
    return {"source": urls.source, "shard": urls.shard, "kind": kind, "urls": urls.to_json()}
