"""Layers that keep float32 weights and compute in the dtype of their input.

No autocast: where bfloat16 begins and ends is in the code. A matrix product runs in the dtype of its input, a
normalisation in that of its weights. Everything is double where the weights are double, which is how the tests
check it to 1e-9.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.config import Precision


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype of the matrix products: ``auto`` is bfloat16 on a GPU and float32 on a CPU."""
    match precision:
        case "bf16":
            return torch.bfloat16
        case "fp32":
            return torch.float32
        case _:
            return torch.bfloat16 if device.type == "cuda" else torch.float32


class Linear(nn.Linear):
    """A linear layer whose weights are rounded to the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply in the dtype of the input."""
        return F.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


class LayerNorm(nn.LayerNorm):
    """A normalisation computed in the dtype of its weights, with the dtype of its input."""

    @classmethod
    def like(cls, norm: nn.LayerNorm) -> "LayerNorm":
        """Return one that shares the weights of another."""
        twin = cls(
            norm.normalized_shape, eps=norm.eps, elementwise_affine=norm.elementwise_affine, device="meta"
        )
        twin.weight, twin.bias = norm.weight, norm.bias
        return twin

    def forward(self, input: Tensor) -> Tensor:
        """Normalise in the dtype of the weights."""
        whole = input.to(self.weight.dtype)
        return F.layer_norm(whole, self.normalized_shape, self.weight, self.bias, self.eps).to(input.dtype)
