"""Loads a trained model for evaluation or export, from a checkpoint, an export or weights from elsewhere."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.corpus.checkpoint_files import find_checkpoint
from pipeline.models.checks import require_finite_weights
from schemas.config import Precision
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from training.blip.stage import BlipStage
from training.build import Blip2Stage, Stage, build_stage, meta_stage
from training.checkpoint import read_model, recorded_config
from training.convert.key_map import hf_name
from training.convert.read import ExternalCheckpoint, read_external
from training.convert.state import require_same_shapes, stage_state
from training.distributed import World
from training.models.vision import FrozenVision

_log = logging.getLogger(__name__)


def load_trained(
    path: str,
    config: PretrainConfig | None = None,
    device: torch.device | str = "cpu",
    precision: Precision = "auto",
) -> Stage:
    """Load a trained model in evaluation mode.

    Args:
        path: a run's folder or one of its checkpoints, an export, a LAVIS ``.pth`` or a ``Blip2*`` folder.
        config: of the model, with the locations of its frozen models; needed for files that come without one; else it
            replaces the config that comes with the weights.
        device: to compute on.
        precision: of the image encoder's weights and of all matrix products but the language model's.

    Raises:
        CapfiltError: it does not load, or the config is of another architecture.
    """
    external = read_external(path)
    if external is not None:
        given, values = external.trained, external.config
    else:
        state = read_model(path)[1]
        given, values = state.model, state.progress.config
    config_hint = ""
    if config is None:
        if values is None:
            raise CapfiltError(f"{path} has no config; name its recipe with -c, as blip2-stage1-vitg.toml")
        config = recorded_config(values, path)
        config_hint = f" (from the config that came with {path}; -c RECIPE replaces it)"
    # Not compiled: an evaluation has many shapes, and compiling each takes longer than it saves. Not sharded: each rank
    # then generates by itself.
    changes = {"compile": False, "precision": precision, "shard_language": False}
    config = config.model_copy(update={"performance": config.performance.model_copy(update=changes)})
    try:
        if external is None or external.kind == "capfilt":
            _reject_other_shapes(given, config, path)
        stage = build_stage(config, World(device), device)
    except CapfiltError as error:
        raise CapfiltError(f"{error}{config_hint}") from error
    fresh = stage.trainable_state()
    if external is not None and external.kind == "huggingface" and config.blip is None:
        given = _filled_up(given, fresh, path)
    stage.load_trainable_state(stage_state(given, fresh, stage=config.run.stage, where=path))
    if external is not None and external.vision and not isinstance(stage, BlipStage):
        _load_vision(stage.visual_encoder, external)
    return stage.eval()


def checkpoint_of(path: str) -> str:
    """Return the path of the checkpoint that ``load_trained`` reads; empty for an export or weights from elsewhere."""
    if read_external(path) is not None:
        return ""
    run, record = find_checkpoint(path)
    return run.storage.url(record.path)


def load_blip2(
    path: str, config: PretrainConfig | None = None, device: torch.device | str = "cpu"
) -> Blip2Stage:
    """Load a stage of BLIP-2, as ``load_trained``. Raises CapfiltError for a model of BLIP too."""
    stage = load_trained(path, config, device)
    if isinstance(stage, BlipStage):
        raise CapfiltError(
            f"{path} is a model of BLIP ({stage.config.run.stage}), and evaluate reads BLIP-2's; `capfilt export` it, "
            "and name the folder as caption.model or filter.model of a corpus"
        )
    return stage


def _reject_other_shapes(given: Mapping[str, Tensor], config: PretrainConfig, path: str) -> None:
    """Compare the weights with the config that came with them before any memory is taken that the config asks for."""
    layers = {"qformer.layers": config.qformer.layers}
    if config.blip is not None:
        layers = {
            "blip.vision.layers": config.blip.vision.layers,
            "blip.text.layers": config.blip.text.layers,
        }
    for key, number in layers.items():
        if number > len(given):
            raise CapfiltError(
                f"{path}: its config has {key} = {number:,}, but there are {len(given):,} tensors"
            )
    with torch.random.fork_rng(devices=[]):
        wanted = meta_stage(config).trainable_state()
    require_same_shapes(given, wanted, stage=config.run.stage, where=path)


def _filled_up(given: dict[str, Tensor], fresh: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Add the tensors that Hugging Face's classes do not have, untrained, if no side file has them; log that."""
    unmapped = {name: tensor for name, tensor in fresh.items() if name not in given and hf_name(name) is None}
    if unmapped:
        _log.warning(
            "%s has no captioning head and no temperature, as all models of Blip2ForImageTextRetrieval: retrieval does "
            "not need them; captions of this model are meaningless",
            path,
        )
    return given | unmapped


def _load_vision(vision: FrozenVision, external: ExternalCheckpoint) -> None:
    """Load the image encoder from the file too: a fine-tuned model's differs from open_clip's."""
    require_finite_weights(external.vision, f"{external.path}: its image encoder")
    try:
        vision.tower.load_state_dict(external.vision, strict=True)
    except RuntimeError as error:
        # torch lists every tensor; the first one is enough.
        first = " ".join(str(error).split("\n\t")[1:2]) or str(error)
        raise CapfiltError(f"{external.path}: its image encoder is not that of [vision]: {first}") from error
