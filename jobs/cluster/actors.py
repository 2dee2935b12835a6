"""The stages as Ray Data sees them: a row is one shard, a stage is a pool of actors that hand the row on."""

import contextlib
import gc
import json
import os
import sys
import time
import uuid
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from jobs.cluster.session import living_nodes
from pipeline.runs.events import ShardEvent
from pipeline.runs.plan import Kind
from pipeline.runs.progress import ProgressCounter, ShardOutcome
from pipeline.runs.runner import Node, RunSettings, ShardRunner
from pipeline.storage.scratch import sweep_temporary_folders
from schemas.config import StageResources
from schemas.errors import CapfiltError, DeviceLostError, TryAgainLaterError
from schemas.records import ShardRecord, WorkerShare
from schemas.stages import Stage

if TYPE_CHECKING:  # not in the workers: it brings the manifest's DuckDB
    from jobs.executor import StageJob

# Shards that one actor works on at once, where not one: of two, one computes on the device while the other is read,
# decoded or written.
CONCURRENT_SHARDS: dict[Stage, int] = {"caption": 2, "rank": 2, "filter": 2}

_ASK_AGAIN_S = 0.5

# Ray's own label of a node's accelerator, such as H100.
_NODE_TYPE_LABEL = "ray.io/accelerator-type"

# State is lost when the actor restarts, and the display starts from zero; records remain authoritative.
ProgressActor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(ProgressCounter)


class StageActor:
    """One actor of a stage's pool. Takes rows ``{source, shard, kind, urls}`` and hands every one of them on.

    Ray runs a task at least once; what a task did before is skipped by its record. Exceptions are handled here and
    in the runner, since Ray restarts only actors that were killed.
    """

    def __init__(
        self,
        stage: Stage,
        settings: RunSettings,
        counter: ray.actor.ActorHandle,
        has_limits: bool,
    ) -> None:
        # As in jobs.cli.main: a model's libraries make many objects that stay.
        gc.set_threshold(50_000)
        sweep_temporary_folders()
        self._counter = counter
        self._id = uuid.uuid4().hex
        # One more call a shard, which is made where a signal leaves time, or the run has limits.
        self._asks_to_begin = has_limits or settings.config.cluster.stop_grace_s > 0
        self._is_json = settings.config.cluster.log_format == "json"
        self._runner = ShardRunner(
            stage,
            settings,
            note=counter.note.remote,
            report_state=counter.report_state.remote,
            report_away=counter.report_away.remote,
            log_event=self._log_event,
            share=_share(getattr(settings.config.cluster, stage)),
            node=Node(name=ray.get_runtime_context().get_node_id(), gone=_gone_nodes),
        )

    def __call__(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        for kind, urls in zip(batch["kind"], batch["urls"], strict=True):
            self._run_shard(str(kind), ShardRecord.from_json(str(urls)))
        return batch

    def _log_event(self, event: ShardEvent) -> None:
        """Have the driver tell of an event; of the usual ones only where its log is for programs."""
        if self._is_json:
            print(json.dumps(event.fields()), file=sys.stderr, flush=True)
        if self._is_json or event.level != "info":
            self._counter.log_event.remote(event)

    def _run_shard(self, kind: Any, urls: ShardRecord) -> None:
        if self._asks_to_begin and not self._may_begin(urls):
            return
        try:
            self._runner.run_shard(kind, urls)
        except DeviceLostError:
            self._end_process()
        except CapfiltError as error:
            # Noted, not raised: across Ray Data an exception arrives as text alone.
            outcome = ShardOutcome(
                stage=self._runner.stage,
                source=urls.source,
                shard=urls.shard,
                state="later" if isinstance(error, TryAgainLaterError) else "refused",
                error=str(error),
            )
            self._counter.note.remote(outcome)

    def _may_begin(self, urls: ShardRecord) -> bool:
        place = (self._runner.stage, urls.source, urls.shard)
        while (answer := ray.get(self._counter.ask_to_begin.remote(*place, self._id))) == "wait":
            time.sleep(_ASK_AGAIN_S)
        return bool(answer == "begin")

    def _end_process(self) -> None:
        """Die, as a killed worker does: Ray starts another process, which tries the shard again."""
        # Calls arrive in order: once one is answered, those before it have arrived.
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._counter.report_state.remote(self._runner.stage, "loading weights"), timeout=10)
        os._exit(1)


def _share(resources: StageResources) -> WorkerShare:
    """Return what this actor holds of its node."""
    labels = ray.get_runtime_context().get_node_labels()
    return WorkerShare(
        cpus=resources.cpus, gpus=resources.gpus, node_type=str(labels.get(_NODE_TYPE_LABEL, ""))
    )


def _gone_nodes(names: Collection[str]) -> set[str]:
    """Return those of some nodes that are not in the cluster any more."""
    return set(names) - {node["NodeID"] for node in living_nodes()}


def _actor_class(stage: Stage) -> type[StageActor]:
    """Return StageActor under a name of the stage: Ray's dashboard and ``ps`` show the name of the class."""
    return type(f"{stage.title()}Actor", (StageActor,), {})


def build_dataset(job: "StageJob", counter: ray.actor.ActorHandle) -> Dataset:
    """Chain the stages' actor pools over the shards, one block a shard, so that shards flow as they are ready."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    context.print_on_execution_start = False
    # An actor killed while it starts is replaced, as one killed at work is; by default it would fail the job.
    context.max_consecutive_actor_init_deaths = 10
    context.execution_no_progress_timeout_s = job.settings.config.cluster.stall_timeout_s
    # Shards in flight over concurrent shards: Ray's 1.75 is out of reach for two concurrent and two in flight. Down
    # under a half, where one actor's two shards leave a second one that just came up.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    context.autoscaling_config.actor_pool_util_downscaling_threshold = 0.4
    rows = [_row(kind, urls) for kind, urls in job.shards]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    for stage in job.stages:
        resources: StageResources = getattr(job.settings.config.cluster, stage)
        concurrent = CONCURRENT_SHARDS.get(stage, 1)
        dataset = dataset.map_batches(
            _actor_class(stage),
            batch_size=1,
            fn_constructor_args=(stage, job.settings, counter, bool(job.limits)),
            num_cpus=resources.cpus,
            num_gpus=resources.gpus or None,
            **placement(resources),
            compute=ActorPoolStrategy(
                min_size=resources.min_workers,
                max_size=resources.max_workers,
                # One in work, one at hand: a deeper queue leaves shards behind a slow worker at the end.
                max_tasks_in_flight_per_actor=2,
                max_concurrent_calls_per_actor=concurrent,
                # Without it Ray Data overlaps its own part of the calls, but runs the actor's method one by one.
                enable_true_multi_threading=concurrent > 1,
            ),
        )
    return dataset


def placement(resources: StageResources) -> dict[str, Any]:
    """Return the options of Ray that say on which nodes a stage's workers may run, beside CPUs and GPUs."""
    options: dict[str, Any] = {"memory": int(resources.memory_gb * 1e9)} if resources.memory_gb else {}
    return options | ({"label_selector": dict(resources.labels)} if resources.labels else {})


def _row(kind: Kind, urls: ShardRecord) -> dict[str, str]:
    return {"source": urls.source, "shard": urls.shard, "kind": kind, "urls": urls.to_json()}
