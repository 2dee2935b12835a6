"""The training loop, the same on every rank: steps whose losses are checked, reported and checkpointed."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, distributed

from pipeline.models.checks import not_finite_tensors, require_finite_weights
from pipeline.storage.errors import storage_error_message
from pipeline.text import readable_duration
from schemas.errors import CapfiltError, first_line
from schemas.pretrain import PretrainConfig
from schemas.records import CheckpointRecord, ModelRecord
from training.checkpoint import Checkpoints, State, TrainingProgress
from training.data.loader import Batch
from training.distributed import World
from training.lease import LostLeaseError
from training.models.parameters import PartlyTrained
from training.trainer.metrics import OfRanks, Sink, Throughput
from training.trainer.steps.gradient_sum import make_gradient_sum
from training.trainer.steps.optim import (
    Schedule,
    clip_gradients,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    set_lr,
)
from training.trainer.steps.seconds import StepSeconds
from training.trainer.steps.skipped import MAX_SKIPPED, WINDOW_STEPS, SkippedSteps, not_finite
from training.trainer.summary import Summary

_ADVICE = (
    "The same command would fail again: lower optim.peak_lr, or set optim.clip_norm, under another run.name with "
    "run.init_from that checkpoint"
)


class TrainingStopped(Exception):
    """Report that training cannot continue, and from which checkpoint it can; takes one string, for people."""


class LostRankError(TrainingStopped):
    """Report that another rank has died: the run may be restarted unchanged."""


@dataclass(kw_only=True)
class Loop:
    """The training of one rank: ``run`` does it.

    ``config`` is filled by its preset. Only rank 0 has ``sinks`` and ``record_checkpoint`` (called when a checkpoint
    is committed), and ``probe`` unless it needs all ranks. ``stop_asked`` is called in each step, on every rank.
    """

    config: PretrainConfig
    world: World
    stage: PartlyTrained
    checkpoints: Checkpoints
    run_id: str
    snapshot: str
    models: Sequence[ModelRecord] = ()
    sinks: list[Sink] = field(default_factory=list)
    record_checkpoint: Callable[[CheckpointRecord], None] = lambda record: None
    probe: Callable[[], Mapping[str, float]] | None = None
    stop_asked: Callable[[], bool] = lambda: False
    log: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self.parameters = list(self.stage.trainable_named_parameters())
        self.optimizer = make_optimizer(self.parameters, self.config.optim)
        self.schedule = Schedule.of(self.config.optim)
        self.gradient_sum = make_gradient_sum(
            self.config.performance.gradient_sum, self.world, self.parameters
        )
        self.stage.begin_last_passes = self.gradient_sum.begin_last_passes
        self.step = 0
        self.skipped = SkippedSteps(self.checkpoints.storage)
        self.last_lease = 0
        self._last: CheckpointRecord | None = None
        # Read before its step, with the seconds that took.
        self._next_batch: tuple[Batch, float] | None = None
        self.seconds = StepSeconds(self.world.device)

    @property
    def samples(self) -> int:
        """Samples consumed by all ranks."""
        return self.step * self.config.optim.batch_size

    def resume(self, state: State, record: CheckpointRecord) -> None:
        """Restore a checkpoint: after this, ``run`` computes exactly what it would have computed uninterrupted.

        Raises CapfiltError where it holds NaN or infinity.
        """
        where = self.checkpoints.storage.url(record.path)
        require_finite_weights(state.model, where)
        require_finite_weights(state.optimizer, f"{where}: the optimiser")
        self.stage.load_trainable_state(state.model)
        self.stage.load_auxiliary_state(state.auxiliary)
        load_optimizer_state(self.optimizer, self.parameters, state.optimizer)
        self.step = state.progress.step
        self.skipped = SkippedSteps(self.checkpoints.storage, state.progress.skipped_steps)
        self.last_lease = state.progress.lease
        self._last = record
        if self.samples != state.progress.samples:
            raise CapfiltError(
                f"{where} says {state.progress.samples:,} samples after "
                f"{self.step:,} steps, and a batch has {self.config.optim.batch_size:,}: it is not of this run"
            )

    def run(self, batches: Iterator[Batch]) -> Summary:
        """Train from the current step to the last one, or until a stop is asked for.

        Args:
            batches: the data from sample ``self.samples`` on.

        Raises:
            TrainingStopped: the first loss or gradient is not finite, or too many are; the storage takes no
                checkpoint; or the device's memory is full. The last committed checkpoint remains.
            LostRankError: another rank has died.
        """
        started = self.step
        try:
            outcome, values = self._steps(batches)
            with self._writing():
                self.checkpoints.wait()
            # No rank leaves before the checkpoint is committed: a launcher may end all ranks when the first one ends.
            self.world.barrier()
        except RuntimeError as error:
            if stopped := self._as_stop(error):
                raise stopped from error
            raise
        finally:
            self._commit_pending()
        return Summary(
            run_id=self.run_id,
            outcome=outcome,
            folder=self.checkpoints.storage.root,
            step=self.step,
            steps=self.schedule.steps,
            samples=self.samples,
            resumed_from=started,
            metrics=values,
            checkpoint=self._last.path if self._last else "",
        )

    def _steps(
        self, batches: Iterator[Batch]
    ) -> tuple[Literal["done", "interrupted"], dict[str, float | None]]:
        config = self.config
        throughput = Throughput(self.world, self.stage.flops_per_sample, self.seconds)
        self.stage.train()
        values: dict[str, float | None] = {}
        while self.step < self.schedule.steps:
            waited_s, losses, asked = self._one_step(batches)
            throughput.add(config.optim.batch_size, waited_s)
            is_last = asked or self.step == self.schedule.steps
            if self.step % config.metrics.every_steps == 0 or is_last:
                counts = {"samples": self.samples, "skipped_steps": len(self.skipped.steps)}
                values = {**counts, **losses, **throughput.report()}
                self._write(values, throughput.of_ranks)
                self.log(progress_line(self.step, self.schedule.steps, values))
            saves = is_last or self.step % config.checkpoint.every_steps == 0
            # A rank that is asked to stop has little time: its checkpoint is written without a probe.
            measured = self._probed() if self._probe_is_due(saves and not asked) else {}
            if saves:
                self._save({**losses, **measured})
            if asked:
                return "interrupted", values
        return "done", values

    def _probe_is_due(self, before_checkpoint: bool) -> bool:
        """Return whether this step has a probe: the same on every rank."""
        options, every_steps = self.config.checkpoint, self.config.probe.every_steps
        is_kept = options.keep_every and self.step % options.keep_every == 0
        return bool(
            (every_steps and (self.step % every_steps == 0 or (before_checkpoint and is_kept)))
            or (before_checkpoint and options.keep_best)
        )

    def _probed(self) -> dict[str, float]:
        """Return and write what the probe measures; nothing on a rank without one."""
        if self.probe is None:
            return {}
        values = {f"probe_{name}": value for name, value in self.probe().items()}
        self._write(values)
        self.stage.train()
        return values

    def _one_step(self, batches: Iterator[Batch]) -> tuple[float, dict[str, float | None], bool]:
        """Do one step; return the seconds without data, the losses, and whether some rank was asked to stop.

        A loss that is not finite is None: the step has changed no weight.
        """
        batch, waited_s = self._next_batch or _timed_next(batches)
        self._next_batch = None
        assert batch.position == self.samples + self.config.optim.batch_size, (
            "the loader and the loop disagree"
        )
        lr = self.schedule.lr(self.step)
        set_lr(self.optimizer, lr)
        self.seconds.start()
        losses = self.stage.training_step(batch, self._micro_batch_size(batch))
        self.seconds.done("losses")
        if self.gradient_sum.is_overlapped and self.step + 1 < self.schedule.steps:
            # While gradients are summed: what of the next step needs no weight.
            self._next_batch = _timed_next(batches)
            self.stage.encode_ahead(self._next_batch[0], self._micro_batch_size(self._next_batch[0]))
            self.seconds.done("ahead")
        # Each rank holds its part of the global batch's gradient: their sum is the gradient of the mean loss.
        gradients = self.gradient_sum.finish()
        self.seconds.done("sum")
        # The norm before clipping, over all parameters: sqrt(sum of g^2).
        norm = clip_gradients(gradients, self.config.optim.clip_norm)
        values, asked = self._agree({**losses, "gradient_norm": norm})
        # Decided by the mean over the ranks, so that all of them skip the step, and before the update.
        if not_finite(values):
            self._skip(values, batch)
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds.done("update")
        self.step += 1
        self.skipped.forget(self.step)
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        return waited_s, {**finite, "lr": lr}, asked

    def _micro_batch_size(self, batch: Batch) -> int:
        return self.config.performance.micro_batch_size or len(batch.uids)

    def _agree(self, values: Mapping[str, Tensor]) -> tuple[dict[str, float], bool]:
        """Return the means over the ranks, and whether any rank was asked to stop, by one all-reduce.

        Raises TrainingStopped on every rank if rank 0 could not write a checkpoint meanwhile.
        """
        write_error: TrainingStopped | None = None
        try:
            with self._writing():
                self.checkpoints.wait(block=False)
                if self.checkpoints.lease is not None:
                    self.checkpoints.lease.check()
        except TrainingStopped as error:
            write_error = error
        flags = [float(self.stop_asked()), float(write_error is not None)]
        # The mean over the ranks, in float64: their sum / the number of ranks.
        numbers = torch.stack([value.detach().double() for value in values.values()])
        numbers = torch.cat([numbers.cpu(), torch.tensor(flags, dtype=torch.float64)])
        numbers = self.world.sum(numbers.to(self.world.device)).tolist()
        if write_error is not None:
            raise write_error
        if numbers[-1]:
            raise TrainingStopped("rank 0 could not write a checkpoint")
        means = (number / self.world.size for number in numbers[:-2])
        return dict(zip(values, means, strict=True)), bool(numbers[-2])

    def _skip(self, values: Mapping[str, float], batch: Batch) -> None:
        """Count a step and write down its samples. Raises TrainingStopped at the first step, or at too many."""
        named = not_finite(values)
        if self.step == 0:
            raise TrainingStopped(
                f"step 1: {named}, before any weight was changed: a number overflows in the frozen models or in the "
                'weights of run.init_from. Set performance.precision = "fp32" (stage 2: language.precision too), or '
                "use other weights"
            )
        step = self.step + 1
        self.skipped.add(step)
        uids = self.world.gather_parts(batch.uids)
        samples = ""
        if self.world.rank == 0:
            with self._writing():
                samples = self.skipped.write(step, values, uids)
        if self.skipped.too_many:
            raise TrainingStopped(
                f"step {step}: {named}; stopped before it reached the weights: more than {MAX_SKIPPED} of the last "
                f"{WINDOW_STEPS:,} steps had to be skipped ({', '.join(map(str, self.skipped.steps))}). This one has "
                f"{samples}. "
                f"{self._last_good()} {_ADVICE}"
            )
        self.log(
            f"step {step}: {named}; skipped, the weights stay as they are ({len(self.skipped.steps)} of at most "
            f"{MAX_SKIPPED} in {WINDOW_STEPS:,} steps). This one has {samples}"
        )

    def _write(self, values: Mapping[str, float | None], of_ranks: OfRanks | None = None) -> None:
        with self._writing():
            for sink in self.sinks:
                sink.write(self.step, values, of_ranks)

    # -- checkpoints -----------------------------------------------------------------------------------------

    def _save(self, losses: Mapping[str, float | None]) -> None:
        """Have rank 0 write a checkpoint; its error is raised here or, written in the background, at a later step."""
        model = self.stage.trainable_state()
        # On every rank, whose values are the same: whether the last update overflowed.
        if broken := not_finite_tensors(model):
            raise TrainingStopped(
                f"step {self.step}: after it {broken[0]} is nan or infinite, and {len(broken) - 1} other tensors; no "
                f"checkpoint was written. {self._last_good()} {_ADVICE}"
            )
        if self.world.rank != 0 or (self._last is not None and self._last.step == self.step):
            return
        progress = TrainingProgress(
            step=self.step,
            samples=self.samples,
            snapshot=self.snapshot,
            config=self.config.model_dump(mode="json"),
            world_size=self.world.size,
            models=tuple(self.models),
            skipped_steps=self.skipped.steps,
            lease=self.checkpoints.lease.number if self.checkpoints.lease else 0,
        )
        state = State(
            progress=progress,
            model=model,
            optimizer=optimizer_state(self.optimizer, self.parameters),
            auxiliary=self.stage.auxiliary_state(),
        )
        options = self.config.checkpoint
        with self._writing():
            self.checkpoints.save(
                state,
                run_id=self.run_id,
                metrics={name: value for name, value in losses.items() if value is not None},
                asynchronous=options.asynchronous,
                keep_last=options.keep_last,
                keep_every=options.keep_every,
                keep_best=options.keep_best,
                committed=self._committed,
            )

    def _committed(self, record: CheckpointRecord) -> None:
        self._last = record
        self.record_checkpoint(record)
        self.log(f"checkpoint {record.path}")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn an error of the storage, most often a full disk, into TrainingStopped; a lost lease too."""
        try:
            yield
        except LostLeaseError as error:
            raise TrainingStopped(f"step {self.step}: {error}") from error
        except Exception as error:
            what = storage_error_message(error) or (str(error) if isinstance(error, OSError) else "")
            if not what:
                raise
            raise TrainingStopped(
                f"step {self.step}: cannot write to {self.checkpoints.storage.root} ({what}). {self._last_good()} Then "
                "run the same command: it continues from there"
            ) from error

    def _commit_pending(self) -> None:
        """Wait until the last checkpoint is committed, however training ended."""
        try:
            self.checkpoints.wait()
        except (OSError, LostLeaseError) as error:
            self.log(f"the last checkpoint was not written: {error}")

    def _last_good(self) -> str:
        """Return where the last checkpoint is, once a pending one is committed."""
        if self.world.rank != 0:
            return ""
        self._commit_pending()
        if self._last is None:
            return "There is no checkpoint yet."
        return f"The last checkpoint is {self.checkpoints.storage.url(self._last.path)}."

    def _as_stop(self, error: RuntimeError) -> TrainingStopped | None:
        """Return an error with its cause and remedy; None for a defect of the program."""
        message = first_line(error)
        if isinstance(error, torch.OutOfMemoryError):
            return TrainingStopped(
                f"step {self.step + 1}: the device's memory is full ({message}). Set "
                "performance.micro_batch_size, or a smaller one: it changes memory and speed, not what is learnt. "
                f"{self._last_good()}"
            )
        if isinstance(error, torch.AcceleratorError):
            return LostRankError(
                f"rank {self.world.rank}, step {self.step + 1}: its device failed ({message})"
            )
        if is_lost_rank(error):
            return LostRankError(
                f"rank {self.world.rank}, step {self.step + 1}: another rank has died ({message}). "
                f"{self._last_good()}"
            )
        return None


def _timed_next(batches: Iterator[Batch]) -> tuple[Batch, float]:
    """Return the next batch and the seconds without data."""
    before = time.perf_counter()
    return next(batches), time.perf_counter() - before


def is_lost_rank(error: RuntimeError) -> bool:
    """Return whether a collective failed because another rank has died; gloo's errors have no class of their own."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def progress_line(step: int, steps: int, values: Mapping[str, Any]) -> str:
    """Return one line for people."""
    shown = [
        f"{name} {'not finite' if values[name] is None else format(values[name], '.4g')}"
        for name in ("loss", "itc", "itm", "itg", "lm", "lr")
        if name in values
    ]
    rate = values.get("samples_per_s") or 0.0
    # Seconds left = steps left * samples a step / samples a second.
    left_s = (steps - step) * values["samples"] / step / rate if rate else 0.0
    left = f", {readable_duration(left_s)} left" if left_s else ""
    return f"step {step:,} of {steps:,} ({step / steps:.0%}): {', '.join(shown)}; {rate:,.1f} samples/s{left}"
