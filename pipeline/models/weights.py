"""Finds the files of a captioner or ranker, in a local folder or on the hub, checks them and computes their digest.

Only safetensors are read, and no code that comes with a model is ever run. The digest covers the files that decide the
output (weights, architecture, tokenizer, preprocessing) and nothing else: the same files at another place, or under
another name, are the same model.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pipeline.digests import digest_json, sha256_file
from pipeline.models.clip_config import clip_config
from pipeline.models.files.bucket import bucket_folder, is_bucket
from pipeline.models.files.folder_view import PROCESSOR_FILES, processor_config, processor_file, reject_code
from pipeline.models.files.model_files import (
    FirstMissingFile,
    count_parameters,
    first_missing_weights_file,
    read_object,
    reject_wrapped_names,
    safetensors_header,
    weight_files,
)
from pipeline.models.files.model_folder import local_folder, model_folder
from pipeline.models.files.tokenizer_files import TOKENIZER_FILES, tokenizer_view
from schemas.config import CapfiltConfig, CaptionConfig, FilterConfig
from schemas.errors import CapfiltError, did_you_mean
from schemas.json_record import utc_now
from schemas.names import printable
from schemas.records import ModelRecord
from schemas.stages import Stage

_BLIP_FILES = (
    "config.json", *PROCESSOR_FILES, *TOKENIZER_FILES, "*.safetensors", "*.safetensors.index.json"
)  # fmt: skip
_BLIP_MODELS = {"captioner": "BLIP captioner", "filter": "BLIP retrieval model or stage 1 of BLIP-2"}
_BLIP_TYPES = {"captioner": ("blip",), "filter": ("blip", "blip-2")}
# Tokens that a text model of BLIP or BLIP-2 reads at most, where its config.json names no number.
_POSITIONS = 512
# What only such a model has: BLIP's captioner and its retrieval model are of one type.
_BLIP_PARTS = {"captioner": "text_decoder.", "filter": "itm_head."}
_CLIP_FILES = ("open_clip_config.json", *TOKENIZER_FILES)
# In open_clip's order of preference; its third choice is a pickle.
_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")

# Where open_clip has the weights of [rank]'s defaults from.
DEFAULT_RANKER = ("ViT-L-14", "openai")
DEFAULT_RANKER_REPOSITORY = "timm/vit_large_patch14_clip_224.openai"


WeightsKind = Literal["captioner", "ranker", "filter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A model's files on this machine.

    ``path`` is the folder that the model's library loads, or one weights file where open_clip itself brings
    architecture and tokenizer; ``name`` is then the architecture and ``revision`` the pretrained tag.
    """

    kind: WeightsKind
    name: str
    revision: str
    path: str
    digest: str
    files: Mapping[str, str]

    def to_record(self) -> ModelRecord:
        """Return the row of the table ``models``."""
        folder = Path(self.path) if Path(self.path).is_dir() else Path(self.path).parent
        return model_record(self.kind, self.name, self.revision, folder, self.files)


def model_record(
    kind: str, name: str, revision: str, folder: Path, files: Mapping[str, str], parameters: int | None = None
) -> ModelRecord:
    """Return the row of a model made of these files (sha256 by name), found in a folder.

    Args:
        parameters: how many; None counts those of the safetensors files.
    """
    if parameters is None:
        parameters = count_parameters(
            safetensors_header(folder / name) for name in files if name.endswith(".safetensors")
        )
    return ModelRecord(
        digest=digest_json(dict(files)),
        kind=kind,
        name=name,
        revision=revision,
        files=dict(files),
        parameters=parameters,
        registered_at=utc_now(),
    )


def require_model_names(config: CapfiltConfig, stages: Collection[Stage]) -> None:
    """Reject models of stages that cannot be loaded, as far as is known without the hub and without open_clip."""
    if "caption" in stages:
        _require_place(config.caption.model, "caption.model")
    if "filter" in stages and config.filter:
        _require_place(config.filter.model, "filter.model")
    if "rank" not in stages:
        return
    rankers = {"rank": config.rank.model}
    if config.rank.rerank:
        rankers["rank.rerank"] = config.rank.rerank.model
    for where, model in rankers.items():
        scheme, _, rest = model.partition(":")
        if is_bucket(model):
            continue
        if scheme == "local-dir":
            _require_folder(Path(rest), f"{where}.model", model)
        elif scheme != "hf-hub":
            _require_architecture(model, where, _architectures())


def _require_place(model: str, where: str) -> None:
    if not is_bucket(model):
        local_folder(model, where)


def _architectures() -> list[str]:
    """Return the architectures of open_clip, from its files: importing it takes seconds and imports torch."""
    spec = find_spec("open_clip")
    configs = Path(spec.origin).parent / "model_configs" if spec and spec.origin else Path()
    return sorted(path.stem for path in configs.glob("*.json"))


def _require_architecture(model: str, where: str, known: Sequence[str]) -> None:
    if model not in known:
        raise CapfiltError(
            f"{where}.model = {model!r} is not an architecture of open_clip, nor hf-hub:ORG/NAME, nor "
            f"local-dir:FOLDER, nor s3://, gs:// or az://{did_you_mean(model, known)}"
        )


def _require_folder(folder: Path, where: str, model: str) -> None:
    if not folder.is_dir():
        raise CapfiltError(f"{where} = {model!r}: there is no folder {folder.absolute()}")


def captioner_weights(config: CaptionConfig) -> Weights:
    """Find the captioner that ``[caption]`` names: a local folder, else a hub id at a revision.

    Raises:
        CapfiltError: no such folder, id or revision, a file is missing, it is not a BLIP captioner, or the
            hub cannot be reached and the cache does not have it.
    """
    return _blip_weights("captioner", config.model, config.revision, "caption.model")


def filter_weights(config: FilterConfig) -> Weights:
    """Find the model that ``[filter]`` names, of BLIP or BLIP-2; as ``captioner_weights``.

    Raises:
        CapfiltError: also where ``filter.max_tokens`` is more than its text model has positions for.
    """
    return _blip_weights("filter", config.model, config.revision, "filter.model", config.max_tokens)


def _blip_weights(
    kind: Literal["captioner", "filter"], model: str, revision: str, where: str, max_tokens: int = 0
) -> Weights:
    folder = model_folder(model, revision, _BLIP_FILES, _first_missing_blip_file, where)
    if missing := _first_missing_blip_file(folder):
        raise CapfiltError(
            f"{missing} is missing in {folder}; {where} must be a hub id or a folder with transformers' "
            f"{_BLIP_MODELS[kind]} (config.json, model.safetensors, preprocessor_config.json and the tokenizer's files)"
        )
    shape = read_object(folder / "config.json", where)
    model_type = shape.get("model_type")
    if model_type not in _BLIP_TYPES[kind]:
        known = " or ".join(map(repr, _BLIP_TYPES[kind]))
        raise CapfiltError(
            f"{where} = {model!r} is a {printable(repr(model_type))[:40]} model; the {kind} must be a {known} one"
        )
    reject_code(shape, folder / "config.json")
    if max_tokens:
        _require_positions(shape, model, max_tokens)
    processor_config(folder, image_size_px(shape), where)
    tokenizer_view(folder, where)
    settings = ("config.json", processor_file(folder), *TOKENIZER_FILES)
    weights = weight_files(folder)
    tensors = [tensor for name in weights for tensor in safetensors_header(folder / name)]
    if not any(_BLIP_PARTS[kind] in tensor for tensor in tensors):
        raise CapfiltError(
            f"{where} = {model!r}: its weights have no {_BLIP_PARTS[kind]}*; the {kind} must be a {_BLIP_MODELS[kind]}"
        )
    names = [name for name in settings if (folder / name).is_file()] + weights
    is_of_hub = not is_bucket(model) and local_folder(model, where) is None
    return _weights(kind, model, revision if is_of_hub else "", folder, names)


def _require_positions(shape: Mapping[str, Any], model: str, max_tokens: int) -> None:
    """Raise CapfiltError where texts may be longer than a filter's text model reads."""
    text = shape.get("qformer_config" if shape["model_type"] == "blip-2" else "text_config")
    most = text.get("max_position_embeddings", _POSITIONS) if isinstance(text, dict) else _POSITIONS
    if isinstance(most, int) and max_tokens > most:
        raise CapfiltError(f"filter.max_tokens = {max_tokens}: {model!r} ends at {most} tokens; set no more")


def uncached_models(config: CapfiltConfig) -> dict[str, str]:
    """Return the hub repositories that a run would download first, by the config's key; sends no request.

    Of the architectures of open_clip only the default's repository is known here: finding others imports torch.
    """
    from pipeline.models.files.hub import cached_folder

    rank, uncached = config.rank, {}
    blip: dict[str, CaptionConfig | FilterConfig | None] = {
        "caption.model": config.caption, "filter.model": config.filter
    }  # fmt: skip
    for key, section in blip.items():
        if section is None or is_bucket(section.model) or local_folder(section.model, key) is not None:
            continue
        if not cached_folder(section.model, section.revision, _BLIP_FILES, _first_missing_blip_file, key):
            uncached[key] = section.model
    scheme, _, name = rank.model.partition(":")
    repository, _, revision = name.partition("@")
    missing: FirstMissingFile = partial(_first_missing_clip_file, where="rank.model")
    wanted: tuple[str, ...] = (*_CLIP_FILES, *_CLIP_WEIGHTS)
    if (rank.model, rank.pretrained) == DEFAULT_RANKER:
        repository, missing, wanted = DEFAULT_RANKER_REPOSITORY, lacks_all_of(_CLIP_WEIGHTS), _CLIP_WEIGHTS
    elif scheme != "hf-hub":
        return uncached
    if not cached_folder(repository, revision or "main", wanted, missing, "rank.model"):
        uncached["rank.model"] = repository
    return uncached


def image_size_px(config: Mapping[str, Any]) -> Any:
    """Return the size of the images that a model's ``config.json`` names, or that its class has where it names none."""
    vision, default = config.get("vision_config"), 224 if config.get("model_type") == "blip-2" else 384
    return vision.get("image_size", default) if isinstance(vision, dict) else default


def ranker_weights(model: str, pretrained: str, where: str = "rank") -> Weights:
    """Find a CLIP that open_clip loads.

    Args:
        model: ``local-dir:FOLDER``; such a folder on object storage (``s3://...``);
            ``hf-hub:ORG/NAME`` or ``hf-hub:ORG/NAME@REVISION``; or an architecture
            of open_clip's.
        pretrained: for an architecture, a pretrained tag of its own, or a safetensors file; else empty.
        where: the config section, for messages.

    Raises:
        CapfiltError: as ``captioner_weights``.
    """
    if is_bucket(model) or model.startswith(("local-dir:", "hf-hub:")):
        if pretrained:
            raise CapfiltError(
                f'{where}.pretrained = {pretrained!r} has no effect with {model!r}; set it to ""'
            )
        return _clip_folder(model, where)
    return _clip_architecture(model, pretrained, where)


def _clip_folder(model: str, where: str) -> Weights:
    scheme, _, rest = model.partition(":")
    where = f"{where}.model"
    if scheme == "local-dir":
        folder, revision = Path(rest).absolute(), ""
        _require_folder(folder, where, model)
    elif is_bucket(model):
        folder, revision = bucket_folder(model, (*_CLIP_FILES, *_CLIP_WEIGHTS), where), ""
    else:
        # Its client takes long to import: local models do without.
        from pipeline.models.files.hub import hub_folder

        name, _, revision = rest.partition("@")
        revision = revision or "main"
        lacks = partial(_first_missing_clip_file, where=where)
        folder = hub_folder(name, revision, (*_CLIP_FILES, *_CLIP_WEIGHTS), lacks, where)
    if missing := _first_missing_clip_file(folder, where):
        raise CapfiltError(
            f"{missing} is missing in {folder}; {where} must name a folder as open_clip publishes it "
            "(open_clip_config.json, open_clip_model.safetensors, a Hugging Face tokenizer's files)"
        )
    if clip_config(folder, where)["model_cfg"]["text_cfg"].get("hf_tokenizer_name"):
        tokenizer_view(folder, where)
    checkpoint = clip_checkpoint(folder)
    names = [name for name in _CLIP_FILES if (folder / name).is_file()] + [checkpoint]
    return _weights("ranker", model, revision, folder, names)


def clip_checkpoint(folder: Path) -> str:
    """Return the name of the weights in an open_clip folder."""
    return next((name for name in _CLIP_WEIGHTS if (folder / name).is_file()), _CLIP_WEIGHTS[0])


def _clip_architecture(model: str, pretrained: str, where: str) -> Weights:
    """Find the weights of an architecture that open_clip knows by name."""
    # Imported here because it imports torch, which the commands of the driver do not need otherwise.
    from open_clip import get_model_config, get_pretrained_cfg, list_models, list_pretrained_tags_by_model

    from pipeline.models.files.hub import hub_folder

    _require_architecture(model, where, list_models())
    architecture = get_model_config(model)
    tag = get_pretrained_cfg(model, pretrained)
    if tag:
        repository, _, file = tag.get("hf_hub", "").rpartition("/")
        if not repository:
            raise CapfiltError(
                f"{where}.pretrained = {pretrained!r} of {model} is not on the hub; give a local file"
            )
        wanted = _CLIP_WEIGHTS if not file else (f"{file.rpartition('.')[0]}.safetensors",)
        folder = hub_folder(repository, "main", wanted, lacks_all_of(wanted), f"{where}.pretrained")
        checkpoint = next((folder / name for name in wanted if (folder / name).is_file()), None)
        if checkpoint is None:
            raise CapfiltError(
                f"{wanted[0]} is missing in {folder} ({where}.pretrained = {pretrained!r}, {repository})"
            )
    else:
        checkpoint = Path(pretrained).absolute()
        if not pretrained or not checkpoint.is_file():
            tags = ", ".join(list_pretrained_tags_by_model(model)) or "none"
            raise CapfiltError(
                f"{where}.pretrained = {pretrained!r} is neither a file nor a pretrained tag of {model} "
                f"(tags: {tags})"
            )
        if checkpoint.suffix != ".safetensors":
            raise CapfiltError(
                f"{where}.pretrained = {pretrained!r}: only safetensors are read; convert the file first"
            )
    # The architecture and the pretrained tag come with open_clip, and decide the output as much as the file does.
    recipe = {
        "model_cfg": architecture,
        "pretrained_cfg": {k: v for k, v in tag.items() if k not in ("url", "hf_hub")},
    }
    extra = {f"open_clip:{model}": digest_json(recipe)}
    revision = pretrained if tag else ""
    return _weights("ranker", model, revision, checkpoint, [checkpoint.name], extra)


def _first_missing_blip_file(folder: Path) -> str | None:
    """Return the first file that a BLIP model's folder lacks."""
    for name in ("config.json", processor_file(folder)):
        if not (folder / name).is_file():
            return name
    if missing := first_missing_weights_file(folder):
        return missing
    return None if any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json")) else "vocab.txt"


def _first_missing_clip_file(folder: Path, where: str) -> str | None:
    """Return the first file that an open_clip folder lacks."""
    config = folder / "open_clip_config.json"
    if not config.is_file():
        return config.name
    if not any((folder / name).is_file() for name in _CLIP_WEIGHTS):
        return _CLIP_WEIGHTS[0]
    text = clip_config(folder, where)["model_cfg"]["text_cfg"]
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json"))
    return "tokenizer.json" if text.get("hf_tokenizer_name") and not has_tokenizer else None


def lacks_all_of(names: tuple[str, ...]) -> FirstMissingFile:
    """Return a check of a folder: the first of the names where it has none of them."""
    return lambda folder: None if any((folder / name).is_file() for name in names) else names[0]


def _weights(
    kind: WeightsKind,
    name: str,
    revision: str,
    path: Path,
    names: list[str],
    extra: Mapping[str, str] | None = None,
) -> Weights:
    folder = path if path.is_dir() else path.parent
    # Checked before all bytes are read for the digest.
    for file in names:
        if file.endswith(".safetensors"):
            # open_clip removes "module." itself.
            wrappers = ("_orig_mod.",) if kind == "ranker" else ("module.", "_orig_mod.")
            reject_wrapped_names(safetensors_header(folder / file), folder / file, wrappers)
    files = file_digests(folder, names) | dict(extra or {})
    return Weights(
        kind=kind, name=name, revision=revision, path=str(path), digest=digest_json(files), files=files
    )


def file_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the sha256 of files by their names."""
    return {name: _sha256(folder / name) for name in names}


def _sha256(path: Path) -> str:
    """Return a file's sha256, computed once per process while size and time of the file stay.

    The blobs of the hub's cache are named by their sha256, which is not checked after the download.
    """
    status = path.stat()
    return _sha256_of_version(path.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _sha256_of_version(path: Path, _size: int, _mtime_ns: int) -> str:
    return sha256_file(path)
