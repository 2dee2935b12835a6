"""BLIP's text decoder (BERT with cross-attention) for many samples of one image; the loop is in ``generation``.

The legend of the names: B images, P image positions, E their width, R rows (unfinished captions), Q query
positions, H heads, d their width, D = H * d, L tokens so far, V vocabulary.

The weights are those of transformers' ``BlipTextLMHeadModel``. Unlike there, keys and values of the image are
projected once an image and layer, not once a sample; all samples of an image are the query axis of one attention
over them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention
from transformers.models.blip.modeling_blip_text import BlipTextLayer, BlipTextLMHeadModel

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


def for_few_rows(weight: Tensor, bias: Tensor) -> nn.Module:
    """Return the layer of these weights in the form that is fastest for few rows on their device."""
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return PackedLinear(weight, bias)
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


class DecoderLayer(nn.Module):
    """One layer without its attentions: functions of each row alone. Post-norm, as BERT: norm(x + f(x))."""

    def __init__(self, layer: BlipTextLayer) -> None:
        super().__init__()
        own, cross = layer.attention, layer.crossattention
        projections = (own.self.query, own.self.key, own.self.value)
        # Query, key and value as one matrix product: the weights stacked along the outputs.
        self.qkv = for_few_rows(
            torch.cat([part.weight for part in projections]), torch.cat([part.bias for part in projections])
        )
        self.self_dense, self.self_norm = _packed(own.output.dense), own.output.LayerNorm
        self.query = _packed(cross.self.query)
        self.cross_dense, self.cross_norm = _packed(cross.output.dense), cross.output.LayerNorm
        self.up, self.activation = _packed(layer.intermediate.dense), layer.intermediate.intermediate_act_fn
        self.down, self.norm = _packed(layer.output.dense), layer.output.LayerNorm

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


class BlipDecoder(nn.Module):
    """The weights of a BLIP captioner's text decoder, in the shapes that decoding needs; for inference alone.

    Args:
        compiled: compile what stands between the attentions; for shapes that never change.
    """

    def __init__(self, model: BlipTextLMHeadModel, compiled: bool = False) -> None:
        super().__init__()
        # Compiled as functions of the layer, so that one compilation serves all layers.
        compile_ = partial(torch.compile, dynamic=False) if compiled else _uncompiled
        self._after_self = compile_(DecoderLayer.after_self)
        self._after_cross = compile_(DecoderLayer.after_cross)
        config = model.config
        self.num_heads = config.num_attention_heads
        self.width = config.hidden_size
        self.vocabulary = config.vocab_size
        self.end_id = config.sep_token_id
        self.embeddings = model.bert.embeddings
        self.layers = nn.ModuleList(DecoderLayer(layer) for layer in model.bert.encoder.layer)
        self.image_keys_values = ImageKeysValues(model.bert.encoder.layer)
        head = model.cls.predictions
        self.transform, self.activation = _packed(head.transform.dense), head.transform.transform_act_fn
        self.norm = head.transform.LayerNorm
        # bfloat16 has 8 bits of precision, too few to tell 30,524 logits apart: they are float32 in every precision.
        # On a GPU the product takes bfloat16 inputs and sums in float32.
        self.lowered = head.decoder.weight.is_cuda and head.decoder.weight.dtype != torch.float32
        weight = head.decoder.weight if self.lowered else head.decoder.weight.float()
        self.out = for_few_rows(weight, head.decoder.bias.float())

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

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Return float32 logits of the next token: (R, V)."""
        hidden_RD = self.norm(self.activation(self.transform(hidden_RD)))
        if self.lowered:
            return torch.mm(hidden_RD, self.out.weight.T, out_dtype=torch.float32).add_(self.out.bias)
        return self.out(hidden_RD.float())

    def prefix(self, token_ids: Sequence[int], image_kv: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Run the tokens that all captions begin with, once an image.

        Args:
            image_kv: for each layer, (2, B, H, P, d).

        Returns:
            Logits of the token after them (B, V), and their own keys and values (layers, 2, B, H, L, d).
        """
        num_images, length = image_kv[0].shape[1], len(token_ids)
        tokens_L = torch.tensor(token_ids, device=self.device)
        hidden_LD = self.embed(tokens_L, torch.arange(length, device=self.device))
        kept: list[Tensor] = []

        def attend_self(_: int, projected_RM: Tensor) -> Tensor:
            parts = projected_RM.view(num_images, length, 3, self.num_heads, -1)
            q_BHLd, k_BHLd, v_BHLd = parts.permute(2, 0, 3, 1, 4)
            kept.append(torch.stack([k_BHLd, v_BHLd]))
            return _rows(scaled_dot_product_attention(q_BHLd, k_BHLd, v_BHLd, is_causal=length > 1))

        def attend_image(layer: int, query_RD: Tensor) -> Tensor:
            return self.attend_grid(query_RD, *image_kv[layer])

        hidden_RD = self.hidden(hidden_LD.repeat(num_images, 1), attend_self, attend_image)
        # The row of each image's last token predicts the next one.
        return self.logits(hidden_RD[length - 1 :: length]), torch.stack(kept)

    def attend_grid(self, query_RD: Tensor, k_BHPd: Tensor, v_BHPd: Tensor) -> Tensor:
        """Attend to the images with as many rows for each: (R, D), R = B * Q, image by image."""
        # softmax(q K^T / sqrt(d)) V with the samples of an image as the query axis: (B, H, Q, d) x (B, H, P, d).
        q_BHQd = query_RD.view(k_BHPd.shape[0], -1, self.num_heads, k_BHPd.shape[-1]).transpose(1, 2)
        return _rows(scaled_dot_product_attention(q_BHQd, k_BHPd, v_BHPd))


def _rows(context_BHQd: Tensor) -> Tensor:
    """Join the heads: (B, H, Q, d) to (B * Q, H * d)."""
    return context_BHQd.transpose(1, 2).flatten(0, 1).flatten(1)


def _uncompiled(function: F) -> F:
    return function


def _packed(layer: nn.Linear) -> nn.Module:
    return for_few_rows(layer.weight, layer.bias)
