"""Models from untrusted folders: their code never runs, and whatever is wrong with a file is one line that names it."""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.coca_model import MultimodalCfg
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import load_file, save_file
from tiny_models import IMAGE_PX, save_captioner, save_ranker, tokenizer
from transformers import AutoTokenizer, BertTokenizer, BlipForConditionalGeneration, BlipImageProcessorPil

from pipeline.models import clip_config
from pipeline.models.blip.captioner import BlipCaptioner
from pipeline.models.clip.ranker import ClipRanker
from pipeline.models.files.model_files import read_object, safetensors_header, weight_files
from pipeline.models.transformers_loader import load_tokenizer
from pipeline.models.weights import captioner_weights, ranker_weights
from schemas.config import CaptionConfig
from schemas.errors import CapfiltError
from schemas.pretrain import LanguageConfig, VisionConfig
from training.convert.read import read_blip2, read_lavis, read_own
from training.models.language import language_shape, load_language
from training.models.pretrained import model_folder
from training.models.vision import empty_vision, load_vision

OPT = Path(__file__).resolve().parent.parent / "jobs/demo/weights/opt"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_captioner(folder / "captioner")
    save_ranker(folder / "ranker")
    shutil.copytree(OPT, folder / "language")
    tokenizer().save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture
def models(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "models"))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# -- what loads a model folder ---------------------------------------------------------------------------------


def caption(models: Path) -> BlipCaptioner:
    config = CaptionConfig(model=str(models / "captioner"), max_length=8, min_length=2)
    return BlipCaptioner(config, captioner_weights(config), 0)


def rank(models: Path) -> ClipRanker:
    return ClipRanker(ranker_weights(f"local-dir:{models / 'ranker'}", ""), "fp32")


def see(models: Path) -> object:
    config = VisionConfig(model=f"local-dir:{models / 'ranker'}", pretrained="")
    empty_vision(config, "meta", torch.float32)
    return load_vision(config, IMAGE_PX, torch.float32)


def speak(models: Path) -> object:
    config = LanguageConfig(family="opt", model=str(models / "language"), precision="fp32")
    language_shape(config)
    return load_language(config)


def split(models: Path) -> object:
    return load_tokenizer(models / "tokenizer", "qformer.tokenizer", BertTokenizer)


LOADERS: dict[str, Callable[[Path], object]] = {
    "captioner": caption,
    "ranker": rank,
    "language": speak,
    "tokenizer": split,
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_sound_folder_loads(models: Path, name: str) -> None:
    LOADERS[name](models)
    see(models)


# -- code --------------------------------------------------------------------------------------------------------

CODE = 'import pathlib\npathlib.Path({marker!r}).write_text("ran")\nclass Evil:\n    pass\n'
AUTO_MAP = {
    "auto_map": {
        "AutoConfig": "evil.Evil",
        "AutoModel": "evil.Evil",
        "AutoTokenizer": ["evil.Evil", "evil.Evil"],
        "AutoImageProcessor": "evil.Evil",
        "AutoProcessor": "evil.Evil",
    },
    "trust_remote_code": True,
}


def plant(models: Path, tmp_path: Path) -> Path:
    """Put Python files, templates and pickles into every folder; return the file that they would write."""
    marker = tmp_path / "ran"
    for folder in models.iterdir():
        for name in ("evil.py", "modeling_evil.py", "tokenization_evil.py", "custom_generate/generate.py"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(CODE.format(marker=str(marker)))
        (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
        (folder / "adapter_config.json").write_text(
            '{"base_model_name_or_path": "/nowhere", "peft_type": "LORA"}'
        )
    return marker


FILES = [
    ("captioner", "config.json"),
    ("captioner", "preprocessor_config.json"),
    ("captioner", "tokenizer_config.json"),
    ("captioner", "special_tokens_map.json"),
    ("ranker", "tokenizer_config.json"),
    ("ranker", "config.json"),
    ("language", "config.json"),
    ("language", "tokenizer_config.json"),
    ("tokenizer", "tokenizer_config.json"),
]


@pytest.mark.parametrize(("model", "file"), FILES)
@pytest.mark.parametrize("escaped", [False, True])
def test_a_file_that_asks_for_code_is_refused(
    models: Path, tmp_path: Path, model: str, file: str, escaped: bool
) -> None:
    marker = plant(models, tmp_path)
    path = models / model / file
    values = json.loads(path.read_text()) if path.is_file() else {}
    text = json.dumps(values | AUTO_MAP | {"tokenizer_class": "EvilTokenizer"})
    path.write_text(text.replace("_", "\\u005f") if escaped else text)
    with pytest.raises(CapfiltError, match=rf"{file} asks to run code of its own"):
        LOADERS[model](models)
    assert not marker.exists()


@pytest.mark.parametrize("load", [rank, see])
@pytest.mark.parametrize(
    "options",
    [
        '{"trust_remote_code": true}',
        '{"trust\\u005fremote\\u005fcode": true}',
        '{"strip_sep_token": false, "\\u0074rust_remote_code": 1}',
        '{"tokenizer_file": "/etc/passwd"}',
        '{"bpe_path": "/etc/passwd"}',
        '{"gguf_file": "evil.gguf"}',
        '["trust_remote_code"]',
    ],
)
def test_options_of_a_tokenizer_are_those_that_are_known(
    models: Path, tmp_path: Path, load: Callable[[Path], object], options: str
) -> None:
    marker = plant(models, tmp_path)
    edit(models / "ranker" / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    path = models / "ranker" / "open_clip_config.json"
    assert '{"strip_sep_token": false}' in path.read_text()
    path.write_text(path.read_text().replace('{"strip_sep_token": false}', options))
    with pytest.raises(CapfiltError, match="open_clip_config.json") as caught:
        load(models)
    assert not marker.exists() and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("vision_cfg", {"timm_model_name": "hf-hub:somebody/else"}),
        ("vision_cfg", {"timm_model_name": "local-dir:/somewhere"}),
        ("vision_cfg", {"timm_model_name": 7}),
        ("text_cfg", {"hf_model_name": "somebody/else"}),
        ("text_cfg", {"hf_model_name": "/somewhere"}),
        ("text_cfg", {"bpe_path": "/etc/passwd"}),
    ],
)
def test_no_other_repository_is_asked(models: Path, section: str, values: dict[str, Any]) -> None:
    path = models / "ranker" / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"][section] |= values
    path.write_text(json.dumps(config))
    with pytest.raises(CapfiltError, match=rf"open_clip_config.json: .*{section}"):
        rank(models)


def test_what_is_not_known_of_a_config_is_left_out(models: Path, tmp_path: Path) -> None:
    """Kernels, adapters, other files and templates: transformers would fetch or open them."""
    marker = plant(models, tmp_path)
    before = caption(models)
    edit(
        models / "captioner" / "config.json",
        _attn_implementation="somebody/kernel",
        attn_implementation="somebody/kernel",
        transformers_weights="../../etc/passwd",
        _name_or_path="somebody/else",
    )
    edit(
        models / "captioner" / "tokenizer_config.json",
        vocab_file="/etc/passwd",
        tokenizer_file="/etc/passwd",
        special_tokens_map_file="/etc/passwd",
        chat_template="{{ 1 }}",
        init_inputs=["/etc/passwd"],
        gguf_file="evil.gguf",
    )
    (models / "captioner" / "special_tokens_map.json").write_text('{"vocab_file": "/etc/passwd"}')
    after = caption(models)
    assert not marker.exists()
    text = "a red circle on the street"
    assert after._tokenizer(text).input_ids == before._tokenizer(text).input_ids
    assert after._tokenizer.chat_template is None
    pixels = torch.rand(1, 3, IMAGE_PX, IMAGE_PX)
    assert torch.equal(after.vision(pixels), before.vision(pixels))


def _replace(content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": "a"}, "content": content}


def _sequence(steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": steps}


@pytest.mark.parametrize(
    "values",
    [
        {"normalizer": _replace("a" * 100)},
        {"normalizer": _sequence([_replace("aa")] * 12)},
        {"normalizer": _sequence([_sequence([_replace("aa")] * 6)])},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 9}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 1000}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 9}},
        {"decoder": {"type": "Sequence", "decoders": [_replace("aaa")] * 9}},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_tokenizer_does_not_multiply_texts(models: Path, values: dict[str, Any]) -> None:
    edit(models / "captioner" / "tokenizer.json", **values)
    with pytest.raises(
        CapfiltError, match=r"tokenizer.json: its \w+ can make a text more than 16 times as long"
    ):
        caption(models)


@pytest.mark.parametrize(
    "normalizer",
    [
        # As T5's, Llama's and CLIP's are.
        [{"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u2581"}, {"type": "NFKC"}],
        [{"type": "Prepend", "prepend": "\u2581"}, _replace("\u2581")],
        [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "},
            {"type": "Lowercase"},
        ],
    ],
)
def test_normalizers_of_published_tokenizers_load(models: Path, normalizer: list[dict[str, Any]]) -> None:
    edit(models / "captioner" / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": normalizer})
    assert caption(models)


@pytest.mark.parametrize("name", ["RagTokenizer", "MistralCommonBackend", "BertJapaneseTokenizer", 7, ["a"]])
def test_tokenizers_that_do_more_than_read_a_vocabulary(models: Path, name: Any) -> None:
    edit(models / "language" / "tokenizer_config.json", tokenizer_class=name)
    with pytest.raises(CapfiltError, match=r"tokenizer_config.json: tokenizer_class = "):
        speak(models)


def test_the_command_that_converts_is_made_of_no_text_of_others(models: Path) -> None:
    folder = models / "language"
    (folder / "model.safetensors").unlink()
    edit(folder / "config.json", architectures=["AutoModel; import os; os.system('id')"])
    with pytest.raises(CapfiltError, match="import AutoTokenizer, AutoModel;") as caught:
        model_folder(str(folder), "main", "language.model")
    assert "os.system" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/etc/passwd", "C:\\weights", "a/../../b", "\x1b[2J", 7, None, {}]
)
def test_an_index_names_files_of_its_folder_alone(models: Path, name: Any) -> None:
    folder = models / "captioner"
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    for load in (lambda: caption(models), lambda: weight_files(folder)):
        with pytest.raises(CapfiltError, match=r"model\.safetensors\.index\.json") as caught:
            load()
        assert str(caught.value).isprintable()


def test_an_index_may_not_name_a_pickle(models: Path) -> None:
    folder = models / "captioner"
    (folder / "model.safetensors").rename(folder / "model.bin")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.bin"}}')
    with pytest.raises(CapfiltError, match="only safetensors are read"):
        caption(models)


# -- damaged files -------------------------------------------------------------------------------------------------


def header(value: Any, length: int | None = None, data: bytes = b"") -> bytes:
    text = json.dumps(value).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "empty": b"",
    "two bytes": b"{}",
    "a length of 2^60": header({}, 1 << 60),
    "a length of 2^63": header({}, 1 << 63),
    "a length beyond the file": header({}, 3000),
    "a list": header([1]),
    "deep": struct.pack("<Q", 200_000) + b"[" * 100_000 + b"]" * 100_000,
    "no JSON": struct.pack("<Q", 4) + b"\xff\xfe{}",
    "no dtype": header({"a": {"shape": [2], "data_offsets": [0, 8]}}, data=bytes(8)),
    "no offsets": header({"a": {"dtype": "F32", "shape": [2]}}, data=bytes(8)),
    "a text": header({"a": "b"}),
    "another dtype": header({"a": TENSOR | {"dtype": "F31"}}, data=bytes(8)),
    "a shape below zero": header({"a": TENSOR | {"shape": [-2]}}, data=bytes(8)),
    "a shape of another size": header({"a": TENSOR | {"shape": [1 << 40]}}, data=bytes(8)),
    "more dimensions than torch has": header({"a": TENSOR | {"shape": [2] + [1] * 64}}, data=bytes(8)),
    "a number of 4,000 digits": header(
        {"a": {"dtype": "F32", "shape": [10**4000, 0], "data_offsets": [0, 0]}}
    ),
    "overlap": header({"a": TENSOR, "b": TENSOR}, data=bytes(8)),
    "overlap in part": header({"a": TENSOR, "b": TENSOR | {"data_offsets": [4, 12]}}, data=bytes(12)),
    "a gap": header({"a": TENSOR, "b": TENSOR | {"data_offsets": [12, 20]}}, data=bytes(20)),
    "a gap at the start": header({"a": TENSOR | {"data_offsets": [4, 12]}}, data=bytes(12)),
    "cut": header({"a": TENSOR}, data=bytes(7)),
    "a pointer of git": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "a page": b"<!DOCTYPE html>\n<html><title>404</title></html>",
    "a pickle": b"\x80\x02}q\x00." * 9,
    "a zip": b"PK\x03\x04" * 9,
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_weights_are_named(models: Path, damage: str) -> None:
    for model, file in (
        ("captioner", "model.safetensors"),
        ("ranker", "open_clip_model.safetensors"),
        ("language", "model.safetensors"),
    ):
        path = models / model / file
        path.write_bytes(DAMAGED[damage])
        with pytest.raises(CapfiltError, match=rf"^{path} is not a safetensors file: ") as caught:
            LOADERS[model](models)
        assert "unsafe" not in str(caught.value) and "weights_only" not in str(caught.value)
    blip2 = models / "captioner"
    edit(blip2 / "config.json", model_type="blip-2")
    with pytest.raises(CapfiltError, match="is not a safetensors file"):
        read_blip2(blip2)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("a pointer of git", "git lfs pull"),
        ("a page", "HTML"),
        ("a pickle", "pickle"),
        ("cut", "1 bytes are missing"),
        ("overlap", "overlap or leave gaps"),
        ("overlap in part", "overlap or leave gaps"),
        ("a gap", "overlap or leave gaps"),
        ("a gap at the start", "overlap or leave gaps"),
        ("more dimensions than torch has", "does not describe tensors"),
        ("a number of 4,000 digits", "does not describe tensors"),
        ("empty", "empty"),
    ],
)
def test_what_has_the_place_of_weights_is_told(tmp_path: Path, damage: str, says: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(DAMAGED[damage])
    with pytest.raises(CapfiltError, match=says):
        safetensors_header(path)


def test_a_sound_header_is_the_librarys(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(0, 4, dtype=torch.bfloat16), "c": torch.tensor(1)}
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    entries = safetensors_header(tmp_path / "a.safetensors")
    assert {name: entry.shape for name, entry in entries.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    assert {name: entry.dtype for name, entry in entries.items()} == {"a": "F32", "b": "BF16", "c": "I64"}


JSON_FILES = [
    ("captioner", "config.json"),
    ("captioner", "preprocessor_config.json"),
    ("captioner", "tokenizer.json"),
    ("captioner", "tokenizer_config.json"),
    ("ranker", "open_clip_config.json"),
    ("ranker", "tokenizer.json"),
    ("language", "config.json"),
    ("language", "tokenizer.json"),
]
WRONG_JSON = {
    "list": "[]",
    "text": '"\\u001b]0;title\\u0007"',
    "cut": '{"model_type": "blip"',
    "deep": "[" * 200_000,
    "nothing": "",
    "page": "<html></html>",
    "bytes": "\udcff",
}


@pytest.mark.parametrize(("model", "file"), JSON_FILES)
@pytest.mark.parametrize("wrong", WRONG_JSON)
def test_damaged_json_is_named(models: Path, model: str, file: str, wrong: str) -> None:
    path = models / model / file
    path.write_bytes(WRONG_JSON[wrong].encode(errors="surrogateescape"))
    with pytest.raises(CapfiltError, match=f"{model}/{file}") as caught:
        LOADERS[model](models)
    assert str(caught.value).isprintable()


def test_json_is_read_up_to_a_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": "' + "b" * 100 + '"}')
    with pytest.raises(CapfiltError, match="is larger than"):
        read_object(tmp_path / "config.json", max_bytes=50)


WRONG_VALUES: list[tuple[str, str, dict[str, Any]]] = [
    ("captioner", "config.json", {"text_config": 7}),
    ("captioner", "config.json", {"vision_config": []}),
    ("captioner", "config.json", {"vision_config": {"image_size": 1_000_000}}),
    ("captioner", "config.json", {"text_config": {"vocab_size": "many"}}),
    ("captioner", "config.json", {"text_config": {"num_hidden_layers": 1_000_000}}),
    ("captioner", "config.json", {"text_config": {"hidden_size": 1 << 20, "num_hidden_layers": 9}}),
    ("captioner", "config.json", {"text_config": {"hidden_act": {"a": 1}}}),
    ("captioner", "config.json", {"quantization_config": {"quant_method": "fp8"}}),
    ("captioner", "preprocessor_config.json", {"size": {"height": 1_000_000, "width": 1_000_000}}),
    ("captioner", "preprocessor_config.json", {"size": {"height": IMAGE_PX, "width": 1}}),
    ("captioner", "preprocessor_config.json", {"size": "\x1b[2J"}),
    ("captioner", "preprocessor_config.json", {"image_mean": [0.5]}),
    ("captioner", "preprocessor_config.json", {"image_std": [0, 0, 0]}),
    ("captioner", "preprocessor_config.json", {"resample": [3]}),
    ("captioner", "tokenizer.json", {"model": None}),
    ("captioner", "tokenizer.json", {"model": {"type": "WordPiece", "vocab": 7}}),
    ("captioner", "tokenizer.json", {"post_processor": "\x1b[2J"}),
    ("ranker", "open_clip_config.json", {"model_cfg": 7}),
    ("ranker", "open_clip_config.json", {"model_cfg": {"embed_dim": 8}}),
    ("ranker", "open_clip_config.json", {"preprocess_cfg": 7}),
    ("ranker", "open_clip_config.json", {"preprocess_cfg": {"mean": "red"}}),
    ("ranker", "open_clip_config.json", {"preprocess_cfg": {"std": [1, 1, 0]}}),
    ("ranker", "open_clip_config.json", {"preprocess_cfg": {"interpolation": "\x1b[2J"}}),
    ("ranker", "tokenizer.json", {"added_tokens": 7}),
    ("language", "config.json", {"hidden_size": None}),
    ("language", "config.json", {"vocab_size": 1 << 30}),
    ("language", "config.json", {"activation_function": "no such\x1b[2J"}),
]


@pytest.mark.parametrize(("model", "file", "values"), WRONG_VALUES)
def test_values_that_no_model_has(models: Path, model: str, file: str, values: dict[str, Any]) -> None:
    edit(models / model / file, **values)
    with pytest.raises(CapfiltError, match=str(models / model)) as caught:
        LOADERS[model](models)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("vision_cfg", {"image_size": 1_000_000}),
        ("vision_cfg", {"image_size": [32, 1_000_000]}),
        ("vision_cfg", {"layers": 1_000_000}),
        ("vision_cfg", {"width": 1 << 20, "layers": 9}),
        ("text_cfg", {"vocab_size": 1 << 30}),
        ("text_cfg", {"context_length": 1 << 40}),
        ("text_cfg", {"heads": 0}),
        ("text_cfg", {"tokenizer_kwargs": {"clean": "\x1b[2J"}}),
    ],
)
def test_sizes_of_a_clip_are_bounded(models: Path, section: str, values: dict[str, Any]) -> None:
    path = models / "ranker" / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"][section] |= values
    path.write_text(json.dumps(config))
    with pytest.raises(CapfiltError, match=str(models / "ranker")) as caught:
        rank(models)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("section", "values", "text"),
    [
        ("vision_cfg", {"timm_model_name": None}, {"vocab_size": 20_000_000}),
        (
            "vision_cfg",
            {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224},
            {"vocab_size": 20_000_000},
        ),
        # A mask of so many tokens squared, which is not a parameter.
        ("vision_cfg", {}, {"context_length": 30_000}),
    ],
)
def test_a_clip_is_compared_with_its_weights_whatever_its_config(
    models: Path, section: str, values: dict[str, Any], text: dict[str, Any]
) -> None:
    path = models / "ranker" / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"][section] |= values
    config["model_cfg"]["text_cfg"] |= text
    path.write_text(json.dumps(config))
    with pytest.raises(CapfiltError, match="open_clip_config.json describes a model of .* parameters"):
        rank(models)


def test_the_keys_of_open_clips_own_configs_are_known() -> None:
    """An update of open_clip that brings a key shows here."""
    known = clip_config._CLIP_SECTIONS
    others = set(clip_config._ANOTHER_REPOSITORY)
    for name, kind in (
        ("vision_cfg", CLIPVisionCfg),
        ("text_cfg", CLIPTextCfg),
        ("multimodal_cfg", MultimodalCfg),
    ):
        assert {field.name for field in fields(kind)} - others == known[name]
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        assert config.keys() <= clip_config._CLIP_KEYS
        options = config["text_cfg"].get("tokenizer_kwargs", {})
        assert options.keys() <= clip_config._OPTIONS["tokenizer_kwargs"].keys()


# -- as they are saved and copied ------------------------------------------------------------------------------------


def test_a_folder_as_transformers_5_saves_it(models: Path) -> None:
    folder = models / "captioner"
    before, digest = caption(models), captioner_weights(CaptionConfig(model=str(folder))).digest
    old = folder / "preprocessor_config.json"
    settings = json.loads(old.read_text())
    # Beside the older file the new one changes nothing: digests of models that worked stay.
    new = folder / "processor_config.json"
    new.write_text(
        json.dumps({"image_processor": settings | {"resample": 2}, "processor_class": "BlipProcessor"})
    )
    assert captioner_weights(CaptionConfig(model=str(folder))).digest == digest
    assert caption(models).preprocess == before.preprocess
    old.unlink()
    new.write_text(json.dumps({"image_processor": settings, "processor_class": "BlipProcessor"}))
    assert caption(models).preprocess == before.preprocess
    assert "processor_config.json" in captioner_weights(CaptionConfig(model=str(folder))).files
    new.write_text('{"processor_class": "BlipProcessor"}')
    with pytest.raises(CapfiltError, match=r"processor_config.json: image_processor is missing"):
        caption(models)


def test_a_vocabulary_that_the_weights_do_not_have(models: Path) -> None:
    config = json.loads((models / "captioner" / "config.json").read_text())
    size, width = config["text_config"]["vocab_size"], config["text_config"]["hidden_size"]
    config["text_config"]["vocab_size"] += 4
    (models / "captioner" / "config.json").write_text(json.dumps(config))
    shapes = rf"text_decoder\.\S+ first: \({size}(, {width})?\) instead of \({size + 4}(, {width})?\)"
    with pytest.raises(CapfiltError, match=shapes):
        caption(models)
    config = json.loads((models / "ranker" / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["vocab_size"] += 4
    (models / "ranker" / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(CapfiltError, match=r"size mismatch for token_embedding.weight"):
        rank(models)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_that_a_wrapper_left(models: Path, tmp_path: Path, wrapper: str) -> None:
    path = models / "captioner" / "model.safetensors"
    save_file(
        {f"{wrapper}{name}": tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"}
    )
    with pytest.raises(CapfiltError, match=rf"{path}: the names of all tensors begin with"):
        caption(models)
    tensors = {f"{wrapper}query_tokens": torch.zeros(1, 2, 3), f"{wrapper}temp": torch.zeros(())}
    torch.save({"model": tensors}, tmp_path / "lavis.pth")
    assert read_lavis(tmp_path / "lavis.pth").tensors.keys() == {"query_tokens", "temp"}
    own = tmp_path / "own"
    own.mkdir()
    save_file(tensors, own / "model.safetensors")
    (own / "capfilt.json").write_text('{"format": "capfilt-blip2", "version": 1}')
    assert read_own(own).tensors.keys() == {"query_tokens", "temp"}


def test_a_ranker_saved_out_of_a_wrapper(models: Path) -> None:
    path = models / "ranker" / "open_clip_model.safetensors"
    tensors = load_file(path)
    save_file({f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}, path)
    with pytest.raises(CapfiltError, match="begin with '_orig_mod.'"):
        rank(models)
    save_file({f"module.{name}": tensor for name, tensor in tensors.items()}, path)
    rank(models)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is not a file of torch.save: it is empty"),
        (b"<html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"PK\x03\x04 and no more", "is not a file of torch.save"),
        (b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00id\x85R.", "is not read"),
        (b"\x80\x02\x8a", "lavis.pth"),
    ],
)
def test_a_lavis_file_that_is_none(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "lavis.pth").write_bytes(data)
    with pytest.raises(CapfiltError, match=says) as caught:
        read_lavis(tmp_path / "lavis.pth")
    message = str(caught.value)
    assert message.isprintable() and "weights_only" not in message and "trust" not in message


# -- what worked before ------------------------------------------------------------------------------------------------


def test_models_and_tokenizers_are_what_the_libraries_alone_would_load(models: Path) -> None:
    actual, folder = caption(models), models / "captioner"
    reference = BlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = torch.rand(2, 3, IMAGE_PX, IMAGE_PX)
    expected = reference.vision_model(pixels).last_hidden_state
    assert torch.allclose(actual.vision(pixels), expected, atol=1e-5)
    assert actual.preprocess == type(actual.preprocess).of_blip(BlipImageProcessorPil.from_pretrained(folder))
    for model in ("captioner", "language"):
        reference = AutoTokenizer.from_pretrained(models / model)
        actual = load_tokenizer(models / model, model)
        assert type(actual) is type(reference) and actual.get_vocab() == reference.get_vocab()
        for text in ("a red circle", "A Cat's dog, [SEP] </s> \n ünï", ""):
            assert actual(text).input_ids == reference(text).input_ids


def test_digests_of_models_that_worked_before_stay() -> None:
    """Of the demo's own folders: a digest is of these files and their sha256, as it always was."""
    tokenizer_files = ["tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    captioner, ranker = OPT.parent / "captioner", OPT.parent / "ranker"
    for weights, folder, names in (
        (
            captioner_weights(CaptionConfig(model=str(captioner))),
            captioner,
            ["config.json", "model.safetensors", "preprocessor_config.json", *tokenizer_files],
        ),
        (
            ranker_weights(f"local-dir:{ranker}", ""),
            ranker,
            ["open_clip_config.json", "open_clip_model.safetensors", *tokenizer_files],
        ),
    ):
        files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
        assert weights.files == files
        text = json.dumps(files, sort_keys=True, separators=(",", ":"))
        assert weights.digest == hashlib.sha256(text.encode()).hexdigest()
