"""The trainable parameters of a model by name, as checkpoints contain them."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from schemas.errors import CapfiltError


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the trainable parameters in the order of the modules."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


@torch.no_grad()
def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set all trainable parameters.

    Raises:
        CapfiltError: a tensor is missing, unexpected or of another shape; nothing is set.
    """
    parameters = dict(trainable(model))
    for name, parameter in parameters.items():
        if name not in state:
            raise CapfiltError(f"the checkpoint lacks {name}: it is of another stage or another [qformer]")
        if state[name].shape != parameter.shape:
            raise CapfiltError(
                f"the checkpoint's {name} is {tuple(state[name].shape)} and the model's {tuple(parameter.shape)}: it "
                "is of another [vision], [qformer] or [language]"
            )
    for name in state:
        if name not in parameters:
            raise CapfiltError(
                f"the checkpoint has {name}, which the model lacks: it is of another stage or another [qformer]"
            )
    for name, parameter in parameters.items():
        parameter.copy_(state[name])
