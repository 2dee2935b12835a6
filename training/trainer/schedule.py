"""The learning rate of a step, and the presets that fill what a recipe's ``[optim]`` leaves out."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from schemas.errors import CapfiltError
from schemas.pretrain import OptimConfig, PretrainConfig

# The lavis preset counts epochs: lavis/projects/blip2/train/pretrain_stage{1,2}.yaml.
_LAVIS_EPOCHS = 10

# "paper": arXiv 2301.12597, section 4.1; where the paper is silent (the start of the warm-up, the end of stage 1's
# cosine) the value is LAVIS's, or zero. "lavis": the released yaml files; their cosine moves once an epoch and
# their warm-up ends with the first one, while ours goes by steps in both presets.
_PRESETS: dict[tuple[Literal["paper", "lavis"], Literal[1, 2]], dict[str, Any]] = {
    ("paper", 1): {
        "steps": 250_000,
        "min_lr": 0.0,
        "warmup_steps": 2_000,
        "warmup_lr": 1e-6,
        "betas": (0.9, 0.98),
    },
    ("paper", 2): {
        "steps": 80_000,
        "min_lr": 5e-5,
        "warmup_steps": 2_000,
        "warmup_lr": 1e-6,
        "betas": (0.9, 0.98),
    },
    ("lavis", 1): {"min_lr": 1e-5, "warmup_steps": 5_000, "warmup_lr": 1e-6, "betas": (0.9, 0.999)},
    ("lavis", 2): {"min_lr": 1e-5, "warmup_steps": 2_000, "warmup_lr": 1e-6, "betas": (0.9, 0.999)},
}


def fill_preset(config: PretrainConfig, num_images: int | None) -> PretrainConfig:
    """Return the config with every None of ``[optim]`` filled by its preset; what the file says stands.

    Args:
        num_images: of the snapshot, None where it is not known; the lavis preset needs it for its ten epochs.
    """
    preset = dict(_PRESETS[config.optim.preset, config.run.stage])
    if "steps" not in preset and config.optim.steps is None:
        if num_images is None:
            raise CapfiltError(
                f"optim.steps: preset lavis trains for {_LAVIS_EPOCHS} epochs, and the number of images is not known "
                "without the corpus; set optim.steps"
            )
        preset["steps"] = math.ceil(_LAVIS_EPOCHS * num_images / config.optim.batch_size)
    steps = config.optim.steps or preset["steps"]
    # A run shorter than the preset's warm-up would never reach its peak.
    preset["warmup_steps"] = min(preset["warmup_steps"], steps // 10)
    given = {name: value for name, value in config.optim.model_dump().items() if value is not None}
    return config.model_copy(update={"optim": OptimConfig.model_validate(preset | given)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Linear warm-up from ``warmup_lr`` to ``peak_lr``, then a cosine to ``min_lr`` at the last step."""

    steps: int
    warmup_steps: int
    warmup_lr: float
    peak_lr: float
    min_lr: float

    @classmethod
    def of(cls, optim: OptimConfig) -> "Schedule":
        """Return the schedule of a filled ``[optim]`` (``fill_preset``)."""
        names = ("steps", "warmup_steps", "warmup_lr", "peak_lr", "min_lr")
        values = {name: getattr(optim, name) for name in names}
        assert None not in values.values(), f"a preset has not filled {values}"
        return cls(**values)

    def lr(self, step: int) -> float:
        """Return the learning rate of the step with this number, from 0."""
        if step < self.warmup_steps:
            return self.warmup_lr + (self.peak_lr - self.warmup_lr) * step / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
