"""A run of the stages on a corpus: read new lists, survey what is missing, execute it, and report how that ended.

Which executor does the work (Ray or this process) is chosen in ``_executor``.
"""

import contextlib
import signal
from dataclasses import dataclass, field, replace
from typing import Literal

from rich.console import Console
from rich.markup import escape

from jobs.executor import Executor, ExecutorOutcome, RunMonitor, StageJob
from jobs.interrupts import Interrupts
from jobs.output.progress import open_progress
from jobs.run_record import begin_run
from pipeline.corpus.corpus_state import CorpusState
from pipeline.corpus.records import Records
from pipeline.intake.img2dataset_folders import require_named_folders
from pipeline.intake.read_lists import read_lists
from pipeline.intake.retries import queue_retries
from pipeline.manifest.manifest import Manifest
from pipeline.marks.rules import ShardMarks
from pipeline.marks.search import marks_of_shards
from pipeline.models.weights import Weights, captioner_weights, filter_weights, ranker_weights
from pipeline.runs.limits import RunLimits
from pipeline.runs.plan import ModelDigests, stages_in_use, stale_message
from pipeline.runs.runner import LoadWorker, RunSettings, load_worker
from pipeline.runs.survey import Survey, Totals, survey
from pipeline.storage.patience import Patience
from pipeline.storage.storage import Storage
from pipeline.text import readable_duration
from schemas.config import CapfiltConfig
from schemas.errors import CapfiltError, TryAgainLaterError
from schemas.json_record import utc_now
from schemas.records import RunRecord
from schemas.stages import STAGES, Stage
from schemas.statuses import retried_reasons

_FIRST_SIGNAL = (
    "committed shards stay, those under way are started again by the same command; a second signal does not wait for "
    "the workers and the manifest"
)
_FIRST_SIGNAL_WITH_GRACE = (
    "those under way have {} to be committed, no other begins; a second signal waits for none"
)
_SECOND_SIGNAL = "not waiting for the workers and the manifest"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What the command line says beyond the config."""

    command: str = "run"
    stages: tuple[Stage, ...] = STAGES
    recompute: bool = False
    # Words of pipeline.intake.retries: what ended so is queued again, instead of reading the lists.
    retry: str | None = None
    limit: int | None = None
    limits: RunLimits = field(default_factory=RunLimits)
    quiet: bool = False
    # In this process, without Ray.
    local: bool = False
    # --source was given: the config was cut down to some of its sources.
    only_named: bool = False
    # Makes the stages' workers: a benchmark has some that do no work.
    load: LoadWorker = load_worker


@dataclass(slots=True, kw_only=True)
class RunResult:
    """What a run did: the record of its end, where the corpus stands, and the shards it could not do."""

    record: RunRecord
    survey: Survey
    quarantined: dict[str, str] = field(default_factory=dict)
    note: str = ""
    # Of this run, and of all that the corpus has committed.
    totals: Totals = field(default_factory=Totals)
    corpus_totals: Totals = field(default_factory=Totals)
    corpus: str = ""
    signal: int = signal.SIGINT

    @property
    def exit_code(self) -> int:
        """Return how the process ends.

        0 where everything is done, 3 where shards are quarantined or no image came of all the work, 128 + the signal
        that stopped it.
        """
        codes = {"done": 3 if self.yields_nothing else 0, "partial": 3, "interrupted": 128 + self.signal}
        return codes.get(self.record.outcome or "", 1)

    @property
    def yields_nothing(self) -> bool:
        """Tell whether the corpus has URLs but no image, or images for the selection but none kept."""
        totals = self.corpus_totals
        return (totals.urls > 0 and not totals.images) or (totals.selected > 0 and not totals.kept)


def model_weights(config: CapfiltConfig, stages: tuple[Stage, ...]) -> dict[Stage, list[Weights]]:
    """Find (fetching if need be) the weights that the stages load; refuse what is missing before any work."""
    weights: dict[Stage, list[Weights]] = {}
    stages = stages_in_use(config, stages)
    if "caption" in stages:
        weights["caption"] = [captioner_weights(config.caption)]
    if "filter" in stages and config.filter:
        weights["filter"] = [filter_weights(config.filter)]
    if "rank" in stages:
        weights["rank"] = [ranker_weights(config.rank.model, config.rank.pretrained)]
        if rerank := config.rank.rerank:
            weights["rank"].append(ranker_weights(rerank.model, rerank.pretrained, "rank.rerank"))
    return weights


def digests_of(weights: dict[Stage, list[Weights]]) -> ModelDigests:
    """Return what the fingerprints take in of the weights."""
    return {stage: tuple(model.digest for model in models) for stage, models in weights.items()}


@dataclass(frozen=True, slots=True)
class _Work:
    """A run that is about to start: its config and options, and the state of the corpus before it."""

    config: CapfiltConfig
    options: RunOptions
    records: Records
    manifest: Manifest
    started: RunRecord
    weights: dict[Stage, list[Weights]]
    state: CorpusState
    # Those of the run's start; what is marked meanwhile is for the next run.
    marks: ShardMarks
    before: Survey

    @property
    def todo(self) -> list[tuple[str, str]]:
        return self.before.todo[: self.options.limit]


def run(config: CapfiltConfig, options: RunOptions, console: Console) -> RunResult:
    """Do what is missing of the chosen stages. Safe to repeat, to kill, and to start twice at once.

    SIGINT and SIGTERM end it in order, whenever they come: as ``interrupted``, with what was committed counted.

    Raises CapfiltError before any work where the input is at fault: lists, weights, stale shards without
    ``recompute``, a stage whose own input does not exist yet.
    """
    options = _with_stages_in_use(config, options)
    records = Records(Storage(config.corpus.path))
    records.storage.require_conditional_puts()
    records.storage.require_place("corpus.path")
    started = begin_run(options.command, config)
    grace_s = config.cluster.stop_grace_s
    first = _FIRST_SIGNAL_WITH_GRACE.format(readable_duration(grace_s)) if grace_s else _FIRST_SIGNAL
    with Interrupts(first, _SECOND_SIGNAL) as interrupts:
        work = None
        try:
            work = _prepare(config, options, console, records, started)
            return _run_stages(work, console, interrupts)
        except KeyboardInterrupt:
            return _interrupted(records, started, work, interrupts)


def _with_stages_in_use(config: CapfiltConfig, options: RunOptions) -> RunOptions:
    """Leave out the stages that no source goes through. Raises CapfiltError where a section rules out all of them."""
    stages = stages_in_use(config, options.stages)
    if not stages and "filter" in options.stages:
        raise CapfiltError("filter: the config has no section [filter], or every source is of kind human")
    if not stages and "rank" in options.stages:
        raise CapfiltError('rank: CLIP ranks nothing where select.by = "itm"; set "both" to have its scores')
    return replace(options, stages=stages or options.stages)


def _prepare(
    config: CapfiltConfig, options: RunOptions, console: Console, records: Records, started: RunRecord
) -> _Work:
    """Check the input, read new lists, and return what there is to do."""
    weights = model_weights(config, options.stages)
    models = digests_of(weights)
    manifest = Manifest(records.storage)
    state = CorpusState(records, compacted=manifest.compacted.shard_records)
    marks = marks_of_shards(records, state, save=True)
    before = survey(config, models, state, options.stages, marks=marks)
    if before.stale and not options.recompute:
        raise CapfiltError(stale_message(config, models, records, before.stale, state))
    _require_input(before, options)
    require_named_folders(config.source, state.urls, records.storage)
    if "crawl" in options.stages:
        surveyed = state.urls.keys()
        _read_lists(config, records, started, options, console)
        # Another driver may have read the lists since the survey, so that this one found nothing new in them.
        state.refresh_urls()
        if state.urls.keys() != surveyed:
            marks = marks_of_shards(records, state, save=True)
            before = survey(config, models, state, options.stages, marks=marks)
    return _Work(config, options, records, manifest, started, weights, state, marks, before)


def _run_stages(work: _Work, console: Console, interrupts: Interrupts) -> RunResult:
    """Execute the stages, and write the run's start and end. Raises KeyboardInterrupt where it is interrupted."""
    _print_counts(work.before, work.options, console)
    if not work.todo:
        work.manifest.compact()
        return _end(work, "done")
    work.records.write_run(work.started)
    for models in work.weights.values():
        for model in models:
            work.records.register_model(model.to_record())
    patience = Patience(
        work.config.cluster.storage_patience_s,
        tell=_Telling(console),
        is_stopping=lambda: interrupts.count > 0,
    )
    try:
        outcome = _execute(work, console, interrupts)
        result = patience.call(lambda: _end(work, outcome))
        patience.call(lambda: work.records.write_run(result.record))
    except TryAgainLaterError:
        with contextlib.suppress(OSError):  # most likely it is the storage that is away
            _write_error(work)
        raise
    except Exception:
        _write_error(work)
        raise
    patience.call(work.manifest.compact)
    return result


def _write_error(work: _Work) -> None:
    work.state.refresh()
    done = len(work.state.committed_by(work.started.run_id))
    work.records.write_run(_ended(work.started, "error", done))


class _Telling:
    """Prints what a run waits for after its last shard, once."""

    def __init__(self, console: Console) -> None:
        self._console, self._before = console, ""

    def __call__(self, away: str) -> None:
        if away and not self._before:
            self._console.print(
                f"{away}. Waiting for it, to write the run's end", markup=False, highlight=False
            )
        elif self._before and not away:
            self._console.print("the storage answers again", highlight=False)
        self._before = away


def _execute(work: _Work, console: Console, interrupts: Interrupts) -> ExecutorOutcome:
    config, options = work.config, work.options

    def note_interruption(shards_done: int) -> None:
        # Written at once: a scheduler may leave no time to shut Ray down and to read the records again.
        work.records.write_run(_ended(work.started, "interrupted", shards_done))

    kinds = {source.name: source.kind for source in config.source}
    job = StageJob(
        settings=RunSettings(
            config=config,
            models=digests_of(work.weights),
            run_id=work.started.run_id,
            recompute=options.recompute,
            marks=work.marks,
            retried=work.state.retried,
            load=options.load,
        ),
        stages=options.stages,
        shards=[(kinds[source], work.state.urls[source, shard]) for source, shard in work.todo],
        limits=options.limits,
    )
    json_run = work.started.run_id if config.cluster.log_format == "json" else ""
    display = open_progress(console, work.before, options.stages, options.limit, options.quiet, json_run)
    # Closed wherever the run stops: a live table that is not leaves the terminal without its cursor.
    with contextlib.closing(display):
        monitor = RunMonitor(
            job=job,
            display=display,
            manifest=work.manifest,
            interrupts=interrupts,
            note_interruption=note_interruption,
        )
        return _executor(options.local)(job, monitor)


def _executor(local: bool) -> Executor:
    """Return what runs the stages; only the one that is chosen is imported."""
    if local:
        from jobs.local import run_here

        return run_here
    from jobs.cluster.executor import run_on_ray

    return run_on_ray


def _interrupted(
    records: Records, started: RunRecord, work: _Work | None, interrupts: Interrupts
) -> RunResult:
    """Write the end of a run that was interrupted; of a run whose start was not written, nothing."""
    with interrupts.ignored():
        if work is not None:
            result = _end(work, "interrupted")
        else:
            record = _ended(started, "interrupted", shards_done=0)
            result = RunResult(record=record, survey=Survey(counts=[]), corpus=records.storage.root)
        result.signal = interrupts.number
        if not records.has_begun(started.run_id):
            return result
        records.write_run(result.record)
    if interrupts.count == 1:
        with contextlib.suppress(KeyboardInterrupt):  # readers find the records without it
            Manifest(records.storage).compacted.compact()
    return result


def _read_lists(
    config: CapfiltConfig, records: Records, started: RunRecord, options: RunOptions, console: Console
) -> None:
    """Read the lists, or queue the retries."""
    if options.retry is not None:
        intakes = queue_retries(config, records, started.run_id, retried_reasons(options.retry))
    else:
        intakes = read_lists(config, records, started.run_id)
    new = [intake for intake in intakes if intake.record is not None]
    if new:
        records.write_run(started)
    if not options.quiet:
        for intake in new:
            console.print(escape(str(intake)), highlight=False)
        if options.retry is not None and not new:
            console.print(f"--retry {options.retry}: no URL whose last try ended so", highlight=False)


def _require_input(before: Survey, options: RunOptions) -> None:
    """Raise CapfiltError where no shard has the input of the chosen stages."""
    total = sum(count.total for count in before.counts)
    waiting = sum(count.waiting for count in before.counts)
    if "crawl" not in options.stages and total == waiting:
        raise CapfiltError(
            f"no shard is ready for {' and '.join(options.stages)}: run the stages before it first (capfilt run)"
        )


def _print_counts(before: Survey, options: RunOptions, console: Console) -> None:
    if options.quiet:
        return
    for stage in options.stages:
        count = before.of(stage)
        if not count.total:
            continue
        parts = ("stale", "marked", "waiting", "quarantined")
        rest = "".join(f", {value} {name}" for name in parts if (value := getattr(count, name)))
        console.print(f"{stage:8} {count.done:,} of {count.total:,} shards done{rest}", highlight=False)
    if not options.only_named:
        for source, shards in before.left_config.items():
            console.print(left_config_line(source, shards), highlight=False)


def left_config_line(source: str, shards: int) -> str:
    """Return what becomes of a source that the config no longer names."""
    return f"{source}: the config has no such source; its {shards:,} shards stay as they are, and nothing is added"


def _ended(started: RunRecord, outcome: Literal["interrupted", "error"], shards_done: int) -> RunRecord:
    return replace(started, outcome=outcome, finished_at=utc_now(), shards_done=shards_done)


def _end(work: _Work, outcome: ExecutorOutcome) -> RunResult:
    """Return what became of the run, from the records that are committed now."""
    config, options, state, started = work.config, work.options, work.state, work.started
    after = work.before
    if work.todo:
        state.refresh()
        after = survey(config, digests_of(work.weights), state, options.stages, marks=work.marks)
    with contextlib.suppress(OSError):  # it is repeated at the end of the next run
        work.records.forget_settled(state.committed, ended_run=started.run_id)
    blocking = _blocking_quarantine(work)
    undone = set(work.todo) & set(after.todo)
    failed = outcome != "interrupted" and bool(blocking or undone or outcome == "gave up")
    committed = state.committed_by(started.run_id)
    record = replace(
        started,
        outcome="interrupted" if outcome == "interrupted" else "partial" if failed else "done",
        finished_at=utc_now(),
        shards_done=len(committed),
        shards_skipped=sum(count.done for count in work.before.counts),
        shards_failed=len(blocking),
    )
    waiting = sum(count.waiting for count in after.counts)
    note = f"{waiting:,} shards wait for an earlier stage" if waiting and outcome == "done" else ""
    # Neither done nor quarantined: its worker could not even reach the storage.
    if outcome == "limit" and undone:
        note = f"{len(undone):,} shards were left: the run's limit is reached"
    elif failed and (unreached := undone - {(source, shard) for _, source, shard in state.quarantined}):
        note = "not done: " + ", ".join("/".join(shard) for shard in sorted(unreached))
    if outcome == "gave up":
        note = "stopped: too many shards failed; see the errors above"
    sources = {source.name for source in config.source}
    return RunResult(
        record=record,
        survey=after,
        quarantined=blocking,
        note=note,
        corpus=work.records.storage.root,
        totals=Totals.of(committed),
        corpus_totals=Totals.of(record for record in state.committed.values() if record.source in sources),
    )


def _blocking_quarantine(work: _Work) -> dict[str, str]:
    """Return the errors of the quarantined shards that this run needs, whichever run quarantined them."""
    sources = {source.name for source in work.config.source}
    stages = STAGES[: STAGES.index(work.options.stages[-1]) + 1]
    return {
        f"{stage} {source}/{shard}": record.error
        for (stage, source, shard), record in work.state.quarantined.items()
        if source in sources and stage in stages and (stage, source, shard) not in work.state.committed
    }
