"""The models that a training begins from: their rows in the manifest, and the Q-Former's initial weights.

A checkpoint is traced by these rows, and a run is resumed only on the same models. They are compared by the digests of
their files, so that models may move to another folder or cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import BertForMaskedLM

from pipeline.models.transformers_loader import load_model
from pipeline.models.weights import file_digests, model_record, ranker_weights
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from schemas.records import ModelRecord
from training.blip2.build import Stage
from training.checkpoint import read_model
from training.convert.read import read_external, stage_state
from training.distributed import World
from training.models.pretrained import model_files, model_folder, tokenizer_files, tokenizer_folder
from training.models.qformer import copy_bert


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialWeights:
    """The weights that a Q-Former begins from, and the row of the manifest that names them."""

    key: Literal["run.init_from", "qformer.weights"]
    record: ModelRecord
    tensors: Mapping[str, Tensor]

    def load_into(self, stage: Stage) -> None:
        """Set a stage's trainable parameters. Raises CapfiltError where the weights do not fit its config."""
        where = f"{self.key} = {self.record.name!r}"
        if self.key == "qformer.weights":
            try:
                copy_bert(stage.Qformer, self.tensors)
            except (KeyError, ValueError) as error:
                raise CapfiltError(f"{where} does not fit [qformer]: {error}") from error
            return
        fresh = stage.trainable_state()
        stage.load_trainable_state(
            stage_state(self.tensors, fresh, stage=stage.config.run.stage, where=where)
        )


def read_initial_weights(config: PretrainConfig) -> InitialWeights | None:
    """Read ``run.init_from``, else ``qformer.weights`` (BERT), once; None where training begins at random.

    Raises:
        CapfiltError: a file is missing or cannot be read.
    """
    if path := config.run.init_from:
        return _read_trained(path)
    name = config.qformer.weights
    if not name:
        return None
    folder = model_folder(name, "main", "qformer.weights")
    bert = load_model(BertForMaskedLM, folder, "qformer.weights", dtype=torch.float32)
    record = model_record("qformer", name, "", folder, file_digests(folder, model_files(folder)))
    return InitialWeights(key="qformer.weights", record=record, tensors=bert.state_dict())


def _read_trained(path: str) -> InitialWeights:
    """Read a checkpoint of a run, an export, or weights from elsewhere."""
    external = read_external(path)
    if external is None:
        checkpoint, state = read_model(path)
        folder, files, tensors = Path(path), dict(checkpoint.sha256), state.model
    else:
        folder, tensors = external.files[0].parent, external.trained
        files = file_digests(folder, [file.name for file in external.files])
    parameters = sum(tensor.numel() for tensor in tensors.values())
    record = model_record("qformer", path, "", folder, files, parameters)
    return InitialWeights(key="run.init_from", record=record, tensors=tensors)


@torch.no_grad()
def begin_training(stage: Stage, initial: InitialWeights | None, world: World) -> None:
    """Give the stage of every rank the initial weights, which rank 0 alone has read."""
    world.all_or_raise(lambda: initial.load_into(stage) if initial else None)
    if world.size > 1:
        for _, parameter in stage.trainable_named_parameters():
            parameter.copy_(world.broadcast(parameter))


def base_models(config: PretrainConfig, initial: InitialWeights | None) -> list[ModelRecord]:
    """Return the models that a new run loads, each identified by the digest of its files.

    Their kinds: ``vision`` and ``language`` (frozen), ``tokenizer``, and ``qformer``: what the Q-Former begins from.

    Raises:
        CapfiltError: a model is missing.
    """
    return _frozen_models(config) + ([initial.record] if initial else [])


def require_same_models(config: PretrainConfig, recorded: Sequence[ModelRecord]) -> list[ModelRecord]:
    """Return the models that a run began with. Raises CapfiltError where its config names others now.

    The Q-Former's initial weights are read only if their path has changed: at the same path they may be gone.

    Args:
        config: as it is now.
        recorded: the models of the checkpoint that the run is resumed from.
    """
    by_kind = {model.kind: model for model in recorded}
    current = _frozen_models(config)
    began = by_kind.get("qformer")
    name = config.run.init_from or config.qformer.weights
    if name != (began.name if began else ""):
        initial = read_initial_weights(config)
        if initial is None or began is None:
            raise CapfiltError(
                f"run.name {config.run.name!r} began from {_name(began)}, not from "
                f"{_name(initial.record if initial else None)}; restore run.init_from and qformer.weights, or set "
                "run.name to begin another run"
            )
        current.append(initial.record)
    for model in current:
        if model.kind not in by_kind:
            raise CapfiltError(
                f"the checkpoint of run.name {config.run.name!r} does not name its {model.kind} model"
            )
        before = by_kind[model.kind]
        if model.digest != before.digest:
            files = model.files.keys() | before.files.keys()
            changed = sorted(file for file in files if model.files.get(file) != before.files.get(file))
            raise CapfiltError(
                f"the {model.kind} files of {model.name!r} are not those that run.name {config.run.name!r} began with "
                f"({', '.join(changed)}); restore them, or set run.name to begin another run"
            )
    return list(recorded)


def _frozen_models(config: PretrainConfig) -> list[ModelRecord]:
    vision = ranker_weights(config.vision.model, config.vision.pretrained, "vision")
    models = [replace(vision.to_record(), kind="vision")]
    if config.language is None:
        folder = tokenizer_folder(config.qformer.tokenizer, "main", "qformer.tokenizer")
        name, files = config.qformer.tokenizer, file_digests(folder, tokenizer_files(folder))
        return [*models, model_record("tokenizer", name, "", folder, files)]
    name, revision = config.language.model, config.language.revision
    folder = model_folder(name, revision, "language.model")
    tokenizer = tokenizer_folder(name, revision, "language.model")
    files = file_digests(tokenizer, tokenizer_files(tokenizer)) | file_digests(folder, model_files(folder))
    revision = "" if Path(name).expanduser().is_dir() else revision
    return [*models, model_record("language", name, revision, folder, files)]


def _name(model: ModelRecord | None) -> str:
    return repr(model.name) if model else "random weights"
