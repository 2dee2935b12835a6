"""Checks of a model: its size against its files before memory is taken, and NaN and infinity in weights and results."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from pipeline.models.files.model_files import TensorEntry, count_parameters
from schemas.errors import CapfiltError, NotFiniteError
from schemas.names import printable


def require_finite_weights(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise CapfiltError, naming the first, where tensors of ``where`` (the setting and the place) are not finite."""
    if broken := not_finite_tensors(tensors):
        raise CapfiltError(
            f"{where}: {len(broken)} of {len(tensors)} tensors hold values that are not finite (NaN or infinite), "
            f"{printable(broken[0])} first; the file is damaged, or a training that diverged wrote it: use another one"
        )


def not_finite_tensors(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinity; integers and tensors on ``meta`` are skipped.

    Each tensor is read once, without a copy: under a second for BLIP-large on one core.
    """
    names = [name for name, tensor in tensors.items() if _can_check(tensor)]
    if not names:
        return []
    # aminmax of values with a NaN is NaN, and an infinity is an extreme. One copy to the CPU for all tensors.
    extremes_N2 = torch.stack([torch.stack(torch.aminmax(tensors[name].detach())).double() for name in names])
    finite_N = extremes_N2.isfinite().all(dim=1).tolist()
    return [name for name, is_finite in zip(names, finite_N, strict=True) if not is_finite]


def require_finite(values: Tensor, what: str) -> None:
    """Raise NotFiniteError where a value is NaN or infinite. Waits for the device that computes ``values``.

    Args:
        values: what a model computed.
        what: says what they are and which model computed them, plural: "the scores of rank.model = 'x'".
    """
    if not bool(values.isfinite().all()):
        raise not_finite(what)


def not_finite(what: str) -> NotFiniteError:
    """Return the error for numbers that turned out not to be finite; ``what`` as in ``require_finite``."""
    return NotFiniteError(
        f"{what} are not finite (NaN or infinite), though its weights are: a number overflows in it. Use a precision "
        'with a wider range ("fp32"), or another model'
    )


def reject_larger(
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


def _can_check(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 0 and not tensor.is_meta
