"""CLIP's transformer block on open_clip's weights, in parts: projection, attention, the rest.

Pre-norm, as in GPT-2: x + Attention(norm_1(x)), then x + MLP(norm_2(x)), each branch times open_clip's layer scale.

The legend of the names: B sequences, S sequences too, of which one row is read, T rows that are read, L tokens,
N packed tokens, D width, H heads, K width of a head.
"""

from open_clip.transformer import ResidualAttentionBlock, Transformer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


def has_plain_blocks(transformer: nn.Module) -> bool:
    """Tell whether a transformer is of CLIP's own blocks: pre-norm, softmax attention, no further norms."""
    return type(transformer) is Transformer and all(
        type(block) is ResidualAttentionBlock and not hasattr(block, "ln_1_kv")
        for block in transformer.resblocks
    )


class ClipBlock(nn.Module):
    """A pre-norm transformer block that shares the weights of one of open_clip's, over tokens in any layout."""

    def __init__(self, block: ResidualAttentionBlock) -> None:
        super().__init__()
        self._norm_1, self._norm_2 = block.ln_1, block.ln_2
        self._scale_1, self._scale_2 = block.ls_1, block.ls_2
        self._num_heads = block.attn.num_heads
        self._out, self._mlp = block.attn.out_proj, block.mlp
        self._share_projection(block.attn)

    def _share_projection(self, attention: nn.MultiheadAttention) -> None:
        self.query_key_value = _linear(attention.in_proj_weight, attention.in_proj_bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Let the tokens of each sequence attend to each other."""
        query_BHLK, key_BHLK, value_BHLK = self.project(x_BLD).permute(2, 0, 3, 1, 4)
        context_BHLK = scaled_dot_product_attention(query_BHLK, key_BHLK, value_BHLK)
        return self.finish(x_BLD, context_BHLK.transpose(1, 2).flatten(2))

    def project(self, x: Tensor) -> Tensor:
        """Return query, key and value of each token: (..., D) to (..., 3, H, K)."""
        return self.query_key_value(self._norm_1(x)).unflatten(-1, (3, self._num_heads, -1))

    def finish(self, x: Tensor, context: Tensor) -> Tensor:
        """Add the attention's output projection and the MLP to the residual stream; (..., D)."""
        x = x + self._scale_1(self._out(context))
        return x + self._scale_2(self._mlp(self._norm_2(x)))


class LastBlock(ClipBlock):
    """Last transformer block: only one row per sequence is used, so only that row computes a query.

    Keys and values are computed for all rows.
    """

    def _share_projection(self, attention: nn.MultiheadAttention) -> None:
        # in_proj_weight stacks the weights of query, key and value, in this order: (3D, D).
        width = attention.embed_dim
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        self.query = _linear(weight[:width], bias[:width])
        self.key_value = _linear(weight[width:], bias[width:])

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the first row of each sequence."""
        normed_BLD = self._norm_1(x_BLD)
        keys_values_BL2HK = self.key_value(normed_BLD).unflatten(-1, (2, self._num_heads, -1))
        context_BD = self.attend(self.query(normed_BLD[:, 0]), keys_values_BL2HK)
        return self.finish(x_BLD[:, 0], context_BD)

    def project_read(self, x_ND: Tensor, rows_T: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries of the rows that are read, and keys and values (N, 2, H, K) of all."""
        normed_ND = self._norm_1(x_ND)
        return self.query(normed_ND[rows_T]), self.key_value(normed_ND).unflatten(
            -1, (2, self._num_heads, -1)
        )

    def attend(self, query_SD: Tensor, keys_values_SL2HK: Tensor, seen_SL: Tensor | None = None) -> Tensor:
        """Return softmax(q K^T / sqrt(K width)) V of each sequence's one query, over ``seen_SL`` tokens; (S, D)."""
        key_SHLK, value_SHLK = keys_values_SL2HK.permute(2, 0, 3, 1, 4)
        query_SH1K = query_SD.unflatten(-1, (self._num_heads, 1, -1))
        mask_S11L = None if seen_SL is None else seen_SL[:, None, None]
        return scaled_dot_product_attention(query_SH1K, key_SHLK, value_SHLK, attn_mask=mask_S11L).flatten(1)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """Return a layer on existing weights, which it shares."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer
