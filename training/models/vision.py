"""The frozen image encoder: an open_clip tower without its last block.

BLIP-2 (section 3.3) takes the features of the second-to-last block of CLIP ViT-L/14 and EVA-CLIP ViT-g/14, all
tokens and without the final norm. What comes after them is removed from the tower.

The legend of the names: B images, C channels, H and W pixels, P tokens of an image (class token first), E width.
"""

from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import _build_vision_tower
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.checks import require_finite_weights
from pipeline.models.clip.loader import load_clip
from pipeline.models.clip_config import clip_config
from pipeline.models.weights import ranker_weights
from schemas.errors import CapfiltError
from schemas.pretrain import VisionConfig
from training.models.layers import LayerNorm


class FrozenVision(nn.Module):
    """An image encoder that is never trained: without gradients and always in evaluation mode.

    Args:
        tower: open_clip's ``visual`` of a CLIP; it is modified.
        drop_blocks: blocks removed at the end.
        dtype: of the matrix products. Norms, class token, positions and the sums of the residual branches stay in the
            dtype of the tower, as under autocast in LAVIS.
        mean, std: of the pixels, per channel, as the tower was trained.
    """

    def __init__(
        self,
        tower: nn.Module,
        drop_blocks: int,
        dtype: torch.dtype,
        mean: tuple[float, ...] = open_clip.OPENAI_DATASET_MEAN,
        std: tuple[float, ...] = open_clip.OPENAI_DATASET_STD,
    ) -> None:
        super().__init__()
        self.tower, self.blocks, self.width = _without_end(tower, drop_blocks)
        self.dtype = dtype
        self.image_size_px = tower.image_size[0] if isinstance(tower.image_size, tuple) else tower.image_size
        # (p / 255 - mean) / std = p * scale + shift for uint8 pixels p: one multiplication and one addition.
        scale = torch.tensor(std, dtype=torch.float32).mul(255).reciprocal()
        shift = -torch.tensor(mean, dtype=torch.float32) / torch.tensor(std, dtype=torch.float32)
        self.register_buffer("scale_C", scale, persistent=False)
        self.register_buffer("shift_C", shift, persistent=False)
        _lower_precision(self.tower, self.blocks, dtype)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "FrozenVision":
        """Stay in evaluation mode."""
        return super().train(False)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of an image."""
        patch = (
            self.tower.conv1 if isinstance(self.tower, VisionTransformer) else self.tower.patch_embed.proj
        ).weight
        # (side / patch)^2 patches and the class token.
        return (self.image_size_px // patch.shape[-1]) ** 2 + 1

    @torch.no_grad()
    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the features (B, P, E) of uint8 pixels."""
        # (p / 255 - mean) / std, in the precision of the buffers, then rounded to that of the matrix products.
        pixels_BCHW = (
            pixels_BCHW.to(self.scale_C.dtype) * self.scale_C[:, None, None] + self.shift_C[:, None, None]
        )
        pixels_BCHW = pixels_BCHW.to(self.dtype)
        if not isinstance(self.tower, VisionTransformer):
            return self.tower.forward_features(pixels_BCHW).to(self.dtype)
        # Section 3.3: patch and position embeddings, then all blocks that are left; no final norm, no projection.
        features_BPE = self._embeds(pixels_BCHW)
        for block in self.blocks:
            features_BPE = block(features_BPE)
        return features_BPE.to(self.dtype)

    def _embeds(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the patches behind the class token, with their positions, in the dtype of those (B, P, E).

        open_clip's own rounds the sum to the dtype of the patches.
        """
        tower = self.tower
        patches_BPE = tower.conv1(pixels_BCHW).flatten(2).transpose(1, 2)
        class_B1E = tower.class_embedding.expand(len(patches_BPE), 1, -1)
        tokens_BPE = torch.cat((class_B1E, patches_BPE.to(class_B1E.dtype)), dim=1)
        return tower.ln_pre(tokens_BPE + tower.positional_embedding)


class PackedAttention(nn.Module):
    """``nn.MultiheadAttention`` over one sequence, with SDPA and without its copies of Q, K and V."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = attention.out_proj

    def forward(self, hidden_BPE: Tensor, *_: Tensor, **__: Any) -> tuple[Tensor, None]:
        """Attend; takes and returns what ``nn.MultiheadAttention`` does."""
        # Q, K and V by one product with their weights below one another, each (B, H, P, d).
        packed = F.linear(hidden_BPE, self.in_proj_weight, self.in_proj_bias)
        query, key, value = packed.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        # softmax(Q K^T / sqrt(d)) V, and the heads side by side again: (B, P, E).
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None


def load_vision(config: VisionConfig, image_size_px: int, dtype: torch.dtype) -> FrozenVision:
    """Load the encoder that ``[vision]`` names, on the CPU.

    Raises:
        CapfiltError: no such model, no such file, or made for another image size.
    """
    weights = ranker_weights(config.model, config.pretrained, "vision")
    visual = load_clip(weights, "vision.model").visual
    size = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
    if size != image_size_px:
        raise CapfiltError(
            f"vision.model = {weights.name!r} takes images of {size} pixels; set data.image_size_px = {size}"
        )
    preprocess = visual.preprocess_cfg
    vision = FrozenVision(
        visual, config.drop_blocks, dtype, tuple(preprocess["mean"]), tuple(preprocess["std"])
    )
    require_finite_weights(vision.tower.state_dict(), f"vision.model = {weights.name!r} in {weights.path}")
    return vision


def empty_vision(config: VisionConfig, device: torch.device | str, dtype: torch.dtype) -> FrozenVision:
    """Build the encoder that ``[vision]`` names without its weights: on ``meta``, or at random on a device."""
    if config.model.startswith(("local-dir:", "hf-hub:")):
        folder = Path(ranker_weights(config.model, config.pretrained, "vision").path)
        shape = clip_config(folder, "vision.model")["model_cfg"]
    else:
        shape = open_clip.get_model_config(config.model)
        if shape is None:
            # Raises an error with the nearest names.
            ranker_weights(config.model, config.pretrained, "vision")
    tag = open_clip.get_pretrained_cfg(config.model, config.pretrained) or {}
    quick_gelu = bool(shape.get("quick_gelu") or tag.get("quick_gelu"))
    with torch.device(device):
        tower = _build_vision_tower(shape["embed_dim"], shape["vision_cfg"], quick_gelu)
        return FrozenVision(tower, config.drop_blocks, dtype)


def _without_end(tower: nn.Module, drop_blocks: int) -> tuple[nn.Module, nn.ModuleList, int]:
    """Return a tower cut before its last blocks and norm, its blocks, and its width."""
    match tower:
        case VisionTransformer():
            blocks, width = tower.transformer.resblocks, tower.conv1.out_channels
            tower.ln_post, tower.attn_pool, tower.proj = nn.Identity(), None, None
            for block in blocks:
                if isinstance(getattr(block, "attn", None), nn.MultiheadAttention):
                    block.attn = PackedAttention(block.attn)
        case TimmModel():
            tower = tower.trunk
            blocks, width = tower.blocks, tower.embed_dim
            tower.norm = tower.fc_norm = tower.head = nn.Identity()
        case _:
            raise CapfiltError(
                f"vision.model: a {type(tower).__name__} has no blocks to take features from; name a ViT"
            )
    if drop_blocks >= len(blocks):
        raise CapfiltError(f"vision.drop_blocks = {drop_blocks}: the tower has {len(blocks)} blocks")
    if drop_blocks:
        del blocks[-drop_blocks:]
    return tower, blocks, width


def _lower_precision(tower: nn.Module, blocks: nn.ModuleList, dtype: torch.dtype) -> None:
    """Convert all but norms, class token and positions to another dtype, which norms in the blocks then return.

    A residual branch is then computed in that dtype, while the sum of the branches, x + branch(norm(x)), keeps the
    dtype of x: in bfloat16 a channel of 200 would be rounded to whole numbers in every block.
    """
    in_blocks = set(blocks.modules())
    is_lower = any(parameter.dtype != dtype for parameter in tower.parameters())
    for name, module in list(tower.named_modules()):
        if isinstance(module, nn.LayerNorm):
            norm = LayerNorm.like(module)
            if is_lower and module in in_blocks:
                norm.output_dtype = dtype
            tower.set_submodule(name, norm)
            continue
        if module is tower:
            continue  # its own parameters are the class token and the positions
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        for buffer_name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                module.register_buffer(buffer_name, buffer.to(dtype), persistent=False)
