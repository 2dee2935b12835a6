"""AdamW on fp32 masters: which parameters decay, the gradient's norm, the optimiser's state by parameter name."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from schemas.errors import CapfiltError
from schemas.pretrain import OptimConfig

NamedParameters = Sequence[tuple[str, nn.Parameter]]

# What AdamW keeps of each parameter.
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Tell whether weight decay pulls on a parameter.

    LAVIS's rule (blip2.py, get_optimizer_params): all but vectors and biases, so that the queries, the
    embeddings and the temperature (no vector: a scalar) do decay.
    """
    return parameter.ndim != 1 and not name.endswith(".bias")


def make_optimizer(parameters: NamedParameters, optim: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters, in two groups; the learning rate comes with each step."""
    assert optim.betas is not None, "a preset has not filled optim.betas"
    for name, parameter in parameters:
        assert parameter.dtype in (torch.float32, torch.float64), (
            f"{name} is no fp32 master: {parameter.dtype}"
        )
    groups = [
        {"params": [p for name, p in parameters if decays(name, p)], "weight_decay": optim.weight_decay},
        {"params": [p for name, p in parameters if not decays(name, p)], "weight_decay": 0.0},
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
    """Return every gradient in order; one that no loss reached is made zero, since ranks sum them in step."""
    for _, parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for _, parameter in parameters]


def clip_gradients(gradients: Iterable[Tensor], max_norm: float) -> Tensor:
    """Return the norm of all gradients together, before scaling them down to ``max_norm`` (0: as they are)."""
    gradients = list(gradients)
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale)
    return norm


def optimizer_state(optimizer: torch.optim.AdamW, parameters: NamedParameters) -> dict[str, Tensor]:
    """Return AdamW's moments as ``<parameter>.<moment>``: by name, whatever the order or the grouping."""
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in parameters
        if parameter in optimizer.state
        for moment in _MOMENTS
    }


def load_optimizer_state(
    optimizer: torch.optim.AdamW, parameters: NamedParameters, state: dict[str, Tensor]
) -> None:
    """Take in what ``optimizer_state`` gave. Raises CapfiltError where a moment is missing or misshapen."""
    for name, parameter in parameters:
        moments = {}
        for moment in _MOMENTS:
            if f"{name}.{moment}" not in state:
                raise CapfiltError(
                    f"the checkpoint's optimiser has no {moment} of {name}: it is another model's"
                )
            value = state[f"{name}.{moment}"]
            if value.shape != (() if moment == "step" else parameter.shape):
                raise CapfiltError(f"the checkpoint's optimiser has a {moment} of {name} of another shape")
            # AdamW's step counter stays on the CPU unless the kernel is fused.
            on_device = moment != "step" or bool(optimizer.defaults["fused"])
            moments[moment] = value.to(parameter.device if on_device else "cpu", copy=True)
        optimizer.state[parameter] = moments
