"""Train a filter of the demo's size by BLIP's recipe, from the weights of the demo's captioner. None ships yet.

    python -m jobs.demo.weights_training.train_filter --folder filter-training

The training is that of ``capfilt pretrain -c jobs/recipes/demo-blip-filter.toml``; the filter goes to FOLDER/filter.
What is done in the folder is not done again.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from jobs.demo.weights_training.clean_shards import CLEAN_CAPTIONS, write_clean_shards
from jobs.demo.weights_training.models import CAPTIONER_DIR
from jobs.pretrain import TrainingFailedError, pretrain
from pipeline.config import load_config
from schemas.pretrain import PretrainConfig
from training.blip.build import build_blip
from training.blip.stage import BlipStage
from training.convert.export import export_model
from training.convert.key_map import blip_from_hf
from training.convert.load import load_trained
from training.distributed import World

_RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "demo-blip-filter.toml"
_NUM_SHARDS = 28
_ENCODER, _DECODER = "text_encoder.", "text_decoder.bert."


def filter_config(folder: Path, steps: int) -> PretrainConfig:
    """Return the recipe for a folder that holds the shards and the weights to begin with."""
    values = {
        "run.output": str(folder / "checkpoints"),
        "run.init_from": str(folder / "captioner-as-filter"),
        "data.captions_per_image": CLEAN_CAPTIONS,
        # Steps of like scenes: see clean_shards.
        "data.shuffle_shards": 2,
        "optim.steps": steps,
        "optim.batch_size": 32,
        "optim.peak_lr": 7e-4,
        "optim.warmup_steps": 50,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    corpus = f"data.corpus=[{{ path = {json.dumps(str(folder / 'clean'))} }}]"
    return load_config(_RECIPE, [*overrides, corpus], PretrainConfig)


def captioner_as_filter(config: PretrainConfig) -> BlipStage:
    """Return a filter with the captioner's image encoder, and with its decoder as the text encoder.

    What a captioner lacks (ITC's projections, ITM's head) keeps its random values; [ENC] begins as [DEC].
    """
    stage = build_blip(config, World(), torch.device("cpu"))
    captioner = blip_from_hf(load_file(CAPTIONER_DIR / "model.safetensors"), str(CAPTIONER_DIR))
    state = stage.trainable_state()
    stage.load_trainable_state(
        {name: _begun(name, tensor, captioner, stage.begin_id) for name, tensor in state.items()}
    )
    return stage


def _begun(name: str, fresh: Tensor, captioner: dict[str, Tensor], begin_id: int) -> Tensor:
    tensor = captioner.get(name.replace(_ENCODER, _DECODER), fresh).to(fresh.dtype)
    if name.endswith("word_embeddings.weight"):
        tensor = torch.cat((tensor, tensor[begin_id, None]))
    return tensor


def train_filter(folder: Path, steps: int) -> None:
    """Train in a folder, and export the filter there."""
    write_clean_shards(folder / "clean", _NUM_SHARDS)
    config = filter_config(folder, steps)
    if not Path(config.run.init_from).exists():
        export_model(captioner_as_filter(config), Path(config.run.init_from))
    summary = pretrain(config)
    if summary.outcome != "done":
        raise TrainingFailedError("the training was stopped; the same command goes on")
    export_model(load_trained(summary.folder), folder / "filter")


def main() -> None:
    """Parse the command line, and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train_filter(args.folder.absolute(), args.steps)


if __name__ == "__main__":
    main()
