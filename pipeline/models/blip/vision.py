"""What BLIP's text models read of an image: the features of the vision tower, and their keys and values.

transformers' BLIP computes attention without torch's fused kernels; the tower here uses them, on the same weights.
BLIP-2's towers (EVA) have the same blocks under the same names.

The legend of the names: B images, C channels, P positions (patches and the class token), E width, H heads,
d their width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention
from transformers.models.blip.modeling_blip import BlipEncoderLayer, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention
from transformers.models.blip_2.modeling_blip_2 import (
    Blip2EncoderLayer,
    Blip2QFormerMultiHeadAttention,
    Blip2VisionModel,
)


class VisionTower(nn.Module):
    """The vision tower of a BLIP or BLIP-2 model, sharing its weights; for inference alone.

    Args:
        compiled_batch: compile the block, once for all of them, for this number of images: smaller batches are padded,
            so that a shard's last batch compiles nothing. On a GPU it fuses the operations between matrix products.
    """

    def __init__(self, model: BlipVisionModel | Blip2VisionModel, compiled_batch: int | None = None) -> None:
        super().__init__()
        self.model = model
        self._batch = compiled_batch or 0
        self._block = torch.compile(_block, dynamic=False) if compiled_batch else _block

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, one after the other."""
        return self.model.encoder.layers

    def take_at_most(self, images: int) -> None:
        """Compute for so many images from now on; compiled code is compiled anew for them."""
        self._batch = images if self._batch else 0

    @torch.inference_mode()
    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the features of every position: (B, P, E)."""
        images = len(pixels_BCHW)
        hidden_BPE = self.model.embeddings(pad(pixels_BCHW, (0, 0) * 3 + (0, max(self._batch - images, 0))))
        for layer in self.blocks:
            hidden_BPE = self._block(layer, hidden_BPE)
        return self.model.post_layernorm(hidden_BPE[:images])


def _block(layer: BlipEncoderLayer | Blip2EncoderLayer, hidden_BPE: Tensor) -> Tensor:
    # Pre-norm, as in ViT: x + W_o Attention(norm_1(x)), then x + MLP(norm_2(x)).
    attention = layer.self_attn
    q_BHPd, k_BHPd, v_BHPd = (
        attention.qkv(layer.layer_norm1(hidden_BPE))
        .unflatten(-1, (3, attention.num_heads, attention.head_dim))
        .permute(2, 0, 3, 1, 4)
    )
    context_BHPd = scaled_dot_product_attention(q_BHPd, k_BHPd, v_BHPd)
    hidden_BPE = hidden_BPE + attention.projection(context_BHPd.transpose(1, 2).flatten(2))
    return hidden_BPE + layer.mlp(layer.layer_norm2(hidden_BPE))


class ImageKeysValues(nn.Module):
    """The keys and values that text layers read of an image, projected once an image for all its captions.

    Args:
        crosses: the cross-attention of each layer, of BLIP's text models or BLIP-2's Q-Former; all of one width.
    """

    def __init__(self, crosses: Sequence[BlipTextSelfAttention | Blip2QFormerMultiHeadAttention]) -> None:
        super().__init__()
        self._num_heads, self._width = crosses[0].num_attention_heads, crosses[0].all_head_size
        # Key and value of layer 0, of layer 1, ...: one matrix product for all of them.
        self.weight = _frozen(torch.cat([p for c in crosses for p in (c.key.weight, c.value.weight)]))
        self.bias = _frozen(torch.cat([p for c in crosses for p in (c.key.bias, c.value.bias)]))

    def forward(self, image_BPE: Tensor, layer: int | None = None) -> Tensor:
        """Return keys and values of every layer, or of one: (layers, 2, B, H, P, d), or without the first axis."""
        per_layer = 2 * self._width
        rows = slice(None) if layer is None else slice(layer * per_layer, (layer + 1) * per_layer)
        projected = linear(image_BPE, self.weight[rows], self.bias[rows])
        # (B, P, layers * 2 * H * d) to (layers, 2, B, H, P, d).
        split = projected.unflatten(-1, (-1, 2, self._num_heads, self._width // self._num_heads))
        heads = split.permute(2, 3, 0, 4, 1, 5)
        return heads if layer is None else heads[0]


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
