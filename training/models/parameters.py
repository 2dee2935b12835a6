"""What a training loop trains: a model of frozen and trained parts, whose trained parameters a checkpoint contains."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from schemas.errors import CapfiltError
from schemas.names import printable


class PartlyTrained(nn.Module, ABC):
    """A model whose trained parameters are those that require a gradient; what is frozen stays in evaluation mode.

    Its random numbers depend on the run's seed, ``batch.position`` and the rank alone: a checkpoint need not contain
    the state of a generator.
    """

    # Called by ``training_step`` before the last backward passes, those that are the same in each step: a sum of the
    # gradients over the ranks may begin.
    begin_last_passes: Callable[[], None] = staticmethod(lambda: None)

    @abstractmethod
    def training_step(self, batch: Any, micro_batch_size: int) -> dict[str, Tensor]:
        """Add to ``.grad`` what this rank has of the gradient of the step's mean loss; set torch's generators.

        ``batch`` is a ``training.data.loader.Batch``. The sum over the ranks is the gradient. Calls
        ``begin_last_passes`` once.

        Returns:
            The losses of the whole step, detached, the same on every rank.
        """

    def encode_ahead(self, batch: Any, micro_batch_size: int) -> None:
        """Compute of the next step what no weight that is trained changes; ``training_step`` then need not."""

    @abstractmethod
    def flops_per_sample(self) -> float:
        """Return the FLOP of one sample's step, without what a micro-batch computes a second time."""

    def begin(self) -> None:
        """Set what training changes beside the trained parameters, once those have their first values."""

    def auxiliary_state(self) -> dict[str, Tensor]:
        """Return what training changes beside the trained parameters, as views: a resume needs it, a model does not."""
        return {}

    def trainable_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trainable parameters, in the order of the modules: the same on every rank."""
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
        _copy_all(state, parameters, "stage, [vision], [qformer], [language] or [blip]")

    @torch.no_grad()
    def load_auxiliary_state(self, state: Mapping[str, Tensor]) -> None:
        """Set all of ``auxiliary_state``. Raises CapfiltError where a tensor is missing, unexpected or misshapen."""
        _copy_all(state, self.auxiliary_state(), "model")


def _copy_all(state: Mapping[str, Tensor], targets: Mapping[str, Tensor], another: str) -> None:
    """Copy a state to its tensors. Raises CapfiltError, that it is of ``another``, before any is set."""
    if differences := tensor_differences(state, targets):
        raise CapfiltError(f"the checkpoint is of another {another}: {differences}")
    for name, tensor in targets.items():
        tensor.copy_(state[name])


def tensor_differences(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Return how the names and shapes of two sets of tensors differ, with the first name of each kind, or nothing."""
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    reshaped = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    parts = [
        f"{len(names)} {kind}, {printable(names[0])} first"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if reshaped:
        name = reshaped[0]
        shapes = f"{tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
        parts.append(f"{len(reshaped)} of another shape, {name} first ({shapes})")
    return "; ".join(parts)
