"""The training loop: one step after the other, each finite, reported, checkpointed; the same on every rank."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, distributed, nn

from pipeline.corpus.storage_errors import storage_error_message
from pipeline.models.checks import not_finite_tensors, require_finite_weights
from pipeline.text import readable_duration
from schemas.errors import CapfiltError, first_line
from schemas.json_record import Json
from schemas.pretrain import PretrainConfig
from schemas.records import CheckpointRecord, ModelRecord
from training.checkpoint import Checkpoints, Progress, State
from training.data.loader import Batch
from training.distributed import World
from training.trainer.metrics import Sink, Throughput
from training.trainer.optim import (
    Schedule,
    clip_gradients,
    gradients_of,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    set_lr,
)

_CALM_DOWN = (
    "The same command would meet it again: lower optim.peak_lr, or set optim.clip_norm, under another run.name with "
    "run.init_from that checkpoint"
)


class TrainingStage(Protocol):
    """What the loop trains: ``Stage1``, ``Stage2``. An ``nn.Module``.

    Its random choices are a function of the run's seed, ``batch.position`` and the rank: there is no generator
    whose state a checkpoint would have to keep.
    """

    def train(self, mode: bool = True) -> nn.Module:
        """Go to training mode; what is frozen stays in evaluation mode."""

    def training_step(self, batch: Batch, micro_batch_size: int) -> dict[str, Tensor]:
        """Add this rank's part of the global batch's gradient to ``.grad``; return the losses, detached."""

    def trainable_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what is trained, in an order that every rank shares."""

    def trainable_state(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds."""

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Take in what ``trainable_state`` gave. Raises CapfiltError where it does not fit."""

    def flops_per_sample(self) -> float:
        """Return the FLOP of one sample's step, forward and backward."""


class TrainingStopped(Exception):
    """Report that training cannot go on, and from where it can: for people to read. Takes one string."""


class LostRankError(TrainingStopped):
    """Report that another rank is gone: the run may be restarted as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary(Json):
    """How a training ended. ``metrics`` are those of its last step."""

    run_id: str
    outcome: Literal["done", "interrupted"]
    folder: str
    step: int
    steps: int
    samples: int
    resumed_from: int = 0
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    checkpoint: str = ""


@dataclass(kw_only=True)
class Loop:
    """What the training of one rank needs; ``run`` does it.

    ``config`` is filled by its preset. Rank 0 alone has ``sinks`` and ``record_checkpoint`` (called when a checkpoint
    is committed), and ``probe`` unless it needs all ranks. ``stop_asked`` is looked at in each step, on every rank.
    """

    config: PretrainConfig
    world: World
    stage: TrainingStage
    checkpoints: Checkpoints
    run_id: str
    snapshot: str
    models: Sequence[ModelRecord] = ()
    sinks: Sequence[Sink] = ()
    record_checkpoint: Callable[[CheckpointRecord], None] = lambda record: None
    probe: Callable[[], Mapping[str, float]] | None = None
    stop_asked: Callable[[], bool] = lambda: False
    say: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self.parameters = list(self.stage.trainable_named_parameters())
        self.optimizer = make_optimizer(self.parameters, self.config.optim)
        self.schedule = Schedule.of(self.config.optim)
        self.step = 0
        self._last: CheckpointRecord | None = None

    @property
    def samples(self) -> int:
        """Samples consumed by all ranks."""
        return self.step * self.config.optim.batch_size

    def resume(self, state: State, record: CheckpointRecord) -> None:
        """Go back to a checkpoint: after this, ``run`` does exactly what it would have done uninterrupted.

        Raises CapfiltError where it holds NaN or infinity.
        """
        where = self.checkpoints.storage.url(record.path)
        require_finite_weights(state.model, where)
        require_finite_weights(state.optimizer, f"{where}: the optimiser")
        self.stage.load_trainable_state(state.model)
        load_optimizer_state(self.optimizer, self.parameters, state.optimizer)
        self.step = state.progress.step
        self._last = record
        if self.samples != state.progress.samples:
            raise CapfiltError(
                f"{self.checkpoints.storage.url(record.path)} says {state.progress.samples:,} samples after "
                f"{self.step:,} steps, and a batch has {self.config.optim.batch_size:,}; it is not of this run"
            )

    def run(self, batches: Iterator[Batch]) -> Summary:
        """Train from where the loop stands to the last step, or until somebody asks to stop.

        Args:
            batches: the data from sample ``self.samples`` on.

        Raises:
            TrainingStopped: a loss or gradient is not finite, the storage takes no checkpoint, or the device's
                memory is full. The last committed checkpoint stands.
            LostRankError: another rank is gone.
        """
        started = self.step
        try:
            outcome, values = self._steps(batches)
            with self._writing():
                self.checkpoints.wait()
            # No rank leaves before the checkpoint is there: a launcher may end all when the first one ends.
            self.world.barrier()
        except RuntimeError as error:
            if told := self._in_words(error):
                raise told from error
            raise
        finally:
            self._settle()
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
        speed = Throughput(self.world.device, self.stage.flops_per_sample(), self.world.size)
        every = self.config.metrics.every_steps
        self.stage.train()
        values: dict[str, float | None] = {}
        while self.step < self.schedule.steps:
            waited_s, losses, asked = self._one_step(batches)
            speed.add(self.config.optim.batch_size, waited_s)
            ends = asked or self.step == self.schedule.steps
            if self.step % every == 0 or ends:
                values = {"samples": self.samples, **losses, **speed.report()}
                self._write(values)
                self.say(progress_line(self.step, self.schedule.steps, values))
            if self.config.probe.every_steps and self.step % self.config.probe.every_steps == 0:
                self._probe()
            if ends or self.step % self.config.checkpoint.every_steps == 0:
                self._save(losses)
            if asked:
                return "interrupted", values
        return "done", values

    def _one_step(self, batches: Iterator[Batch]) -> tuple[float, dict[str, float], bool]:
        """Do one step; return the seconds without data, the losses, and whether some rank was asked to stop."""
        before = time.perf_counter()
        batch = next(batches)
        waited_s = time.perf_counter() - before
        assert batch.position == self.samples + self.config.optim.batch_size, (
            "the loader and the loop disagree"
        )
        lr = self.schedule.lr(self.step)
        set_lr(self.optimizer, lr)
        losses = self.stage.training_step(batch, self.config.performance.micro_batch_size or len(batch.uids))
        gradients = gradients_of(self.parameters)
        self.world.all_reduce_sum_(gradients)
        norm = clip_gradients(gradients, self.config.optim.clip_norm)
        values, asked = self._agree({**losses, "gradient_norm": norm})
        self._require_finite(values)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return waited_s, {**values, "lr": lr}, asked

    def _agree(self, values: Mapping[str, Tensor]) -> tuple[dict[str, float], bool]:
        """Return the means over the ranks, and whether any rank was asked to stop: one message, one wait.

        Raises TrainingStopped on every rank where rank 0 could not write a checkpoint meanwhile.
        """
        trouble = self._checkpoint_trouble()
        flags = [float(self.stop_asked()), float(trouble is not None)]
        numbers = torch.stack([value.detach().double() for value in values.values()])
        numbers = torch.cat([numbers.cpu(), torch.tensor(flags, dtype=torch.float64)])
        numbers = self.world.sum(numbers.to(self.world.device)).tolist()
        if trouble is not None:
            raise trouble
        if numbers[-1]:
            raise TrainingStopped("rank 0 could not write a checkpoint")
        means = (number / self.world.size for number in numbers[:-2])
        return dict(zip(values, means, strict=True)), bool(numbers[-2])

    def _require_finite(self, values: Mapping[str, float]) -> None:
        wrong = {name: value for name, value in values.items() if not math.isfinite(value)}
        if not wrong:
            return
        named = ", ".join(f"{name} is {value}" for name, value in wrong.items())
        if self.step == 0:
            raise TrainingStopped(
                f"step 1: {named}, before any weight was changed: a number overflows in the frozen models or in what "
                'run.init_from gave. Set performance.precision = "fp32" (stage 2: language.precision too), or use '
                "other weights"
            )
        raise TrainingStopped(
            f"step {self.step + 1}: {named}; stopped before it reached the weights. {self._last_good()} {_CALM_DOWN}"
        )

    def _require_finite_weights(self, state: Mapping[str, Tensor]) -> None:
        """Raise TrainingStopped, on every rank, where the last update overflowed: that is not a checkpoint."""
        if broken := not_finite_tensors(state):
            raise TrainingStopped(
                f"step {self.step}: after it {broken[0]} is nan or infinite, and {len(broken) - 1} other tensors; no "
                f"checkpoint was made of them. {self._last_good()} {_CALM_DOWN}"
            )

    def _probe(self) -> None:
        if self.probe is None:
            return
        found = {f"probe_{name}": value for name, value in self.probe().items()}
        self.stage.train()
        self._write(found)

    def _write(self, values: Mapping[str, float | None]) -> None:
        with self._writing():
            for sink in self.sinks:
                sink.write(self.step, values)

    # -- checkpoints -----------------------------------------------------------------------------------------

    def _save(self, losses: Mapping[str, float]) -> None:
        """Have rank 0 write a checkpoint; its trouble shows here, or at a later step."""
        model = self.stage.trainable_state()
        self._require_finite_weights(model)
        if self.world.rank != 0 or (self._last is not None and self._last.step == self.step):
            return
        progress = Progress(
            step=self.step,
            samples=self.samples,
            snapshot=self.snapshot,
            config=self.config.model_dump(mode="json"),
            world_size=self.world.size,
            models=tuple(self.models),
        )
        record = CheckpointRecord(
            path="",
            stage=f"stage{self.config.run.stage}",
            run_id=self.run_id,
            step=self.step,
            samples=self.samples,
            snapshot=self.snapshot,
            sha256={},
            metrics=dict(losses),
            created_at="",
            models=tuple(model.digest for model in self.models),
        )
        state = State(
            progress=progress,
            model=model,
            optimizer=optimizer_state(self.optimizer, self.parameters),
        )
        options = self.config.checkpoint
        with self._writing():
            self.checkpoints.save(
                state,
                record,
                asynchronous=options.asynchronous,
                keep_last=options.keep_last,
                committed=self._committed,
            )

    def _committed(self, record: CheckpointRecord) -> None:
        self._last = record
        self.record_checkpoint(record)
        self.say(f"checkpoint {record.path}")

    def _checkpoint_trouble(self) -> TrainingStopped | None:
        try:
            with self._writing():
                self.checkpoints.wait(block=False)
        except TrainingStopped as trouble:
            return trouble
        return None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Say in words that the storage did not take what was written: most often, the disk is full."""
        try:
            yield
        except Exception as error:
            what = storage_error_message(error) or (str(error) if isinstance(error, OSError) else "")
            if not what:
                raise
            raise TrainingStopped(
                f"step {self.step}: cannot write to {self.checkpoints.storage.root} ({what}). {self._last_good()} Then "
                "run the same command: it goes on from there"
            ) from error

    def _settle(self) -> None:
        """However training ends, let the last checkpoint be committed."""
        try:
            self.checkpoints.wait()
        except OSError as error:
            self.say(f"the last checkpoint was not written: {error}")

    def _last_good(self) -> str:
        """Say where the last checkpoint is, once the one under way is committed."""
        if self.world.rank != 0:
            return ""
        self._settle()
        if self._last is None:
            return "There is no checkpoint yet."
        return f"The last checkpoint is {self.checkpoints.storage.url(self._last.path)}."

    def _in_words(self, error: RuntimeError) -> TrainingStopped | None:
        """Return what stopped the training as people can use it; None for a fault of ours."""
        said = first_line(error)
        if isinstance(error, torch.OutOfMemoryError):
            return TrainingStopped(
                f"step {self.step + 1}: the device's memory is full ({said}). Set "
                "performance.micro_batch_size, or a smaller one: it changes memory and speed, not what is learnt. "
                f"{self._last_good()}"
            )
        if isinstance(error, torch.AcceleratorError):
            return LostRankError(f"rank {self.world.rank}, step {self.step + 1}: its device failed ({said})")
        if is_lost_rank(error):
            return LostRankError(
                f"rank {self.world.rank}, step {self.step + 1}: another rank is gone ({said}). "
                f"{self._last_good()}"
            )
        return None


def is_lost_rank(error: RuntimeError) -> bool:
    """Tell whether a collective failed because another rank is gone; gloo's errors have no class of their own."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def progress_line(step: int, steps: int, values: Mapping[str, Any]) -> str:
    """Return one line for people."""
    shown = [f"{name} {values[name]:.4g}" for name in ("loss", "itc", "itm", "itg", "lr") if name in values]
    rate = values.get("samples_per_s") or 0.0
    left_s = (steps - step) * values["samples"] / step / rate if rate else 0.0
    left = f", {readable_duration(left_s)} left" if left_s else ""
    return f"step {step:,} of {steps:,} ({step / steps:.0%}): {', '.join(shown)}; {rate:,.1f} samples/s{left}"
