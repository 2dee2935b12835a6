"""A model of frozen and trained parts; its trained parameters, by name, are what a checkpoint contains."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from schemas.errors import CapfiltError


class PartlyTrained(nn.Module):
    """The base of a model whose trained parameters are those that require a gradient."""

    def trainable_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trainable parameters, in the order of the modules."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    def trainable_state(self) -> dict[str, Tensor]:
        """Return the trainable parameters' values, as views: they change with the parameters."""
        return {name: parameter.detach() for name, parameter in self.trainable_named_parameters()}

    @torch.no_grad()
    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Set all trainable parameters.

        Raises:
            CapfiltError: a tensor is missing, unexpected or of another shape; nothing is set.
        """
        parameters = dict(self.trainable_named_parameters())
        for name, parameter in parameters.items():
            if name not in state:
                raise CapfiltError(
                    f"the checkpoint lacks {name}: it is of another stage or another [qformer]"
                )
            if state[name].shape != parameter.shape:
                raise CapfiltError(
                    f"the checkpoint's {name} is {tuple(state[name].shape)} and the model's {tuple(parameter.shape)}: "
                    "it is of another [vision], [qformer] or [language]"
                )
        for name in state:
            if name not in parameters:
                raise CapfiltError(
                    f"the checkpoint has {name}, which the model lacks: it is of another stage or another [qformer]"
                )
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
