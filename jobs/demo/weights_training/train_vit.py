"""Step 0 of the demo's weights: a ViT that can tell the world's shapes, as BLIP's image encoder begins with a DeiT.

It knows the labels of drawn pictures (colour, shape, size, background) and where in them the object is, and no word of
a caption. The labels alone do not teach it shapes in these minutes: the loss of shape stays at chance until the first
blocks find the object. So they are asked, pixel by pixel, where it is.

Legend: N images, B of a batch, C channels, H height, W width, P tokens, T some of them, E width, K values of an
attribute, A attributes, S pixels of a patch.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from jobs.demo.weights_training.models import descend, in_half
from jobs.demo.weights_training.train_weights import attribute_indices, augment
from jobs.demo.world.pictures import demo_images, demo_masks
from jobs.demo.world.scenes import ATTRIBUTES, WORDS_BY_SLOT
from pipeline.config import load_config
from pipeline.models.files.model_files import WEIGHTS_FILE
from pipeline.storage.local_files import moved_when_whole
from schemas.pretrain import PretrainConfig
from training.blip.vision import ViT

SEED, EVALUATION_SEED = 11, 12
_RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "demo-blip-pretrain.toml"
# Shape is what takes longest.
_WEIGHTS = {"colour": 1.0, "shape": 2.0, "size": 1.0, "background": 1.0}
_MASK_WEIGHT = 2.0
_BATCH_SIZE, _PEAK_LR, _WARM_UP_STEPS = 32, 2e-3, 100


@dataclass(frozen=True, slots=True)
class LabelledPictures:
    """Pictures as uint8, where their object is, and what it is: (N, 4, H, W) and the indices (N, A) of attributes."""

    pixels_and_mask_N4HW: Tensor
    labels_NA: Tensor

    @classmethod
    def draw(cls, num_images: int, seed: int) -> "LabelledPictures":
        pictures = demo_images(num_images, seed)
        pixels_N3HW = torch.from_numpy(pictures.pixels_NHWC).permute(0, 3, 1, 2)
        mask_NHW = torch.from_numpy(demo_masks(num_images, seed))
        return cls(torch.cat((pixels_N3HW, mask_NHW[:, None]), dim=1), attribute_indices(pictures.scenes))


class LabelledViT(nn.Module):
    """A ViT with classifiers on its class token and on each patch, and one of pixels behind its second block."""

    def __init__(self, vit: ViT, patch_px: int) -> None:
        super().__init__()
        self.vit = vit
        sizes = [len(WORDS_BY_SLOT[slot]) for slot in ATTRIBUTES]
        self.of_class, self.of_patch = (
            nn.ModuleList(nn.Linear(vit.width, size) for size in sizes) for _ in range(2)
        )
        self.of_pixels = nn.Linear(vit.width, patch_px**2)
        self.patch_px = patch_px
        vit.blocks[1].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: object, hidden_BPE: Tensor) -> None:
        self._middle_BPE = hidden_BPE

    def loss(self, pixels_and_mask_B4HW: Tensor, labels_BA: Tensor) -> Tensor:
        """Return the mean cross-entropies of labels and pixels."""
        features_BPE = self.vit(pixels_and_mask_B4HW[:, :3]).float()
        loss = _MASK_WEIGHT * self._mask_loss(pixels_and_mask_B4HW[:, 3])
        # Each patch is asked too (arXiv 2104.10858): what is read of the image later is its patches.
        for heads, tokens_BTE in ((self.of_class, features_BPE[:, :1]), (self.of_patch, features_BPE[:, 1:])):
            for slot, head, labels_B in zip(ATTRIBUTES, heads, labels_BA.T, strict=True):
                logits_BTK = head(tokens_BTE)
                labels_BT = labels_B[:, None].expand(logits_BTK.shape[:2])
                loss = loss + _WEIGHTS[slot] * F.cross_entropy(logits_BTK.flatten(0, 1), labels_BT.flatten())
        return loss

    def _mask_loss(self, mask_BHW: Tensor) -> Tensor:
        side = self.patch_px
        inside_BhwSS = (mask_BHW.float() / 255).unfold(1, side, side).unfold(2, side, side)
        logits_BPS = self.of_pixels(self._middle_BPE[:, 1:].float())
        return F.binary_cross_entropy_with_logits(logits_BPS, inside_BhwSS.flatten(3).flatten(1, 2))

    @torch.no_grad()
    def accuracy(self, pictures: LabelledPictures) -> dict[str, float]:
        """Return the share of right labels by attribute, by the class token."""
        parts = pictures.pixels_and_mask_N4HW[:, :3].split(100)
        class_NE = torch.cat([self.vit(pixels_BCHW)[:, 0].float() for pixels_BCHW in parts])
        return {
            slot: float((head(class_NE).argmax(1) == labels_N).float().mean())
            for slot, head, labels_N in zip(ATTRIBUTES, self.of_class, pictures.labels_NA.T, strict=True)
        }


def shifted(images_BCHW: Tensor) -> Tensor:
    """Shift each image by up to 3 pixels and mirror half of them, its mask with it: no label is a place or a side."""
    return augment(images_BCHW.float()).to(torch.uint8)


def train(model: LabelledViT, pictures: LabelledPictures, steps: int) -> None:
    """Train for so many steps; the learning rate follows half a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_LR, weight_decay=0.05, betas=(0.9, 0.98))
    num_images = len(pictures.labels_NA)
    rows_N = torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        if len(rows_N) < _BATCH_SIZE:
            rows_N = torch.randperm(num_images)
        rows_B, rows_N = rows_N[:_BATCH_SIZE], rows_N[_BATCH_SIZE:]
        cosine = 1.01 + math.cos(math.pi * step / steps)
        # The fused attention's backward pass in bfloat16 is slower on a CPU than plain matrix products: of 48 images
        # 0.24 s a step against 0.17 s.
        with sdpa_kernel(SDPBackend.MATH):
            loss = model.loss(shifted(pictures.pixels_and_mask_N4HW[rows_B]), pictures.labels_NA[rows_B])
            descend(optimizer, loss, lr=_PEAK_LR * min(1, step / _WARM_UP_STEPS) * cosine / 2)
        if step % 100 == 0:
            print(f"{step} of {steps} steps, {time.process_time():.0f} s, loss {loss.item():.3f}", flush=True)


def train_vit(out: Path, steps: int, num_images: int) -> dict[str, float]:
    """Write the folder of a trained ViT, which ``blip.vision.init`` takes; return its accuracies on new pictures."""
    torch.manual_seed(0)
    config = load_config(_RECIPE, [], PretrainConfig)
    assert config.blip is not None
    vit = ViT(config.blip.vision, config.data.image_size_px, torch.bfloat16)
    model = LabelledViT(vit, config.blip.vision.patch_px)
    train(model, LabelledPictures.draw(num_images, SEED), steps)
    with moved_when_whole(out) as unfinished:
        unfinished.mkdir()
        save_file(in_half(vit.named_parameters()), unfinished / WEIGHTS_FILE)
        (unfinished / "config.json").write_text('{"model_type": "vit"}\n')
    return model.accuracy(LabelledPictures.draw(500, EVALUATION_SEED))
