"""BLIP's text decoder for many samples of one image; the loop is in ``generation``.

The legend of the names: B images, P image positions, R rows (unfinished captions), D width, H heads, d their width,
L tokens so far, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from pipeline.models.blip.text_layers import TextLayers, join_heads, linear_layer


class BlipDecoder(TextLayers):
    """The weights of a BLIP captioner's text decoder, in the shapes that decoding needs; for inference alone.

    Args:
        compiled: compile what stands between the attentions; for shapes that never change.
    """

    def __init__(self, model: BlipTextLMHeadModel, compiled: bool = False) -> None:
        super().__init__(model.bert, compiled=compiled, few_rows=True)
        self.vocabulary = model.config.vocab_size
        self.end_id = model.config.sep_token_id
        head = model.cls.predictions
        dense = head.transform.dense
        self.transform, self.activation = (
            linear_layer(dense.weight, dense.bias, True),
            head.transform.transform_act_fn,
        )
        self.norm = head.transform.LayerNorm
        # bfloat16 has 8 bits of precision, too few to tell 30,524 logits apart: they are float32 in every precision.
        # On a GPU the product takes bfloat16 inputs and sums in float32.
        self.lowered = head.decoder.weight.is_cuda and head.decoder.weight.dtype != torch.float32
        weight = head.decoder.weight if self.lowered else head.decoder.weight.float()
        self.out = linear_layer(weight, head.decoder.bias.float(), True)

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
            return join_heads(scaled_dot_product_attention(q_BHLd, k_BHLd, v_BHLd, is_causal=length > 1))

        def attend_image(layer: int, query_RD: Tensor) -> Tensor:
            return self.attend_grid(query_RD, *image_kv[layer])

        hidden_RD = self.hidden(hidden_LD.repeat(num_images, 1), attend_self, attend_image)
        # The row of each image's last token predicts the next one.
        return self.logits(hidden_RD[length - 1 :: length]), torch.stack(kept)
