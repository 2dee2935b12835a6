"""Float8 in the vision towers: refused where nothing computes it, in the blocks alone, rounded as torchao rounds."""

import json
import platform
from pathlib import Path

import pytest
import torch
import torchao.quantization.quant_api
from pydantic import ValidationError
from raw_shards import encoded, picture
from test_rank import TEXTS, score_images
from tiny_models import save_captioner, save_ranker
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import linear
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Float8Tensor, PerRow, quantize_
from transformers import BlipForConditionalGeneration

from jobs.bench.engines.fp8 import Results, changes, measure_fp8
from pipeline.candidates import Candidate
from pipeline.models.blip.captioner import BlipCaptioner
from pipeline.models.blip.vision import VisionTower
from pipeline.models.clip.loader import load_clip
from pipeline.models.clip.ranker import ClipRanker
from pipeline.models.clip.towers import image_encoder
from pipeline.models.fp8 import quantise, require_fp8
from pipeline.models.transformers_loader import load_model
from pipeline.models.weights import Weights, captioner_weights, ranker_weights
from schemas.config import CaptionConfig
from schemas.errors import CapfiltError
from schemas.pretrain import PerformanceConfig

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a machine with a GPU test what one without it does."""
    for module in ("pipeline.models.blip.captioner", "pipeline.models.clip.ranker", "jobs.bench.engines.fp8"):
        monkeypatch.setattr(f"{module}.worker_device", lambda: CPU)


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the models run in float8 here, which is exact and slow, as if this CPU were a GPU for it."""
    for module in ("pipeline.models.blip.captioner", "pipeline.models.clip.ranker"):
        monkeypatch.setattr(f"{module}.require_fp8", lambda *_: None)


@pytest.fixture(scope="module")
def captioner_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_captioner(tmp_path_factory.mktemp("captioner"))


@pytest.fixture(scope="module")
def ranker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ranker(tmp_path_factory.mktemp("ranker"))


def captioner(folder: Path, precision: str) -> BlipCaptioner:
    config = CaptionConfig(model=str(folder), precision=precision)
    return BlipCaptioner(config, captioner_weights(config), 7)


def ranker(folder: Path, precision: str) -> ClipRanker:
    return ClipRanker(ranker_weights(f"local-dir:{folder}", ""), precision)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()


# -- refusals ------------------------------------------------------------------------------------------------


def test_a_cpu_is_refused_before_any_weight_is_read() -> None:
    nowhere = Weights(kind="captioner", name="x", revision="", path="nowhere", digest="", files={})
    with pytest.raises(CapfiltError) as caption_error:
        BlipCaptioner(CaptionConfig(precision="fp8"), nowhere, 0)
    with pytest.raises(CapfiltError) as rank_error:
        ClipRanker(nowhere, "fp8")
    for stage, error in (("caption", caption_error), ("rank", rank_error)):
        message = str(error.value)
        assert f'{stage}.precision = "fp8"' in message and platform.node() in message
        assert f"cluster.{stage}.gpus" in message and '"auto"' in message


@pytest.mark.parametrize(
    ("capability", "is_installed", "words"),
    [
        ((8, 0), True, ("A100", "8.0", "8.9", 'set "bf16"')),
        ((8, 6), True, ("8.6",)),
        ((9, 0), False, ("torchao", "pip install", "[fp8]", 'set "bf16"')),
        ((8, 9), True, ()),
        ((9, 0), True, ()),
    ],
)
def test_a_gpu_is_asked_for_its_capability_and_the_installation_for_torchao(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], is_installed: bool, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    if not is_installed:
        monkeypatch.setattr("pipeline.models.fp8.find_spec", lambda _: None)
    if not words:
        return require_fp8("rank", torch.device("cuda"))
    with pytest.raises(CapfiltError) as error:
        require_fp8("rank", torch.device("cuda"))
    for word in ('rank.precision = "fp8"', platform.node(), *words):
        assert word in str(error.value)


def test_an_image_tower_of_another_kind_is_refused(allowed: None, tmp_path: Path) -> None:
    file = save_ranker(tmp_path / "ranker") / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["vision_cfg"]["pool_type"] = "avg"
    file.write_text(json.dumps(config))
    ranker(file.parent, "bf16")
    with pytest.raises(CapfiltError, match=r'rank.precision = "fp8".*bf16'):
        ranker(file.parent, "fp8")


def test_training_has_no_fp8() -> None:
    with pytest.raises(ValidationError):
        PerformanceConfig(precision="fp8")


# -- what becomes float8 -------------------------------------------------------------------------------------


def lowered_names(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Return the parameters that are float8; all others must be what they were."""
    names = set()
    for name, parameter in model.named_parameters():
        if isinstance(parameter, Float8Tensor):
            names.add(name)
        else:
            assert torch.equal(parameter, before[name]), name
    assert len(names) < len(before) == len(dict(model.named_parameters()))
    return names


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_of_blip_the_four_layers_of_each_block_and_nothing_else(captioner_folder: Path) -> None:
    model = load_model(BlipForConditionalGeneration, captioner_folder, "caption.model").bfloat16()
    before = copied(model)
    quantise(VisionTower(model.vision_model).blocks)
    layers = ("self_attn.qkv", "self_attn.projection", "mlp.fc1", "mlp.fc2")
    assert lowered_names(model, before) == {
        f"vision_model.encoder.layers.{block}.{layer}.weight" for block in range(2) for layer in layers
    }


def test_of_clip_the_layers_of_the_image_towers_blocks_and_nothing_else(ranker_folder: Path) -> None:
    model = load_clip(ranker_weights(f"local-dir:{ranker_folder}", ""), "rank.model", "bf16")
    before = copied(model)
    tower = image_encoder(model)
    before_blocks = copied(tower.blocks)
    quantise(tower.blocks)
    # open_clip keeps query, key and value as one parameter, not as a layer: the tower's own layers have it.
    assert lowered_names(model, before) == {
        f"visual.transformer.resblocks.{block}.{layer}.weight"
        for block in range(2)
        for layer in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj")
    }
    layers = {"_out", "_mlp.c_fc", "_mlp.c_proj"}
    assert lowered_names(tower.blocks, before_blocks) == {
        *(f"0.{layer}.weight" for layer in layers | {"query_key_value"}),
        *(f"1.{layer}.weight" for layer in layers | {"query", "key_value"}),
    }


def test_a_shape_that_no_kernel_takes_stays() -> None:
    blocks = nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 32), nn.Linear(32, 32)).bfloat16()
    quantise(blocks)
    assert [isinstance(layer.weight, Float8Tensor) for layer in blocks] == [False, False, True]


def test_it_is_what_torchaos_own_call_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchao.quantization.quant_api, "_check_hardware_support", lambda _: None)
    quantised, reference = nn.Linear(64, 48).bfloat16(), nn.Linear(64, 48).bfloat16()
    reference.load_state_dict(quantised.state_dict())
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    quantise(quantised)
    quantize_(reference, config)
    assert torch.equal(quantised.weight.qdata.float(), reference.weight.qdata.float())
    assert torch.equal(quantised.weight.scale, reference.weight.scale) and quantised.weight.scale.shape == (
        48,
        1,
    )
    assert quantised.weight._quantization_type() == reference.weight._quantization_type()
    assert torch.equal(quantised(noise(5, 64)), reference(noise(5, 64)))


@torch.inference_mode()
def test_products_are_those_of_the_rounded_numbers_and_rounded_once() -> None:
    layer = nn.Linear(256, 64).bfloat16()
    exact, x_BLD = (
        linear(noise(3, 7, 256).float(), layer.weight.float(), layer.bias.float()),
        noise(3, 7, 256),
    )
    quantise(layer)
    rounded_BLD = Float8Tensor.from_hp(x_BLD, granularity=PerRow()).dequantize(torch.float32)
    expected = linear(rounded_BLD, layer.weight.dequantize(torch.float32), layer.bias.float())
    actual = layer(x_BLD)
    assert actual.dtype == torch.bfloat16 and torch.equal(actual, expected.bfloat16())
    # Three bits of mantissa on either side.
    assert 0.01 < float((actual - exact).std() / exact.std()) < 0.06


# -- the models ----------------------------------------------------------------------------------------------


def test_a_captioner_sees_in_float8_and_speaks_in_bfloat16(allowed: None, captioner_folder: Path) -> None:
    lowered, whole = captioner(captioner_folder, "fp8"), captioner(captioner_folder, "bf16")
    pixels_BCHW = noise(3, 3, *lowered.preprocess.size_px)
    seen_BPE, whole_BPE = lowered.vision(pixels_BCHW), whole.vision(pixels_BCHW)
    assert seen_BPE.dtype == torch.bfloat16
    assert 0.005 < float((seen_BPE - whole_BPE).std() / whole_BPE.std()) < 0.2
    quantise(whole.vision.blocks)
    assert torch.equal(seen_BPE, whole.vision(pixels_BCHW))
    images = [encoded(picture(index)) for index in range(3)]
    assert lowered(images, list("abc")) == whole(images, list("abc"))


def test_each_row_is_rounded_by_itself(allowed: None, captioner_folder: Path) -> None:
    tower = captioner(captioner_folder, "fp8").vision
    pixels_BCHW = noise(3, 3, 32, 32)
    # A bright picture must not coarsen its neighbours.
    pixels_BCHW[0] *= 50
    whole_BPE = tower(pixels_BCHW)
    for index in range(3):
        alone_BPE = tower(pixels_BCHW[index : index + 1])
        assert torch.allclose(alone_BPE, whole_BPE[index : index + 1], atol=0.02)


def test_one_graph_serves_every_block(
    allowed: None, captioner_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = captioner(captioner_folder, "fp8").vision
    pixels_BCHW = noise(2, 3, 32, 32)
    expected = tower(pixels_BCHW)
    torch._dynamo.reset()
    graphs, compile_ = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: compile_(f, backend=graphs, fullgraph=True, **k))
    compiled = VisionTower(tower.model, compiled_batch=2)
    assert torch.equal(compiled(pixels_BCHW), expected)
    assert graphs.frame_count == 1


def test_a_ranker_scores_nearly_the_same(allowed: None, ranker_folder: Path) -> None:
    images = [picture(seed) for seed in range(4)]
    scores = {name: score_images(ranker(ranker_folder, name), images, TEXTS) for name in ("bf16", "fp8")}
    differences = [
        abs(left.similarity - right.similarity)
        for row, other_row in zip(*scores.values(), strict=True)
        for left, right in zip(row, other_row, strict=True)
    ]
    assert 1e-5 < max(differences) < 0.05


# -- the benchmark -------------------------------------------------------------------------------------------


def test_the_benchmark_measures_what_float8_changes() -> None:
    figures = measure_fp8(24)
    assert (figures["device"], figures["is_emulated"], figures["captions"]) == ("cpu", True, 240)
    for kind in ("sampled_true", "kept_true"):
        assert figures[kind].keys() == {"fp32", "bf16", "fp8"}
    assert all(0.7 < share <= 1 for share in figures["sampled_true"].values())
    assert all(0.9 < share <= 1 for share in figures["kept_true"].values())
    # Scores spread by 0.1 within an image; float8 rounds 16 times as coarsely as bfloat16, in the blocks.
    assert 0.05 < figures["score_spread"] < 0.3
    bf16, fp8 = figures["bf16_from_fp32"], figures["fp8_from_fp32"]
    assert 1e-5 < bf16["score_mean"] < fp8["score_mean"] / 2 < 0.0025
    assert figures["fp8_from_bf16"]["score_mean"] > 0.0005 and fp8["score_max"] < 0.06
    for pair in (bf16, fp8, figures["fp8_from_bf16"]):
        assert pair["top_two"] <= 0.15 and pair["captions"] <= 0.15 and pair["own_top_two"] <= 0.4
    assert fp8["captions"] > 0


def results(captions: list[str], *scores: float) -> Results:
    texts = ["one", "two", "three", "web"]
    row = [
        Candidate(origin="web" if text == "web" else "synthetic", candidate=index, text=text, score=score)
        for index, (text, score) in enumerate(zip(texts, scores, strict=True))
    ]
    return Results(captions=[captions], scored=[row], own=[row[::-1]])


def test_changes_are_of_what_is_kept_and_not_of_its_order() -> None:
    old = results(["one", "two", "three"], 0.5, 0.4, 0.3, 0.1)
    swapped = changes(results(["one", "two", "four"], 0.4, 0.5, 0.3, 0.1), old)
    assert swapped["top_two"] == swapped["own_top_two"] == 0
    assert swapped["captions"] == pytest.approx(1 / 3)
    assert swapped["score_mean"] == pytest.approx(0.05) and swapped["score_max"] == pytest.approx(0.1)
    right = changes(results(["one", "two", "three"], 0.5, 0.4, 0.3, 0.6), old)
    assert right["top_two"] == right["own_top_two"] == 1 and right["captions"] == 0
