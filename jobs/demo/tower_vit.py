"""The ViT that the demo's BLIP begins with: the trainings' EVA (`weights/tower`), under the names of BLIP's ViT.

BLIP does not learn to see from nothing either: it begins with a ViT that was trained on labelled images. This one knows
the shapes, colours, sizes and grounds of the world as the ranker does, whose features it learnt. EVA has the same
blocks; its keys have no bias, so that theirs is zero here.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_TOWER = Path(__file__).parent / "weights" / "tower" / "open_clip_model.safetensors"
_TRUNK = "visual.trunk."
# The one of its dimensions that the recipes of the demo's BLIP do not have.
TOWER_MLP_RATIO = 4.0


def write_tower_vit(folder: Path) -> None:
    """Write a folder that ``blip.vision.init`` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tower_vit(), folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "vit"}\n')


def tower_vit() -> dict[str, Tensor]:
    """Return the ViT's tensors."""
    files = load_file(_TOWER)
    trunk = {
        name.removeprefix(_TRUNK): tensor
        for name, tensor in files.items()
        if name.startswith(_TRUNK) and ".head." not in name
    }
    return dict(_named(name, tensor, trunk) for name, tensor in trunk.items() if "v_bias" not in name)


def _named(name: str, tensor: Tensor, trunk: dict[str, Tensor]) -> tuple[str, Tensor]:
    if not name.endswith("q_bias"):
        return name, tensor
    values = trunk[name.replace("q_bias", "v_bias")]
    return name.replace("q_bias", "qkv.bias"), torch.cat((tensor, torch.zeros_like(tensor), values))
