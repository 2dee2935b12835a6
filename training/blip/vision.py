"""BLIP's image encoder: a ViT that is trained. The parameters have BLIP's names, which are timm's.

The legend of the names: B images, C channels, H and W pixels, P tokens of an image (class token first), E width.
"""

from functools import partial

import torch
from timm.layers import DropPath, resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.pretrain import ViTConfig
from training.models.bert import initialise
from training.models.layers import LayerNorm, Linear

# The epsilon of BLIP's norms; transformers' BlipVisionConfig has another default.
VIT_NORM_EPS = 1e-6
# Of the pixels, as CLIP's.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, hidden_BPE: Tensor) -> Tensor:
        # (B, P, 3 E) to queries, keys and values, each (B, heads, P, E / heads).
        query, key, value = self.qkv(hidden_BPE).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, inner_width)
        self.fc2 = Linear(inner_width, width)

    def forward(self, hidden_BPE: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_BPE)))


class ViTBlock(nn.Module):
    """One block, with its norms before the branches: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ViTConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = (LayerNorm(config.width, eps=VIT_NORM_EPS) for _ in range(2))
        self.attn = _Attention(config.width, config.heads)
        self.mlp = _FeedForward(config.width, round(config.mlp_ratio * config.width))
        # Stochastic depth (arXiv 1603.09382): in training, images of a batch skip a branch with a probability.
        self.drop_path = DropPath(drop_path)

    def forward(self, hidden_BPE: Tensor) -> Tensor:
        """Apply the block."""
        hidden_BPE = hidden_BPE + self.drop_path(self.attn(self.norm1(hidden_BPE)))
        return hidden_BPE + self.drop_path(self.mlp(self.norm2(hidden_BPE)))


class ViT(nn.Module):
    """The image encoder on uint8 pixels.

    Args:
        config: its shape.
        image_size_px: side of the images.
        dtype: of the matrix products.
    """

    def __init__(self, config: ViTConfig, image_size_px: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        patches = (image_size_px // config.patch_px) ** 2
        self.dtype = dtype
        self.width = config.width
        self.image_size_px = image_size_px
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, config.width))
        patch = nn.Conv2d(3, config.width, config.patch_px, stride=config.patch_px)
        self.patch_embed = nn.ModuleDict({"proj": patch})
        # From 0 at the first block to drop_path at the last one, as in DeiT.
        rates = torch.linspace(0, config.drop_path, config.layers, device="cpu").tolist()
        self.blocks = nn.ModuleList(ViTBlock(config, rate) for rate in rates)
        self.norm = LayerNorm(config.width, eps=VIT_NORM_EPS)
        # (p / 255 - mean) / std = p * scale + shift for uint8 pixels p.
        mean, std = torch.tensor(_MEAN), torch.tensor(_STD)
        self.register_buffer("scale_C11", (1 / (255 * std))[:, None, None], persistent=False)
        self.register_buffer("shift_C11", (-mean / std)[:, None, None], persistent=False)
        self.apply(partial(initialise, std=config.initializer_range))
        for tokens in (self.cls_token, self.pos_embed):
            nn.init.normal_(tokens, std=config.initializer_range)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the features (B, P, E) of uint8 pixels."""
        pixels_BCHW = (pixels_BCHW.to(self.scale_C11.dtype) * self.scale_C11 + self.shift_C11).to(self.dtype)
        proj = self.patch_embed.proj
        patches_BEhw = F.conv2d(
            pixels_BCHW, proj.weight.to(self.dtype), proj.bias.to(self.dtype), stride=proj.stride
        )
        patches_BPE = patches_BEhw.flatten(2).transpose(1, 2)
        class_B1E = self.cls_token.to(self.dtype).expand(len(pixels_BCHW), -1, -1)
        hidden_BPE = torch.cat((class_B1E, patches_BPE), dim=1) + self.pos_embed.to(self.dtype)
        for block in self.blocks:
            hidden_BPE = block(hidden_BPE)
        return self.norm(hidden_BPE)


def resize_positions(positions_1PE: Tensor, num_tokens: int) -> Tensor:
    """Return position embeddings for another number of tokens: those of the patches bicubically, as BLIP's.

    Args:
        positions_1PE: of the class token, then of a square of patches.
        num_tokens: the class token's and those of the new square.
    """
    side = round((num_tokens - 1) ** 0.5)
    return resample_abs_pos_embed(positions_1PE, [side, side], antialias=False)
