"""The Q-Former's layers, with float32 weights, computing in the dtype of their input.

There is no autocast: a matrix product runs in the dtype of its input, a normalisation in that of its weights. With
float64 weights everything is float64, in which the tests compare with the reference to 1e-9.

The legend of the names: B rows, S tokens, Q queries of them, K tokens attended to, D the width, E that of the source, H
heads, d = D / H.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.config import Precision
from schemas.pretrain import QFormerConfig

# The epsilon of BERT's norms.
NORM_EPS = 1e-12

# Keys and values, each (B, H, K, d).
KeyValue = tuple[Tensor, Tensor]


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
        copy = cls(
            norm.normalized_shape, eps=norm.eps, elementwise_affine=norm.elementwise_affine, device="meta"
        )
        copy.weight, copy.bias = norm.weight, norm.bias
        return copy

    def forward(self, input: Tensor) -> Tensor:
        """Normalise in the dtype of the weights."""
        precise = input.to(self.weight.dtype)
        return F.layer_norm(precise, self.normalized_shape, self.weight, self.bias, self.eps).to(input.dtype)


class Projections(nn.Module):
    """The projections to queries, keys and values, of one sequence or of a sequence and an image."""

    def __init__(self, width: int, source_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = Linear(width, width)
        self.key = Linear(source_width, width)
        self.value = Linear(source_width, width)

    def queries(self, hidden_BSD: Tensor) -> Tensor:
        """Project queries: (B, H, S, d)."""
        return self.query(hidden_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_and_values(self, source_BKE: Tensor) -> KeyValue:
        """Project keys and values in one product."""
        return self._fused((self.key, self.value), source_BKE)

    def all_three(self, hidden_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project queries, keys and values of one sequence in one product."""
        return self._fused((self.query, self.key, self.value), hidden_BSD)

    def _fused(self, layers: tuple[Linear, ...], source_BKE: Tensor) -> tuple[Tensor, ...]:
        weight = torch.cat([layer.weight for layer in layers]).to(source_BKE.dtype)
        bias = torch.cat([layer.bias for layer in layers]).to(source_BKE.dtype)
        # One matrix product with the layers' weights below one another: (B, K, 3 D) for three layers.
        packed = F.linear(source_BKE, weight, bias).unflatten(-1, (len(layers), self.heads, -1))
        return packed.permute(2, 0, 3, 1, 4).unbind(0)


class Residual(nn.Module):
    """The output of attention or of a feed-forward network: norm(dropout(linear(x)) + residual)."""

    def __init__(self, from_width: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dense = Linear(from_width, width)
        self.LayerNorm = LayerNorm(width, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_BSD: Tensor, residual_BSD: Tensor) -> Tensor:
        """Project, and add to the residual."""
        return self.LayerNorm(self.dropout(self.dense(hidden_BSD)) + residual_BSD)


class FeedForwardInput(nn.Module):
    """The first layer of a feed-forward network, with its activation."""

    def __init__(self, width: int, ffn_width: int) -> None:
        super().__init__()
        self.dense = Linear(width, ffn_width)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """Project to the inner width, with BERT's exact GELU."""
        return F.gelu(self.dense(hidden_BSD))


class Attention(nn.Module):
    """BERT's attention with its residual, to the sequence itself or to an image."""

    def __init__(self, config: QFormerConfig, source_width: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        # "self" is the name in every BERT checkpoint.
        self.self = Projections(config.width, source_width, config.heads)
        self.output = Residual(config.width, config.width, config.dropout)

    def forward(
        self, hidden_BSD: Tensor, mask: Tensor | None, prefix: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Attend to the prefix, if any, and to the sequence; return its keys and values too."""
        query, key, value = self.self.all_three(hidden_BSD)
        key_value = key, value
        if prefix is not None:
            key_value = torch.cat((prefix[0], key), dim=2), torch.cat((prefix[1], value), dim=2)
        return self._attend(query, key_value, mask, hidden_BSD), (key, value)

    def to_image(self, hidden_BQD: Tensor, image: KeyValue) -> Tensor:
        """Attend to an image; B may be a multiple of the number of images."""
        # The queries of all rows of an image as one sequence, so that its keys and values need not be repeated.
        num_images = image[0].shape[0]
        query = self.self.queries(hidden_BQD.reshape(num_images, -1, hidden_BQD.shape[-1]))
        return self._attend(query, image, None, hidden_BQD)

    def _attend(
        self, query: Tensor, key_value: KeyValue, mask: Tensor | None, residual_BSD: Tensor
    ) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, *key_value, attn_mask=mask, dropout_p=dropout)
        return self.output(attended.transpose(1, 2).reshape(residual_BSD.shape), residual_BSD)
