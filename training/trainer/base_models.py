"""The models that a training begins from: rows of the manifest, by which a checkpoint is traced and resumed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.models.weights import file_digests, model_record, ranker_weights
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from schemas.records import ModelRecord
from training.checkpoint import read_model
from training.convert.read import read_external
from training.models.pretrained import model_files, model_folder, tokenizer_files, tokenizer_folder


def base_models(config: PretrainConfig, before: Sequence[ModelRecord] | None = None) -> list[ModelRecord]:
    """Return the models that a run loads, each identified by the digest of its files.

    Their kinds: ``vision`` and ``language`` (frozen), ``tokenizer``, and ``qformer``: what training begins from, which
    is BERT or ``run.init_from``.

    Args:
        before: those of the checkpoint that the run goes on from; what it began from need not be there any more.

    Raises:
        CapfiltError: a model is missing, or a frozen one is not the one that the run began with.
    """
    if before is None:
        return _frozen(config) + _begun_from(config)
    known = {model.kind: model for model in before}
    for model in _frozen(config):
        if model.kind not in known:
            raise CapfiltError(
                f"the checkpoint of run.name {config.run.name!r} does not name its {model.kind} model"
            )
        if model.digest != known[model.kind].digest:
            raise CapfiltError(
                f"the {model.kind} files of {model.name!r} are not those that run.name {config.run.name!r} began with "
                f"({_difference(known[model.kind], model)}); restore them, or set run.name to begin another run"
            )
    return list(before)


def _frozen(config: PretrainConfig) -> list[ModelRecord]:
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


def _begun_from(config: PretrainConfig) -> list[ModelRecord]:
    if path := config.run.init_from:
        foreign = read_external(path)
        if foreign is None:
            record, state = read_model(path)
            folder, files, weights = Path(path), dict(record.sha256), state.model
        else:
            folder, weights = foreign.files[0].parent, foreign.trained
            files = file_digests(folder, [file.name for file in foreign.files])
        parameters = sum(tensor.numel() for tensor in weights.values())
        return [model_record("qformer", path, "", folder, files, parameters)]
    if not config.qformer.weights:
        return []
    folder = model_folder(config.qformer.weights, "main", "qformer.weights")
    files = file_digests(folder, model_files(folder))
    return [model_record("qformer", config.qformer.weights, "", folder, files)]


def _difference(before: ModelRecord, now: ModelRecord) -> str:
    names = sorted(before.files.keys() | now.files.keys())
    return ", ".join(name for name in names if before.files.get(name) != now.files.get(name))
