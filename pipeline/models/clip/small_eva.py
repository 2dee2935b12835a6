"""Small image encoders of EVA's architecture: open_clip takes EVA from timm, whose EVA01 is a giant.

The architecture is that of ``EVA01-g-14``: learned positions, biases of queries and values but not of keys, GELU.
A name must be known before a CLIP with such an encoder is built, so ``pipeline.models.clip.loader`` imports this.
"""

from typing import Any

from timm.models import register_model
from timm.models.eva import Eva


def register_eva(
    name: str, *, image_size_px: int, patch_px: int, width: int, blocks: int, heads: int
) -> None:
    """Let ``timm_model_name`` of an ``open_clip_config.json`` name an EVA of this shape."""

    def build(**options: Any) -> Eva:
        # timm asks every model for its pretrained weights; these have none.
        for key in ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            options.pop(key, None)
        return Eva(
            img_size=image_size_px,
            patch_size=patch_px,
            embed_dim=width,
            depth=blocks,
            num_heads=heads,
            **options,
        )

    build.__name__ = name
    register_model(build)


register_eva("eva_tiny_patch8_64", image_size_px=64, patch_px=8, width=128, blocks=4, heads=4)
