"""BLIP's vision tower, computed with the attention kernels that transformers' BLIP does not use.

The legend of the names: B images, C channels, P positions (patches and the class token), E width, H heads,
d their width.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.models.blip.modeling_blip import BlipEncoderLayer, BlipVisionModel


class VisionTower(nn.Module):
    """The tower of a BLIP model, its weights shared with it; for inference alone.

    Args:
        compiled_batch: compile the blocks, once for all of them, for so many images: fewer are padded, so that
            a shard's last batch compiles nothing. On a GPU it fuses what stands between the matrix products.
    """

    def __init__(self, model: BlipVisionModel, compiled_batch: int | None = None) -> None:
        super().__init__()
        self.model = model
        self._batch = compiled_batch or 0
        self._block = torch.compile(_block, dynamic=False) if compiled_batch else _block

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, one after the other."""
        return self.model.encoder.layers

    @torch.inference_mode()
    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the features of every position: (B, P, E)."""
        images = len(pixels_BCHW)
        hidden_BPE = self.model.embeddings(pad(pixels_BCHW, (0, 0) * 3 + (0, max(self._batch - images, 0))))
        for layer in self.blocks:
            hidden_BPE = self._block(layer, hidden_BPE)
        return self.model.post_layernorm(hidden_BPE[:images])


def _block(layer: BlipEncoderLayer, hidden_BPE: Tensor) -> Tensor:
    attention = layer.self_attn
    q_BHPd, k_BHPd, v_BHPd = (
        attention.qkv(layer.layer_norm1(hidden_BPE))
        .unflatten(-1, (3, attention.num_heads, attention.head_dim))
        .permute(2, 0, 3, 1, 4)
    )
    context_BHPd = scaled_dot_product_attention(q_BHPd, k_BHPd, v_BHPd)
    hidden_BPE = hidden_BPE + attention.projection(context_BHPd.transpose(1, 2).flatten(2))
    return hidden_BPE + layer.mlp(layer.layer_norm2(hidden_BPE))
