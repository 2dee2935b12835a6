"""The models that a training begins from: their rows in the manifest, and the initial weights of what is trained.

A checkpoint is traced by these rows, and a run is resumed only on the same models. They are compared by the digests of
their files, so that models may move to another folder or cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import BertForMaskedLM

from pipeline.models.transformers_loader import load_model
from pipeline.models.weights import file_digests, model_record, ranker_weights
from schemas.errors import CapfiltError
from schemas.names import shown
from schemas.pretrain import PretrainConfig
from schemas.records import ModelRecord
from training.blip.initial import copy_text, copy_vit, read_vit
from training.blip.stage import BlipStage
from training.blip2.stage1 import Stage1
from training.blip2.stage2 import Stage2
from training.build import Stage
from training.checkpoint import read_model
from training.convert.read import read_external, recorded_heads
from training.convert.state import stage_state
from training.distributed import World
from training.models.pretrained import model_files, model_folder, tokenizer_files, tokenizer_folder
from training.models.qformer import copy_bert

Key = Literal["run.init_from", "qformer.weights", "blip.vision.init", "blip.text.init"]
# What is begun from initial weights, as their rows' kind says.
_INITIAL_KINDS = ("qformer", "blip", "vit", "bert")


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialWeights:
    """Weights that a model or a part of it begins from, and the row of the manifest that names them.

    ``heads``: of attention, by their key, where they are known.
    """

    key: Key
    record: ModelRecord
    tensors: Mapping[str, Tensor]
    heads: Mapping[str, Any] = field(default_factory=dict)

    def load_into(self, stage: Stage) -> None:
        """Set a stage's trainable parameters. Raises CapfiltError where the weights do not fit its config."""
        where = f"{self.key} = {self.record.name!r}"
        if self.key == "run.init_from":
            self._require_same_heads(stage.config, where)
            fresh = stage.trainable_state()
            stage.load_trainable_state(
                stage_state(self.tensors, fresh, stage=stage.config.run.stage, where=where)
            )
            return
        try:
            self._load_part(stage)
        except (KeyError, ValueError) as error:
            raise CapfiltError(f"{where} does not fit [{self.key.rpartition('.')[0]}]: {error}") from error

    def _require_same_heads(self, config: PretrainConfig, where: str) -> None:
        """Refuse a number of heads that the weights were not trained with: their shapes do not tell."""
        for key, heads in self.heads.items():
            section, *names = key.split(".")
            part = getattr(config, section)
            if part is not None and heads is not None and (now := attrgetter(".".join(names))(part)) != heads:
                raise CapfiltError(
                    f"{where} has {key} = {shown(heads)}, and the config {now}; make them equal"
                )

    def _load_part(self, stage: Stage) -> None:
        match stage, self.key:
            case BlipStage(), "blip.vision.init":
                copy_vit(stage.visual_encoder, self.tensors)
            case BlipStage(), "blip.text.init":
                for text_model in stage.text_models:
                    copy_text(text_model, self.tensors)
            case Stage1() | Stage2(), "qformer.weights":
                copy_bert(stage.Qformer, self.tensors)


def _initial_names(config: PretrainConfig) -> dict[str, tuple[Key, str]]:
    """Return the key and the name of the weights that each part begins from, by the kind of their row."""
    if config.run.init_from:
        return {"qformer" if config.blip is None else "blip": ("run.init_from", config.run.init_from)}
    names: dict[str, tuple[Key, str]] = {"qformer": ("qformer.weights", config.qformer.weights)}
    if config.blip is not None:
        names = {
            "vit": ("blip.vision.init", config.blip.vision.init),
            "bert": ("blip.text.init", config.blip.text.init),
        }
    return {kind: (key, name) for kind, (key, name) in names.items() if name}


def read_initial_weights(config: PretrainConfig) -> list[InitialWeights]:
    """Read ``run.init_from``, else what the parts begin from (``qformer.weights``, ``blip.*.init``), once each.

    Raises:
        CapfiltError: a file is missing or cannot be read.
    """
    return [_read_initial(kind, key, name) for kind, (key, name) in _initial_names(config).items()]


def _read_initial(kind: str, key: Key, name: str) -> InitialWeights:
    if key == "run.init_from":
        return _read_trained(kind, name)
    folder = model_folder(name, "main", key)
    if kind == "vit":
        tensors = read_vit(folder, key)
    else:
        tensors = load_model(BertForMaskedLM, folder, key, dtype=torch.float32).state_dict()
    record = model_record(kind, name, "", folder, file_digests(folder, model_files(folder)))
    return InitialWeights(key=key, record=record, tensors=tensors)


def _read_trained(kind: str, path: str) -> InitialWeights:
    """Read a checkpoint of a run, an export, or weights from elsewhere."""
    external = read_external(path)
    heads: Mapping[str, Any]
    if external is None:
        checkpoint, state = read_model(path)
        folder, files, tensors = Path(path), dict(checkpoint.sha256), state.model
        heads = recorded_heads(state.progress.config)
    else:
        folder, tensors, heads = external.files[0].parent, external.trained, external.heads
        files = file_digests(folder, [file.name for file in external.files])
    parameters = sum(tensor.numel() for tensor in tensors.values())
    record = model_record(kind, path, "", folder, files, parameters)
    return InitialWeights(key="run.init_from", record=record, tensors=tensors, heads=heads)


@torch.no_grad()
def begin_training(stage: Stage, initial: Sequence[InitialWeights], world: World) -> None:
    """Give the stage of every rank the initial weights, which rank 0 alone has read."""

    def load() -> None:
        for weights in initial:
            weights.load_into(stage)

    world.all_or_raise(load)
    if world.size > 1:
        for _, parameter in stage.trainable_named_parameters():
            parameter.copy_(world.broadcast(parameter))
    stage.begin()


def base_models(config: PretrainConfig, initial: Sequence[InitialWeights]) -> list[ModelRecord]:
    """Return the models that a new run loads, each identified by the digest of its files.

    Their kinds: ``vision`` and ``language`` (frozen), ``tokenizer``, and what the trained parts begin from:
    ``qformer``, ``blip``, or ``vit`` and ``bert``.

    Raises:
        CapfiltError: a model is missing.
    """
    return _frozen_models(config) + [weights.record for weights in initial]


def require_same_models(config: PretrainConfig, recorded: Sequence[ModelRecord]) -> list[ModelRecord]:
    """Return the models that a run began with. Raises CapfiltError where its config names others now.

    Initial weights are read only if their path has changed: at the same path they may be gone.

    Args:
        config: as it is now.
        recorded: the models of the checkpoint that the run is resumed from.
    """
    by_kind = {model.kind: model for model in recorded}
    current = _frozen_models(config)
    names = _initial_names(config)
    for kind in _INITIAL_KINDS:
        began, (key, name) = by_kind.get(kind), names.get(kind, (None, ""))
        if name == (began.name if began else ""):
            continue
        initial = _read_initial(kind, key, name) if key else None
        if initial is None or began is None:
            raise CapfiltError(
                f"run.name {config.run.name!r} began from {_name(began)}, not from "
                f"{_name(initial.record if initial else None)}; restore {_keys_of(config)}, or set run.name to begin "
                "another run"
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


def _keys_of(config: PretrainConfig) -> str:
    if config.blip is None:
        return "run.init_from and qformer.weights"
    return "run.init_from, blip.vision.init and blip.text.init"


def _frozen_models(config: PretrainConfig) -> list[ModelRecord]:
    if config.blip is not None:
        return [_tokenizer_record(config.blip.text.tokenizer, "blip.text.tokenizer")]
    vision = ranker_weights(config.vision.model, config.vision.pretrained, "vision")
    models = [replace(vision.to_record(), kind="vision")]
    if config.language is None:
        return [*models, _tokenizer_record(config.qformer.tokenizer, "qformer.tokenizer")]
    name, revision = config.language.model, config.language.revision
    folder = model_folder(name, revision, "language.model")
    tokenizer = tokenizer_folder(name, revision, "language.model")
    files = file_digests(tokenizer, tokenizer_files(tokenizer)) | file_digests(folder, model_files(folder))
    revision = "" if Path(name).expanduser().is_dir() else revision
    return [*models, model_record("language", name, revision, folder, files)]


def _tokenizer_record(name: str, key: str) -> ModelRecord:
    folder = tokenizer_folder(name, "main", key)
    return model_record("tokenizer", name, "", folder, file_digests(folder, tokenizer_files(folder)))


def _name(model: ModelRecord | None) -> str:
    return repr(model.name) if model else "random weights"
