"""Weights of other makes: LAVIS's files, by their published names; what does not fit is named."""

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trained import begun_stage, trained_stage

from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from training.blip2.stage1 import Stage1
from training.blip2.stage2 import Stage2
from training.build import meta_stage
from training.convert.key_map import from_hf, hf_name, lavis_name, to_hf
from training.convert.load import load_trained
from training.convert.read import read_external, read_lavis
from training.convert.state import stage_state

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def stage1(folder: Path) -> Stage1:
    return trained_stage(folder)


@pytest.fixture(scope="module")
def stage2(folder: Path) -> Stage2:
    return trained_stage(folder, 2)


def lavis_names(layers: int, stage: int, family: str = "opt") -> set[str]:
    """Return the names of what LAVIS trains, from its modules' definition."""

    def linear(name: str) -> Iterator[str]:
        return (f"{name}.{part}" for part in ("weight", "bias"))

    names = {"query_tokens", *linear("ln_vision"), *linear("Qformer.bert.embeddings.LayerNorm")}
    for index in range(layers):
        layer = f"Qformer.bert.encoder.layer.{index}"
        for attention in ("attention", "crossattention") if index % 2 == 0 else ("attention",):
            for part in ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm"):
                names |= {*linear(f"{layer}.{attention}.{part}")}
        for end in ("_query",) if stage == 2 else ("_query", ""):
            for part in (f"intermediate{end}.dense", f"output{end}.dense", f"output{end}.LayerNorm"):
                names |= {*linear(f"{layer}.{part}")}
    if stage == 2:
        return names | {*linear(f"{family}_proj")}
    names |= {f"Qformer.bert.embeddings.{table}_embeddings.weight" for table in ("word", "position")}
    for part in ("dense", "LayerNorm"):
        names |= {*linear(f"Qformer.cls.predictions.transform.{part}")}
    return names | {
        "Qformer.cls.predictions.bias", "temp", *linear("vision_proj"), *linear("text_proj"), *linear("itm_head")
    }  # fmt: skip


def lavis_file(path: Path, trained: dict[str, Tensor], **content: Any) -> Path:
    """Write a checkpoint as LAVIS's runner does: what is trained, and the buffers and second names beside it."""
    model = {name: tensor.clone() for name, tensor in trained.items()}
    if "temp" in trained:
        model["Qformer.bert.embeddings.position_ids"] = torch.arange(48)[None]
        model["Qformer.cls.predictions.decoder.weight"] = model[
            "Qformer.bert.embeddings.word_embeddings.weight"
        ]
        model["Qformer.cls.predictions.decoder.bias"] = model["Qformer.cls.predictions.bias"]
    else:
        model["opt_model.model.decoder.final_layer_norm.weight"] = torch.ones(3)
    torch.save({"model": model, "epoch": 9, "config": {"run": {"seed": 42}}, "scaler": None, **content}, path)
    return path


def full_size(
    vision: str, stage: int = 1, family: str = "opt", model: str = "facebook/opt-2.7b"
) -> PretrainConfig:
    values: dict[str, Any] = {
        "run": {"name": "full", "stage": stage},
        "data": {"corpus": [{"path": "unused"}]},
        "vision": {"model": vision, "pretrained": "" if vision.startswith("EVA") else "openai"},
        "optim": {"batch_size": 16},
    }
    if stage == 2:
        values["language"] = {"model": model, "family": family}
    return PretrainConfig.model_validate(values)


@pytest.mark.parametrize("vision", ["EVA01-g-14", "ViT-L-14"])
def test_stage1_trains_what_lavis_names(vision: str) -> None:
    state = meta_stage(full_size(vision)).trainable_state()
    assert set(state) == lavis_names(12, 1)
    assert state["Qformer.bert.embeddings.word_embeddings.weight"].shape == (30523, 768)
    assert state["temp"].shape == ()
    assert state["query_tokens"].shape == (1, 32, 768)


@pytest.mark.parametrize(("family", "model"), [("opt", "facebook/opt-2.7b"), ("t5", "google/flan-t5-xl")])
def test_stage2_trains_what_lavis_names(family: str, model: str) -> None:
    state = meta_stage(full_size("EVA01-g-14", 2, family, model)).trainable_state()
    assert set(state) == lavis_names(12, 2, family)


def test_a_lavis_file_of_stage1_loads_whole(stage1: Stage1, tmp_path: Path) -> None:
    path = lavis_file(tmp_path / "blip2_pretrained.pth", stage1.trainable_state())
    config = stage1.config.model_copy(
        update={"run": stage1.config.run.model_copy(update={"init_from": str(path)})}
    )
    loaded = begun_stage(config)
    for name, tensor in stage1.trainable_state().items():
        assert torch.equal(loaded.trainable_state()[name], tensor), name
    # The same for evaluation, where the recipe must come along.
    evaluated = load_trained(str(path), stage1.config)
    assert torch.equal(evaluated.temp, stage1.temp)
    with pytest.raises(CapfiltError, match="has no config; name its recipe with -c"):
        load_trained(str(path))


def test_half_precision_files_are_trained_on_in_full(stage1: Stage1, tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in stage1.trainable_state().items()}
    imported = read_external(str(lavis_file(tmp_path / "half.pth", half)))
    state = stage_state(imported.trained, stage1.trainable_state(), stage=1, where="half.pth")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert torch.equal(state["query_tokens"], half["query_tokens"].float())


def test_stage2_begins_from_a_stage1_file(stage1: Stage1, stage2: Stage2, tmp_path: Path) -> None:
    imported = read_external(str(lavis_file(tmp_path / "stage1.pth", stage1.trainable_state())))
    fresh = stage2.trainable_state()
    state = stage_state(imported.trained, fresh, stage=2, where="stage1.pth")
    assert set(state) == set(fresh)
    for name, tensor in state.items():
        expected = fresh if name.startswith("opt_proj") else stage1.trainable_state()
        assert torch.equal(tensor, expected[name]), name


def test_stage2_goes_on_from_a_stage2_file(stage2: Stage2, tmp_path: Path) -> None:
    imported = read_external(str(lavis_file(tmp_path / "stage2.pth", stage2.trainable_state())))
    fresh = {name: torch.zeros_like(tensor) for name, tensor in stage2.trainable_state().items()}
    state = stage_state(imported.trained, fresh, stage=2, where="stage2.pth")
    assert torch.equal(state["opt_proj.weight"], stage2.trainable_state()["opt_proj.weight"])


def test_what_does_not_fit_is_named(stage1: Stage1, stage2: Stage2) -> None:
    whole = stage1.trainable_state()
    without = {name: tensor for name, tensor in whole.items() if not name.startswith("itm_head")}
    with pytest.raises(CapfiltError, match=r"x.pth is not a checkpoint .* 2 missing, itm_head.weight first"):
        stage_state(without, whole, stage=1, where="x.pth")
    with pytest.raises(CapfiltError, match="1 unexpected, other first"):
        stage_state({**whole, "other": torch.zeros(1)}, whole, stage=1, where="x.pth")
    with pytest.raises(CapfiltError, match=r"1 of another shape, temp first \(\(2,\) instead of \(\)\)"):
        stage_state({**whole, "temp": torch.zeros(2)}, whole, stage=1, where="x.pth")
    with pytest.raises(CapfiltError, match="missing.*unexpected, opt_proj.weight first"):
        stage_state(stage2.trainable_state(), whole, stage=1, where="x.pth")
    # A projection for another language model does not become this one's.
    other = {name.replace("opt_", "t5_"): tensor for name, tensor in stage2.trainable_state().items()}
    with pytest.raises(
        CapfiltError, match="2 missing, opt_proj.weight first; 2 unexpected, t5_proj.weight first"
    ):
        stage_state(other, stage2.trainable_state(), stage=2, where="x.pth")


class Payload:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("/nonexistent/never"),)


def test_no_code_of_a_file_is_run(stage1: Stage1, tmp_path: Path) -> None:
    path = lavis_file(tmp_path / "evil.pth", stage1.trainable_state(), extra=Payload())
    with pytest.raises(CapfiltError, match="holds more than tensors and plain values"):
        read_external(str(path))
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"model": 1}))
    with pytest.raises(CapfiltError, match="is no (LAVIS checkpoint|file of torch.save)|holds more than"):
        read_external(str(tmp_path / "plain.pth"))


def test_files_that_are_none_of_it(tmp_path: Path) -> None:
    with pytest.raises(CapfiltError, match="no such file"):
        read_external(str(tmp_path / "absent.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(CapfiltError, match="text.pth"):
        read_external(str(tmp_path / "text.pth"))
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(CapfiltError, match='there are no tensors under "model"'):
        read_external(str(tmp_path / "other.pth"))
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "blip1.pth")
    with pytest.raises(CapfiltError, match="is neither a BLIP-2, which has query_tokens, nor a BLIP"):
        read_external(str(tmp_path / "blip1.pth"))
    assert read_external(str(tmp_path)) is None


# -- Hugging Face's names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "family", "model"),
    [(1, None, ""), (2, "opt", "facebook/opt-2.7b"), (2, "t5", "google/flan-t5-xl")],
)
def test_every_full_size_name_goes_there_and_back(stage: int, family: str | None, model: str) -> None:
    config = full_size("EVA01-g-14", stage, family or "opt", model or "facebook/opt-2.7b")
    built = meta_stage(config)
    names = [
        *built.trainable_state(),
        *(f"visual_encoder.{name}" for name in built.visual_encoder.tower.state_dict()),
    ]
    unmapped = {name for name in names if hf_name(name) is None and not name.endswith(("q_bias", "v_bias"))}
    expected = {name for name in names if name.startswith("Qformer.cls.")} | {"temp"}
    assert unmapped == (expected if stage == 1 else set())
    for name in names:
        if there := hf_name(name):
            assert lavis_name(there, family) == name


def test_attention_biases_are_joined_and_parted() -> None:
    prefix = "visual_encoder.blocks.1.attn"
    tensors_read = {
        f"{prefix}.q_bias": torch.tensor([1.0, 2.0]),
        f"{prefix}.v_bias": torch.tensor([3.0, 4.0]),
    }
    there, unmapped = to_hf(tensors_read)
    name = "vision_model.encoder.layers.1.self_attn.qkv.bias"
    assert unmapped == {}
    assert there[name].tolist() == [1, 2, 0, 0, 3, 4]
    back = from_hf(there, None, "x")
    assert {key: value.tolist() for key, value in back.items()} == {
        key: value.tolist() for key, value in tensors_read.items()
    }
    with pytest.raises(CapfiltError, match="has a bias of the keys"):
        from_hf({name: torch.ones(6)}, None, "x")
    with pytest.raises(CapfiltError, match="surprise is not a tensor of BLIP-2"):
        from_hf({"surprise": torch.ones(1)}, None, "x")


@pytest.mark.parametrize("name", ["query_tokens", "visual_encoder.x"])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**12),
        torch.zeros(4).as_strided((10**6, 10**6), (0, 0)),
        torch.empty(10**12, device="meta"),
        torch.sparse_coo_tensor(torch.tensor([[0]]), torch.zeros(1), (10**12,)),
    ],
    ids=["expanded", "strided", "meta", "sparse"],
)
def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path, name: str, tensor: torch.Tensor) -> None:
    path = tmp_path / "bomb.pth"
    torch.save({"model": {"query_tokens": torch.zeros(1, 2, 3), name: tensor}}, path)
    with pytest.raises(CapfiltError, match=f"larger than what is stored of them.* {name} first"):
        read_lavis(path)


def test_a_packed_zip_is_refused(tmp_path: Path) -> None:
    sound, packed = tmp_path / "sound.pth", tmp_path / "packed.pth"
    torch.save({"model": {"query_tokens": torch.zeros(100_000)}}, sound)
    with zipfile.ZipFile(sound) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    assert read_lavis(sound).tensors["query_tokens"].shape == (100_000,)
    with pytest.raises(CapfiltError, match="it is compressed"):
        read_lavis(packed)
