"""Make the demo's ViT and filter as BLIP makes its own: a ViT of labels, a MED of web texts, and the filter of it.

    python -m jobs.demo.weights_training.make_weights --folder weights-training

The trainings behind the ViT are those of ``capfilt pretrain`` with the recipes of the demo's size. What is done in the
folder is not done again: the same command goes on.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from jobs.demo.weights_training.models import FILTER_DIR, VIT_DIR, WEIGHTS_DIR, in_half
from jobs.demo.weights_training.shards import CLEAN_CAPTIONS, write_clean_shards, write_web_shards
from jobs.demo.weights_training.train_vit import train_vit
from jobs.pretrain import train_to_end
from pipeline.config import load_config
from pipeline.corpus.checkpoint_files import run_folder
from pipeline.models.files.model_files import OWN_CONFIG_FILE, WEIGHTS_FILE
from pipeline.storage.local_files import moved_when_whole
from schemas.pretrain import PretrainConfig
from training.convert.export import export_model
from training.convert.load import load_trained
from training.convert.read import EXTRA_FILE

_RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How long each training is; the defaults made what ships."""

    vit_steps: int = 4500
    num_labelled: int = 16_000
    # Of 150 pictures each: web texts for the MED, true captions for both.
    num_shards: int = 28
    med_steps: int = 700
    # Of fewer images than the recipe's, for more steps.
    filter_steps: int = 1000
    batch_size: int = 32


def make_weights(folder: Path, out: Path, extent: Extent) -> None:
    """Train in a folder, and write ViT and filter below ``out``, where they ship."""
    if not (folder / "vit").exists():
        print("accuracies of the ViT:", train_vit(folder / "vit", extent.vit_steps, extent.num_labelled))
    write_web_shards(folder / "web", extent.num_shards)
    write_clean_shards(folder / "clean", extent.num_shards)
    for config in (_med_config(folder, extent), _filter_config(folder, extent)):
        train_to_end(config)
    shutil.copytree(folder / "vit", out / VIT_DIR.name, dirs_exist_ok=True)
    export_half(run_folder(_filter_config(folder, extent)), out / FILTER_DIR.name)


def _med_config(folder: Path, extent: Extent) -> PretrainConfig:
    """Return the recipe of the demo's MED, which reads the web's texts and, as BLIP's, some that people wrote."""
    values = {"optim.steps": extent.med_steps, "blip.vision.init": str(folder / "vit")}
    return _config("demo-blip-pretrain", folder, ("web", "clean"), values)


def _filter_config(folder: Path, extent: Extent) -> PretrainConfig:
    values = {
        "run.init_from": run_folder(_med_config(folder, extent)),
        "optim.steps": extent.filter_steps,
        "optim.batch_size": extent.batch_size,
    }
    return _config("demo-blip-filter", folder, ("clean",), values)


def _config(recipe: str, folder: Path, shards: Sequence[str], values: dict[str, Any]) -> PretrainConfig:
    values |= {
        "run.output": str(folder / "checkpoints"),
        "data.captions_per_image": CLEAN_CAPTIONS,
        # Steps of like scenes: see the shards.
        "data.shuffle_shards": 2,
        "checkpoint.every_steps": 100,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    corpora = ", ".join(f"{{ path = {json.dumps(str(folder / name))} }}" for name in shards)
    return load_config(_RECIPES / f"{recipe}.toml", [*overrides, f"data.corpus=[{corpora}]"], PretrainConfig)


def export_half(run: str, out: Path) -> None:
    """Export a trained model in half precision, without the paths of this machine."""
    with moved_when_whole(out) as exported:
        export_model(load_trained(run), exported)
        # Of capfilt's own, to train on: who asks the filter reads neither.
        for name in (OWN_CONFIG_FILE, EXTRA_FILE):
            (exported / name).unlink(missing_ok=True)
        weights = exported / WEIGHTS_FILE
        save_file(in_half(load_file(weights).items()), weights, metadata={"format": "pt"})
        shutil.rmtree(out, ignore_errors=True)


def main() -> None:
    """Parse the command line, and make the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=WEIGHTS_DIR)
    args = parser.parse_args()
    torch.set_num_threads(1)
    make_weights(args.folder.absolute(), args.out, Extent())


if __name__ == "__main__":
    main()
