"""AdamW on fp32 masters, the schedule of its learning rate, and the presets of a recipe's ``[optim]``."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from schemas.errors import CapfiltError
from schemas.pretrain import BlipKind, OptimConfig, PretrainConfig

NamedParameters = Sequence[tuple[str, nn.Parameter]]

# AdamW's state of each parameter.
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")

# The lavis preset counts epochs: lavis/projects/blip2/train/pretrain_stage{1,2}.yaml.
_LAVIS_EPOCHS = 10

# "paper": arXiv 2301.12597, section 4.1; where the paper is silent (the start of the warm-up, the end of stage 1's
# cosine) the value is LAVIS's, or zero. "lavis": the released yaml files; their cosine moves once an epoch and
# their warm-up ends with the first one, while capfilt's goes by steps in both presets.
_PRESETS: dict[tuple[Literal["paper", "lavis"], Literal[1, 2]], dict[str, Any]] = {
    ("paper", 1): {"steps": 250_000, "min_lr": 0.0, "warmup_steps": 2_000, "betas": (0.9, 0.98)},
    ("paper", 2): {"steps": 80_000, "min_lr": 5e-5, "warmup_steps": 2_000, "betas": (0.9, 0.98)},
    ("lavis", 1): {"min_lr": 1e-5, "warmup_steps": 5_000, "betas": (0.9, 0.999)},
    ("lavis", 2): {"min_lr": 1e-5, "warmup_steps": 2_000, "betas": (0.9, 0.999)},
}


# BLIP, sections 4.1 and 4.2: the same in both presets. Steps follow from the number of epochs.
_BLIP_PRESETS: dict[BlipKind, dict[str, Any]] = {
    "blip-pretrain": {"min_lr": 1e-6, "warmup_steps": 3_000, "betas": (0.9, 0.999)},
    "blip-captioner": {"min_lr": 0.0, "warmup_steps": 0, "betas": (0.9, 0.999)},
    "blip-filter": {"min_lr": 0.0, "warmup_steps": 0, "betas": (0.9, 0.999)},
}
_BLIP_EPOCHS: dict[BlipKind, int] = {"blip-pretrain": 20, "blip-captioner": 5, "blip-filter": 6}


def fill_preset(config: PretrainConfig, num_images: int | None) -> PretrainConfig:
    """Return the config with every None of ``[optim]`` filled by its preset; values of the file stay.

    Args:
        num_images: of the snapshot, None where it is not known; presets that count epochs need it.
    """
    preset = {"warmup_lr": 1e-6, **_preset(config, num_images)}
    steps = config.optim.steps or preset["steps"]
    # A run shorter than the preset's warm-up would never reach its peak.
    preset["warmup_steps"] = min(preset["warmup_steps"], steps // 10)
    given = {name: value for name, value in config.optim.model_dump().items() if value is not None}
    return config.model_copy(update={"optim": OptimConfig.model_validate(preset | given)})


def _preset(config: PretrainConfig, num_images: int | None) -> dict[str, Any]:
    optim, stage = config.optim, config.run.stage
    if isinstance(stage, str):
        preset, epochs = _BLIP_PRESETS[stage], _BLIP_EPOCHS[stage]
        # An epoch has whole batches only, as BLIP's loader.
        epoch_steps = optim.epoch_steps or (num_images and max(1, num_images // optim.batch_size))
        steps = optim.steps or (epoch_steps and epochs * epoch_steps)
        preset = {**preset, "epoch_steps": epoch_steps, "steps": steps}
    else:
        preset, epochs = _PRESETS[optim.preset, stage], _LAVIS_EPOCHS
        if num_images is not None:
            preset = {"steps": math.ceil(epochs * num_images / optim.batch_size), **preset}
    if not (optim.steps or preset.get("steps")):
        what = "preset lavis" if isinstance(stage, int) else f"run.stage = {stage!r}"
        raise CapfiltError(
            f"optim.steps: {what} trains for {epochs} epochs, and the number of images is not known without the "
            "corpus; set optim.steps"
        )
    return preset


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Linear warm-up from ``warmup_lr`` to ``peak_lr``, then to ``min_lr`` by a cosine or by a factor an epoch."""

    steps: int
    warmup_steps: int
    warmup_lr: float
    peak_lr: float
    min_lr: float
    schedule: Literal["cosine", "epochs"] = "cosine"
    epoch_decay: float = 1.0
    epoch_steps: int = 1

    @classmethod
    def of(cls, optim: OptimConfig) -> "Schedule":
        """Return the schedule of a filled ``[optim]`` (``fill_preset``)."""
        names = [field.name for field in fields(cls)]
        if optim.schedule == "cosine":
            names.remove("epoch_steps")
        values = {name: getattr(optim, name) for name in names}
        assert None not in values.values(), f"a preset did not fill {values}"
        return cls(**values)

    def lr(self, step: int) -> float:
        """Return the learning rate of the step with this number, from 0."""
        if step < self.warmup_steps:
            return self.warmup_lr + (self.peak_lr - self.warmup_lr) * step / self.warmup_steps
        if self.schedule == "epochs":
            # BLIP, utils.py: max(min, peak decay^epoch); its warm-up lies in the first epoch.
            return max(self.min_lr, self.peak_lr * self.epoch_decay ** (step // self.epoch_steps))
        # min + (peak - min) (1 + cos(pi x)) / 2, with x from 0 after the warm-up to 1 at the last step.
        done = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies to a parameter.

    LAVIS's rule (blip2.py, get_optimizer_params): all but vectors and biases, so that the queries, the
    embeddings and the temperature (a scalar, not a vector) do decay.
    """
    return parameter.ndim != 1 and not name.endswith(".bias")


def make_optimizer(parameters: NamedParameters, optim: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters, in two groups; the learning rate is set at each step."""
    assert optim.betas is not None, "a preset did not fill optim.betas"
    for name, parameter in parameters:
        assert parameter.dtype in (torch.float32, torch.float64), (
            f"{name} is not an fp32 master: {parameter.dtype}"
        )
    decayed = {name for name, parameter in parameters if optim.decay_vectors or decays(name, parameter)}
    groups = [
        {"params": [p for name, p in parameters if name in decayed], "weight_decay": optim.weight_decay},
        {"params": [p for name, p in parameters if name not in decayed], "weight_decay": 0.0},
    ]
    is_cuda = any(parameter.is_cuda for _, parameter in parameters)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optim.peak_lr,
        betas=optim.betas,
        eps=optim.eps,
        fused=is_cuda,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def gradients_of(parameters: NamedParameters) -> list[Tensor]:
    """Return every gradient in order; a parameter without one gets zeros, since the ranks sum them in this order."""
    for _, parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for _, parameter in parameters]


def clip_gradients(gradients: Iterable[Tensor], max_norm: float) -> Tensor:
    """Return the norm of all gradients together, and scale them down to ``max_norm`` (0: do not)."""
    gradients = list(gradients)
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm:
        # As torch.nn.utils.clip_grad_norm_: g * min(1, max_norm / (norm + 1e-6)), without waiting for the device.
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale)
    return norm


def optimizer_state(optimizer: torch.optim.AdamW, parameters: NamedParameters) -> dict[str, Tensor]:
    """Return AdamW's moments as ``<parameter>.<moment>``: by name, independent of order and groups."""
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in parameters
        if parameter in optimizer.state
        for moment in _MOMENTS
    }


def load_optimizer_state(
    optimizer: torch.optim.AdamW, parameters: NamedParameters, state: dict[str, Tensor]
) -> None:
    """Set what ``optimizer_state`` returned. Raises CapfiltError where a moment is missing or of another shape."""
    for name, parameter in parameters:
        moments = {}
        for moment in _MOMENTS:
            if f"{name}.{moment}" not in state:
                raise CapfiltError(
                    f"the checkpoint's optimiser has no {moment} of {name}: it is of another model"
                )
            value = state[f"{name}.{moment}"]
            if value.shape != (() if moment == "step" else parameter.shape):
                raise CapfiltError(f"the checkpoint's optimiser has a {moment} of {name} of another shape")
            # AdamW's step counter stays on the CPU unless the kernel is fused.
            on_device = moment != "step" or bool(optimizer.defaults["fused"])
            moments[moment] = value.to(parameter.device if on_device else "cpu", copy=True)
        optimizer.state[parameter] = moments
