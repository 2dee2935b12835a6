"""Train the demo's image encoder of EVA's architecture on the features of the demo's ranker.

    python -m jobs.demo.weights_training.train_tower

It begins with the ranker's own weights and learns what EVA's architecture cannot take over: a CLIP ViT has a norm
before its blocks. The small text encoder beside it learns the ranker's text embeddings, so that both make a CLIP.

Legend: B images, C channels, H and W pixels, P tokens of an image (class token first), E width, D embedding, L tokens
of a text.
"""

import argparse
import math
import random
import time
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import VisionTransformer
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.demo.weights_training.models import RANKER_DIR, TOWER_DIR, descend, save, untrained
from jobs.demo.weights_training.train_weights import TRAIN_SEED, batches, ranker_texts, to_input, tokenize
from jobs.demo.world.pictures import demo_images
from pipeline.models.clip.loader import load_clip
from pipeline.models.weights import ranker_weights

PEAK_LR = 1e-3
BATCH_SIZE = 32
# The features are so many times the ranker's. The norms that read them undo a factor, but for their epsilon: LAVIS's
# norm after the image encoder has 1e-5 and Hugging Face's 1e-6, which features of this size leave without effect.
FEATURE_SCALE = 4.0


@torch.no_grad()
def begin_as(tower: Eva, ranker: VisionTransformer, pixels_BCHW: Tensor) -> None:
    """Give an EVA the weights of a CLIP ViT of its shape.

    Args:
        pixels_BCHW: normalised images, to see how large the patches' embeddings are.
    """
    _copy_embeddings(tower, ranker, pixels_BCHW)
    for mine, block in zip(tower.blocks, ranker.transformer.resblocks, strict=True):
        mine.norm1.load_state_dict(block.ln_1.state_dict())
        mine.norm2.load_state_dict(block.ln_2.state_dict())
        mine.attn.qkv.weight.copy_(block.attn.in_proj_weight)
        # EVA's keys have no bias: it adds q.b to all scores of a query, which the softmax does not see.
        q_bias_E, _, v_bias_E = block.attn.in_proj_bias.chunk(3)
        mine.attn.q_bias.copy_(q_bias_E)
        mine.attn.v_bias.copy_(v_bias_E)
        mine.mlp.fc1.load_state_dict(block.mlp.c_fc.state_dict())
        _copy_scaled(mine.attn.proj, block.attn.out_proj)
        _copy_scaled(mine.mlp.fc2, block.mlp.c_proj)
    tower.norm.load_state_dict(ranker.ln_post.state_dict())
    tower.head.weight.copy_(ranker.proj.T)


def _copy_scaled(mine: nn.Linear, linear: nn.Linear) -> None:
    """Copy a layer that adds to the features."""
    mine.weight.copy_(FEATURE_SCALE * linear.weight)
    mine.bias.copy_(FEATURE_SCALE * linear.bias)


def _copy_embeddings(tower: Eva, ranker: VisionTransformer, pixels_BCHW: Tensor) -> None:
    """Copy the embeddings of class token and patches with the effect of the norm after them, g (x - mean) / std + b.

    The class token's is exact. For patches the mean is subtracted by the weights, and std is its average over images.
    """
    assert tower.pos_embed is not None and tower.cls_token is not None
    norm, conv, position_PE = ranker.ln_pre, ranker.conv1, ranker.positional_embedding
    patches_BPE = conv(pixels_BCHW).flatten(2).mT + position_PE[1:]
    gain_E = FEATURE_SCALE * norm.weight / patches_BPE.std(-1, unbiased=False).mean()
    centred_ECHW = conv.weight - conv.weight.mean(0)
    tower.patch_embed.proj.weight.copy_(gain_E[:, None, None, None] * centred_ECHW)
    tower.patch_embed.proj.bias.copy_(FEATURE_SCALE * norm.bias)
    tower.pos_embed.copy_(gain_E * (position_PE - position_PE.mean(-1, keepdim=True)))
    tower.pos_embed[:, 0] = 0
    tower.cls_token.copy_(FEATURE_SCALE * norm(ranker.class_embedding + position_PE[0]))


def image_features(model: nn.Module, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return an open_clip model's features_BPE after the second-to-last block, and its image embedding_BD."""
    outputs = model.forward_intermediates(
        image=pixels_BCHW,
        image_indices=[2],
        normalize=False,
        normalize_intermediates=False,
        image_output_fmt="NLC",
        image_output_extra_tokens=True,
    )
    (class_B1E,), (patches_BPE,) = outputs["image_intermediates_prefix"], outputs["image_intermediates"]
    return torch.cat([class_B1E, patches_BPE], dim=1), outputs["image_features"]


def distillation_losses(
    model: nn.Module, ranker: open_clip.CLIP, pixels_BCHW: Tensor, ids_BL: Tensor
) -> dict[str, Tensor]:
    """Return how far features and embeddings are from the ranker's: 0 equal, 1 unrelated."""
    with torch.no_grad():
        wanted_BPE, wanted_image_BD = image_features(ranker, pixels_BCHW)
        wanted_text_BD = ranker.encode_text(ids_BL)
    features_BPE, image_BD = image_features(model, pixels_BCHW)
    return {
        "features": F.mse_loss(features_BPE / FEATURE_SCALE, wanted_BPE) / wanted_BPE.var(),
        "image": 1 - F.cosine_similarity(image_BD, wanted_image_BD).mean(),
        "text": 1 - F.cosine_similarity(model.encode_text(ids_BL), wanted_text_BD).mean(),
    }


def train(model: nn.Module, tokenizer: Any, ranker: open_clip.CLIP, num_images: int, steps: int) -> None:
    """Train with AdamW on a warm-up and a cosine; print the losses now and then."""
    pictures = demo_images(num_images, TRAIN_SEED, workers=2)
    begin_as(model.visual.trunk, ranker.visual, to_input(pictures.pixels_NHWC[:256]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.0, betas=(0.9, 0.98))
    rng = random.Random(0)
    for step, (scenes, pixels_BCHW) in zip(range(1, steps + 1), batches(pictures, BATCH_SIZE), strict=False):
        texts = [rng.choice(ranker_texts(scene, rng)) for scene in scenes]
        losses = distillation_losses(model, ranker, pixels_BCHW, tokenize(tokenizer, texts))
        cosine = 0.01 + 0.495 * (1 + math.cos(math.pi * (step - 1) / steps))
        descend(optimizer, sum(losses.values()), lr=PEAK_LR * (min(1, step / 50) * cosine))
        if step % 50 == 0:
            shown = "  ".join(f"{name} {loss.item():.4f}" for name, loss in losses.items())
            print(f"{step} of {steps} steps, {time.process_time():.0f} s, {shown}", flush=True)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--num-images", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=TOWER_DIR)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ranker = load_clip(ranker_weights(f"local-dir:{RANKER_DIR}", ""), "ranker").requires_grad_(False)
    model, tokenizer = untrained(TOWER_DIR)
    train(model, tokenizer, ranker, args.num_images, args.steps)
    save(model, TOWER_DIR, args.out)


if __name__ == "__main__":
    main()
