"""The layers of the models that are trained, with float32 weights, computing in the dtype of their input.

There is no autocast: a matrix product runs in the dtype of its input, a normalisation in that of its weights. With
float64 weights everything is float64, in which the tests compare with the reference to 1e-9.

The legend of the names: B rows, S tokens, Q queries of them, K tokens attended to, D the width, E that of the source, H
heads, d = D / H.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.pretrain import BertShape

# The epsilon of BERT's norms.
NORM_EPS = 1e-12

# Keys and values, each (B, H, K, d).
KeyValue = tuple[Tensor, Tensor]


def select_images(image: list[KeyValue | None], rows_R: Tensor) -> list[KeyValue | None]:
    """Return the keys and values of some images of a batch, for every block that has them."""
    return [
        key_value and (key_value[0].index_select(0, rows_R), key_value[1].index_select(0, rows_R))
        for key_value in image
    ]


def leaves_of(projected: Sequence[KeyValue | None]) -> list[KeyValue | None]:
    """Return keys and values detached from their projection: the gradients of several losses add up there."""
    return [
        key_value and tuple(part.detach().requires_grad_(part.requires_grad) for part in key_value)
        for key_value in projected
    ]


def send_to_projection(projected: Sequence[KeyValue | None], leaves: Sequence[KeyValue | None]) -> None:
    """Send the gradients that have added up at the leaves backward through the projection, once."""
    roots = [part for key_value in projected if key_value for part in key_value]
    gradients = [leaf.grad for key_value in leaves if key_value for leaf in key_value]
    torch.autograd.backward(roots, gradients)


class Linear(nn.Linear):
    """A linear layer whose weights are rounded to the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply in the dtype of the input."""
        return F.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


class LayerNorm(nn.LayerNorm):
    """A normalisation computed in the dtype of its weights; it returns ``output_dtype``, or the dtype of its input."""

    output_dtype: torch.dtype | None = None

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
        normalised = F.layer_norm(precise, self.normalized_shape, self.weight, self.bias, self.eps)
        return normalised.to(self.output_dtype or input.dtype)


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

    def fused(self, layers: Sequence[Linear], source_BKE: Tensor) -> tuple[Tensor, ...]:
        """Project by some of the three layers in one product: each (B, H, K, d)."""
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

    def __init__(self, config: BertShape, source_width: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        # "self" is the name in every BERT checkpoint.
        self.self = Projections(config.width, source_width, config.heads)
        self.output = Residual(config.width, config.width, config.dropout)

    def forward(
        self, hidden_BSD: Tensor, mask: Tensor | None, prefix: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Attend to the prefix, if any, and to the sequence; return its keys and values too."""
        layers = self.self.query, self.self.key, self.self.value
        query, key, value = self.self.fused(layers, hidden_BSD)
        key_value = key, value
        if prefix is not None:
            key_value = torch.cat((prefix[0], key), dim=2), torch.cat((prefix[1], value), dim=2)
        return self._attend(query, key_value, mask, hidden_BSD), (key, value)

    def project_image(self, image_BPE: Tensor) -> KeyValue:
        """Return the keys and values of an image for ``to_image``."""
        return self.self.fused((self.self.key, self.self.value), image_BPE)

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
        # dropout(softmax(Q K^T / sqrt(d) + mask)) V
        attended = F.scaled_dot_product_attention(query, *key_value, attn_mask=mask, dropout_p=dropout)
        return self.output(attended.transpose(1, 2).reshape(residual_BSD.shape), residual_BSD)
