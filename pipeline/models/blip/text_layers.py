"""The layers of BLIP's text models (BERT with cross-attention) over rows: the tokens of any number of texts.

What concerns a row alone is computed here, on the weights of transformers' BLIP; which rows attend to which is the
caller's: the decoder's samples (``decoder``) or whole texts (``matcher``). Keys and values of the image are projected
once an image and layer, and all rows of an image are the query axis of one attention over them.

The legend of the names: B images, P image positions, E their width, R rows, Q query positions, H heads, d their
width, D = H * d.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention
from transformers.models.blip.modeling_blip_text import BlipTextLayer, BlipTextModel

from pipeline.models.blip.vision import ImageKeysValues

Attend = Callable[[int, Tensor], Tensor]
F = TypeVar("F", bound=Callable)

# oneDNN lays a weight out for this number of rows; any number is computed correctly.
_ROWS = 16


class PackedLinear(nn.Module):
    """``nn.Linear`` on a CPU in float32, for inference, for inputs of a few rows.

    torch's own kernel lays a layer's weight out anew at each call: nothing for a thousand rows, half of the time for
    ten, as in decoding. oneDNN takes a weight laid out once: 1.9 times as fast at 10 rows, 1.4 at 20, 1.2 at 40, equal
    from 100 on (one thread, float32, the decoder's sizes). torch.compile uses the same operators for frozen weights.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("bias", bias.detach(), persistent=False)
        # Not a buffer: a packed tensor cannot be copied, cast or saved.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)

    def forward(self, x_RI: Tensor) -> Tensor:
        """Return (R, O) of (R, I)."""
        return torch.ops.mkldnn._linear_pointwise(x_RI, self._packed, self.bias, "none", [], "")


def linear_layer(weight: Tensor, bias: Tensor, few_rows: bool) -> nn.Module:
    """Return the layer of these weights, in the form that is fastest for few rows where they are few."""
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    if few_rows and on_cpu and torch.backends.mkldnn.is_available():
        return PackedLinear(weight, bias)
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def stacked_linear(layers: Sequence[nn.Linear], few_rows: bool) -> nn.Module:
    """Return layers of one input as one matrix product: their weights stacked along the outputs."""
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    return linear_layer(weight, bias, few_rows)


class TextLayer(nn.Module):
    """One layer without its attentions: functions of each row alone. Post-norm, as BERT: norm(x + f(x))."""

    def __init__(self, layer: BlipTextLayer, few_rows: bool) -> None:
        super().__init__()

        def prepared(linear: nn.Linear) -> nn.Module:
            return linear_layer(linear.weight, linear.bias, few_rows)

        own, cross = layer.attention, layer.crossattention
        self.qkv = stacked_linear((own.self.query, own.self.key, own.self.value), few_rows)
        self.self_dense, self.self_norm = prepared(own.output.dense), own.output.LayerNorm
        self.query = prepared(cross.self.query)
        self.cross_dense, self.cross_norm = prepared(cross.output.dense), cross.output.LayerNorm
        self.up, self.activation = prepared(layer.intermediate.dense), layer.intermediate.intermediate_act_fn
        self.down, self.norm = prepared(layer.output.dense), layer.output.LayerNorm

    def after_self(self, context_RD: Tensor, hidden_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows after self-attention, and their queries of the image."""
        # x1 = norm(W_o context + x)
        hidden_RD = self.self_norm(self.self_dense(context_RD) + hidden_RD)
        return hidden_RD, self.query(hidden_RD)

    def after_cross(self, context_RD: Tensor, hidden_RD: Tensor) -> Tensor:
        """Return the rows after cross-attention and feed-forward."""
        # x2 = norm(W_o context + x1), x3 = norm(W_down gelu(W_up x2) + x2)
        hidden_RD = self.cross_norm(self.cross_dense(context_RD) + hidden_RD)
        return self.norm(self.down(self.activation(self.up(hidden_RD))) + hidden_RD)


class TextLayers(nn.Module):
    """The embeddings and layers of a BLIP text model, in the shapes that inference needs.

    Args:
        compiled: compile what stands between the attentions; for shapes that never change.
        few_rows: a call has tens of rows, as in decoding, not thousands.
    """

    def __init__(self, model: BlipTextModel, *, compiled: bool = False, few_rows: bool = False) -> None:
        super().__init__()
        # Compiled as functions of the layer, so that one compilation serves all layers.
        compile_ = partial(torch.compile, dynamic=False) if compiled else _uncompiled
        self._after_self = compile_(TextLayer.after_self)
        self._after_cross = compile_(TextLayer.after_cross)
        self.num_heads = model.config.num_attention_heads
        self.width = model.config.hidden_size
        self.embeddings = model.embeddings
        self.layers = nn.ModuleList(TextLayer(layer, few_rows) for layer in model.encoder.layer)
        self.image_keys_values = ImageKeysValues([layer.crossattention.self for layer in model.encoder.layer])

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.image_keys_values.weight.device

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the first hidden state of tokens, of any shape, at positions that broadcast with them."""
        # norm(word + position), as BERT without token types.
        table = self.embeddings
        summed = table.word_embeddings(tokens) + table.position_embeddings(positions)
        return layer_norm(
            summed, (self.width,), table.LayerNorm.weight, table.LayerNorm.bias, table.LayerNorm.eps
        )

    def hidden(self, hidden_RD: Tensor, attend_self: Attend, attend_image: Attend) -> Tensor:
        """Run all layers over rows.

        Args:
            attend_self: (layer, (R, 3D) projections) -> (R, D); keeps keys and values.
            attend_image: (layer, (R, D) queries) -> (R, D).
        """
        for index, layer in enumerate(self.layers):
            context_RD = attend_self(index, layer.qkv(hidden_RD))
            hidden_RD, query_RD = self._after_self(layer, context_RD, hidden_RD)
            hidden_RD = self._after_cross(layer, attend_image(index, query_RD), hidden_RD)
        return hidden_RD

    def attend_grid(self, query_RD: Tensor, k_BHPd: Tensor, v_BHPd: Tensor) -> Tensor:
        """Attend to the images with as many rows for each: (R, D), R = B * Q, image by image."""
        # softmax(q K^T / sqrt(d)) V with the samples of an image as the query axis: (B, H, Q, d) x (B, H, P, d).
        q_BHQd = query_RD.view(k_BHPd.shape[0], -1, self.num_heads, k_BHPd.shape[-1]).transpose(1, 2)
        return join_heads(scaled_dot_product_attention(q_BHQd, k_BHPd, v_BHPd))


def join_heads(context_BHQd: Tensor) -> Tensor:
    """Join the heads: (B, H, Q, d) to (B * Q, H * d)."""
    return context_BHQd.transpose(1, 2).flatten(0, 1).flatten(1)


def _uncompiled(function: F) -> F:
    return function
