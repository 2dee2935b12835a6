"""The files of a folder that decide how a text is split into tokens, reduced to what transformers may be told.

Of `tokenizer_config.json` and `config.json`, only known keys and classes that read a vocabulary are passed on; see
`folder_view` for how.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.models.files.folder_view import reject_code
from pipeline.models.files.model_files import MAX_TOKENIZER_BYTES, read_object, wrong_file
from pipeline.regular_files import open_regular
from schemas.errors import CapfiltError
from schemas.names import printable

TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
_MAX_TEXT_GROWTH, _MAX_TOKENIZER_STEPS = 16, 32
_TOKENIZER_KEYS = {
    "add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder", "additional_special_tokens",
    "backend", "clean_up_tokenization_spaces", "do_basic_tokenize", "do_lower_case", "errors", "extra_ids",
    "extra_special_tokens", "keep_accents", "lang_codes", "legacy", "legacy_behaviour", "model_input_names",
    "model_max_length", "never_split", "padding_side", "remove_space", "sp_model_kwargs",
    "spaces_between_special_tokens", "split_special_tokens", "src_lang", "strip_accents", "tgt_lang",
    "tokenize_chinese_chars", "tokenizer_class",
    "trim_offsets", "truncation_side", "use_default_system_prompt", "wordpieces_prefix",
}  # fmt: skip
# Classes of transformers that read a vocabulary and nothing else.
_TOKENIZER_CLASSES = {
    "AlbertTokenizer", "BartTokenizer", "BertTokenizer", "CLIPTokenizer", "CamembertTokenizer",
    "DebertaV2Tokenizer", "DistilBertTokenizer", "ElectraTokenizer", "GPT2Tokenizer", "GemmaTokenizer",
    "LlamaTokenizer", "MPNetTokenizer", "MT5Tokenizer", "NllbTokenizer", "PreTrainedTokenizer", "RobertaTokenizer",
    "T5Tokenizer", "TokenizersBackend", "XLMRobertaTokenizer",
}  # fmt: skip
# Of these model types, transformers takes one of the classes above where a folder names none.
_TOKENIZER_MODEL_TYPES = {
    "albert", "bart", "bert", "blip", "blip-2", "camembert", "clip", "deberta-v2", "distilbert", "electra", "gemma",
    "gpt2", "mpnet", "mt5", "opt", "roberta", "t5", "umt5", "xlm-roberta",
}  # fmt: skip


def tokenizer_view(folder: Path, where: str) -> dict[str, dict[str, Any] | None]:
    """Return the files of a folder that decide how texts are split, as ``folder_view`` takes them.

    Raises:
        CapfiltError: a file is damaged or too large, asks for code, or names a class that does more than read a
            vocabulary.
    """
    files: dict[str, dict[str, Any] | None] = {}
    for name in TOKENIZER_FILES:
        path = folder / name
        if not path.is_file():
            continue
        files[name] = None
        if name.endswith(".json"):
            content = read_object(path, where, MAX_TOKENIZER_BYTES)
            if name in ("tokenizer_config.json", "special_tokens_map.json"):
                files[name] = _tokenizer_config(content, path)
            elif name == "tokenizer.json":
                _reject_growth(content, path)
        elif path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise CapfiltError(f"{path} ({where}) is larger than a vocabulary may be")
        else:
            _reject_wrong_file(path, where)
    if (folder / "config.json").is_file():
        files["config.json"] = _tokenizer_hints(
            read_object(folder / "config.json", where), folder / "config.json"
        )
    return files


def _reject_growth(tokenizer: Mapping[str, Any], path: Path) -> None:
    """Refuse steps that make a text many times as long: twelve that make 100 letters of one fill any memory."""
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        steps = list(_steps(tokenizer.get(part)))
        growth = math.prod(
            max(1, len(str(step.get("content", "")))) for step in steps if step.get("type") == "Replace"
        )
        # Each of these maps a letter to several, and the letters that come to several again.
        repeated = [
            kind for kind in ("ByteLevel", "Precompiled") if sum(s.get("type") == kind for s in steps) > 1
        ]
        if growth > _MAX_TEXT_GROWTH or repeated or len(steps) > _MAX_TOKENIZER_STEPS:
            raise CapfiltError(
                f"{path}: its {part} can make a text more than {_MAX_TEXT_GROWTH} times as long, or has more than "
                f"{_MAX_TOKENIZER_STEPS} steps; a published tokenizer does not"
            )


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of a part of a tokenizer.json, those inside sequences too."""
    if isinstance(part, list):
        for step in part:
            yield from _steps(step)
    elif isinstance(part, dict):
        yield part
        for inner in ("normalizers", "pretokenizers", "decoders"):
            yield from _steps(part.get(inner))


def _reject_wrong_file(path: Path, where: str) -> None:
    with open_regular(path) as file:
        what = wrong_file(file.read(64))
    # A vocabulary may begin with any byte and word: only what is certain.
    if what and ("git clone" in what or path.suffix == ".model"):
        raise CapfiltError(f"{path} ({where}) is not a vocabulary: {what}")


def _tokenizer_config(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    reject_code(values, path)
    kept = {key: value for key, value in values.items() if key in _TOKENIZER_KEYS or key.endswith("_token")}
    # Of sentencepiece's own options, a model that was converted needs none.
    if not isinstance(kept.get("sp_model_kwargs", {}), dict) or kept.get("sp_model_kwargs"):
        raise CapfiltError(
            f"{path}: sp_model_kwargs is not supported; save the tokenizer as a tokenizer.json"
        )
    name = kept.get("tokenizer_class")
    if name is not None and (
        not isinstance(name, str) or name.removesuffix("Fast") not in _TOKENIZER_CLASSES
    ):
        raise CapfiltError(
            f"{path}: tokenizer_class = {printable(repr(name))[:80]} is not a tokenizer that is known to read a "
            "vocabulary alone; save it as a tokenizer.json of the class PreTrainedTokenizerFast"
        )
    return kept


def _tokenizer_hints(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return what a model's config says of its tokenizer."""
    reject_code(values, path)
    hints = {}
    if (
        isinstance(name := values.get("tokenizer_class"), str)
        and name.removesuffix("Fast") in _TOKENIZER_CLASSES
    ):
        hints["tokenizer_class"] = name
    if isinstance(name := values.get("model_type"), str) and name in _TOKENIZER_MODEL_TYPES:
        hints["model_type"] = name
    return hints
