"""A trained model for evaluation or export, from whatever holds it."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.models.checks import require_finite_weights
from pipeline.models.model_files import read_object
from schemas.config import Precision
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from training.blip2.build import build_stage, meta_stage
from training.blip2.stage1 import Stage1
from training.blip2.stage2 import Stage2
from training.checkpoint import read_model, recorded_config
from training.convert.key_map import hf_name
from training.convert.read import (
    OWN_CONFIG_FILE,
    ExternalCheckpoint,
    read_external,
    require_same_shapes,
    stage_state,
)
from training.distributed import World
from training.models.vision import FrozenVision

_log = logging.getLogger(__name__)


def load_trained(
    path: str,
    config: PretrainConfig | None = None,
    device: torch.device | str = "cpu",
    precision: Precision = "auto",
) -> Stage1 | Stage2:
    """Load a trained model in evaluation mode.

    Args:
        path: a run's folder or one of its checkpoints, an export, a LAVIS ``.pth`` or a ``Blip2*`` folder.
        config: what the model is and where its frozen models lie; needed for files of others' make, which do not
            say; else it replaces the config that comes with the weights.
        device: to compute on.
        precision: of the image encoder's weights and of all matrix products but the language model's.

    Raises:
        CapfiltError: it does not load, or the config is of another architecture.
    """
    own_config: Mapping[str, Any] | None
    imported = read_external(path)
    if imported is not None:
        given, own_config = imported.trained, _exported_config(Path(path).expanduser())
    else:
        state = read_model(path)[1]
        given, own_config = state.model, state.progress.config
    own = (
        "" if config is not None else f" (as the config that came with {path} says; -c RECIPE says otherwise)"
    )
    config = config or _parsed(own_config, path)
    # Uncompiled: an evaluation meets many shapes, and compiling each would take longer than computing it.
    changes = {"compile": False, "precision": precision}
    config = config.model_copy(update={"performance": config.performance.model_copy(update=changes)})
    try:
        if imported is None or imported.kind == "capfilt":
            _refuse_other_shapes(given, config, path)
        stage = build_stage(config, World(device), device)
    except CapfiltError as error:
        raise CapfiltError(f"{error}{own}") from error
    fresh = stage.trainable_state()
    if imported is not None and imported.kind == "huggingface":
        given = _filled_up(given, fresh, path)
    stage.load_trainable_state(stage_state(given, fresh, stage=config.run.stage, where=path))
    if imported is not None and imported.vision:
        _load_vision(stage.visual_encoder, imported)
    return stage.eval()


def _refuse_other_shapes(given: Mapping[str, Tensor], config: PretrainConfig, path: str) -> None:
    """Compare the weights with the config that came with them before any memory is taken that the config asks for."""
    if config.qformer.layers > len(given):
        raise CapfiltError(
            f"{path}: its config has qformer.layers = {config.qformer.layers:,}, but there are {len(given):,} tensors"
        )
    with torch.random.fork_rng(devices=[]):
        wanted = meta_stage(config).trainable_state()
    require_same_shapes(given, wanted, stage=config.run.stage, where=path)


def _filled_up(given: dict[str, Tensor], fresh: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Add what Hugging Face's classes have no home for, untrained, where no side file brought it; say so."""
    unmapped = {name: tensor for name, tensor in fresh.items() if name not in given and hf_name(name) is None}
    if unmapped:
        _log.warning(
            "%s has no captioning head and no temperature, as all models of Blip2ForImageTextRetrieval: retrieval does "
            "not need them, its captions mean nothing",
            path,
        )
    return given | unmapped


def _exported_config(folder: Path) -> dict[str, Any] | None:
    path = folder / OWN_CONFIG_FILE
    return read_object(path).get("config") if path.is_file() else None


def _parsed(values: Any, path: str) -> PretrainConfig:
    if values is None:
        raise CapfiltError(
            f"{path} does not say what model it is; name its recipe with -c, as blip2-stage1-vitg.toml"
        )
    return recorded_config(values, path)


def _load_vision(vision: FrozenVision, imported: ExternalCheckpoint) -> None:
    """Take the image encoder from the file too: a fine-tuned model's differs from open_clip's."""
    require_finite_weights(imported.vision, f"{imported.path}: its image encoder")
    try:
        vision.tower.load_state_dict(imported.vision, strict=True)
    except RuntimeError as error:
        # torch lists every tensor; the first says enough.
        first = " ".join(str(error).split("\n\t")[1:2]) or str(error)
        raise CapfiltError(f"{imported.path}: its image encoder is not that of [vision]: {first}") from error
