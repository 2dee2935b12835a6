"""What a model's config asks for, against what its weights hold: a few bytes of JSON must not take all memory."""

from collections.abc import Iterable, Mapping

from torch import nn

from pipeline.models.model_files import TensorEntry, count_parameters
from schemas.errors import CapfiltError


def refuse_larger(
    model: nn.Module, headers: Iterable[Mapping[str, TensorEntry]], config: str, num_spare: int
) -> None:
    """Refuse a config that asks for far more memory than the weights could fill.

    Args:
        model: built from the config on ``meta``, where nothing of that memory is taken.
        headers: of the files of its weights.
        config: where the model is described, for the message.
        num_spare: values that a sound model may have beyond its files.

    Raises:
        CapfiltError: parameters and buffers are more than twice those of the files (tied tensors may be counted
            twice) and ``num_spare``.
    """
    num_asked = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    num_stored = count_parameters(headers)
    if num_asked > 2 * num_stored + num_spare:
        raise CapfiltError(
            f"{config} describes a model of {num_asked:,} parameters, but its weights have {num_stored:,}"
        )
