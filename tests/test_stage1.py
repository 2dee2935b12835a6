"""Stage 1: losses and gradients equal the definition's, in any micro-batches and on any ranks; who is trained."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from blip2_reference import Losses, Reference
from ranks import on_ranks
from tiny_models import IMAGE_PX
from tiny_training import tiny_config
from torch import Tensor
from trained import begun_stage

from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from training.blip2.stage1 import Stage1
from training.build import meta_stage
from training.distributed import World
from training.models.micro_batches import SampleKeys, padded_parts

pytestmark = pytest.mark.training

CAPTIONS = [
    "a red circle",
    "the dog on grass",
    "two cats near a tree , under the blue sky in the street",
    "photo",
    "a large white square",
    "the small black cat running",
    "car on street",
    "two red triangle and three green circle",
]
N = len(CAPTIONS)


def exact_config(tmp_path: Path, **overrides: Any) -> PretrainConfig:
    """Return a run without dropout, whose weights are large enough for everything to matter."""
    return tiny_config(tmp_path, tmp_path, qformer={"dropout": 0.0}, optim={"batch_size": N}, **overrides)


def exact_stage(config: PretrainConfig, world: World) -> Stage1:
    """Return a float64 model; the same on every rank."""
    stage = begun_stage(config, world)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in stage.trainable_named_parameters():
            if name != "temp" and parameter.numel() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    stage.visual_encoder.dtype = torch.float64
    stage.Qformer.dtype = torch.float64
    return stage.double()


def batch(rows: slice = slice(0, N), position: int = N) -> SimpleNamespace:
    pixels = torch.randint(0, 256, (N, 3, IMAGE_PX, IMAGE_PX), generator=torch.Generator().manual_seed(2))
    return SimpleNamespace(
        pixels_BCHW=pixels.to(torch.uint8)[rows],
        captions=CAPTIONS[rows],
        image_hashes=list(range(N))[rows],
        kept_captions=[[caption] for caption in CAPTIONS][rows],
        uids=[f"{index:032x}" for index in range(N)][rows],
        position=position,
    )


def gradients(stage: Stage1) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in stage.trainable_named_parameters()}


def one_rank(tmp_path: Path, micro_batch_size: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    stage = exact_stage(exact_config(tmp_path), World())
    losses = stage.training_step(batch(), micro_batch_size)
    return losses, gradients(stage)


def parts_of_two(world: World, tmp_path: Path) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Do this rank's half at once, and in two micro_batches."""
    stage = exact_stage(exact_config(tmp_path), world)
    size = N // world.size
    half = batch(slice(world.rank * size, (world.rank + 1) * size))
    results = []
    for micro_batch_size in (4, 2):
        stage.zero_grad()
        losses = stage.training_step(half, micro_batch_size)
        summed = gradients(stage)
        world.all_reduce_sum_(summed.values())
        results.append((losses, summed))
    return results


def reference(config: PretrainConfig, negatives: list[list[int]]) -> tuple[Losses, dict[str, Tensor]]:
    stage = exact_stage(config, World())
    state = stage.trainable_state()
    definition = Reference(state, config.qformer.heads, config.qformer.layers, stage.begin_id)
    texts = stage.tokenizer(CAPTIONS)
    losses = definition.losses(
        stage.visual_encoder(batch().pixels_BCHW), texts.ids_BL, texts.mask_BL, *negatives
    )
    losses.total.backward()
    return losses, {name: definition.p[name].grad for name in state}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stage1")


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], list[list[int]]]:
    """One rank, all at once: losses, gradients, and the negatives it drew."""
    stage = exact_stage(exact_config(folder), World())
    drawn: list[Any] = []
    global_batch = stage.global_batch
    stage.global_batch = lambda *arguments: drawn.append(global_batch(*arguments)) or drawn[0]
    losses = stage.training_step(batch(), N)
    negatives = [drawn[0].negatives.text_of_image_N.tolist(), drawn[0].negatives.image_of_text_N.tolist()]
    return losses, gradients(stage), negatives


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name] is not None, name
        assert (actual[name] - tensor).abs().max() <= tolerance * max(1, tensor.abs().max()), name


def test_losses_and_gradients_equal_the_definition(folder: Path, whole: tuple) -> None:
    losses, actual, negatives = whole
    expected, expected_gradients = reference(exact_config(folder), negatives)
    for name in ("itc", "itm", "itg"):
        assert losses[name].item() == pytest.approx(getattr(expected, name).item(), abs=1e-10), name
    assert losses["loss"].item() == pytest.approx(expected.total.item(), abs=1e-10)
    assert losses["itm_accuracy"].item() == pytest.approx(expected.itm_accuracy)
    assert losses["temperature"].item() == pytest.approx(0.07)
    assert_equal(actual, expected_gradients)
    assert all(gradient.abs().max() > 0 for gradient in actual.values())


@pytest.mark.parametrize("micro_batch_size", [4, 2, 3])
def test_accumulation_is_exact(folder: Path, whole: tuple, micro_batch_size: int) -> None:
    losses, actual = one_rank(folder, micro_batch_size)
    assert_equal(losses, whole[0])
    assert_equal(actual, whole[1])


def test_two_ranks_are_exact(folder: Path, whole: tuple) -> None:
    for results in on_ranks(2, parts_of_two, folder):
        for losses, actual in results:
            assert_equal(losses, whole[0])
            assert_equal(actual, whole[1])


def test_negatives_come_from_the_whole_batch(folder: Path, whole: tuple) -> None:
    halves = {index: index // (N // 2) for index in range(N)}
    _, _, (text_of_image, image_of_text) = whole
    assert all(own != other for own, other in enumerate(text_of_image))
    assert all(own != other for own, other in enumerate(image_of_text))
    assert any(halves[own] != halves[other] for own, other in enumerate(text_of_image))
    assert any(halves[own] != halves[other] for own, other in enumerate(image_of_text))


def test_texts_of_the_same_image_and_equal_texts_are_not_negatives(folder: Path) -> None:
    stage = exact_stage(exact_config(folder), World())
    batch_ = batch()
    batch_.captions = ["a red circle"] * 4 + ["a red dog"] * 2 + ["the cat", "the tree"]
    batch_.uids[6] = batch_.uids[0]
    # Two addresses of one image; and a text that another image has beside its own.
    batch_.image_hashes[7] = batch_.image_hashes[3]
    batch_.kept_captions = [[caption] for caption in batch_.captions]
    batch_.kept_captions[1] += ["the cat", "the tree"]
    for position in range(20):
        batch_.position = position
        with torch.no_grad():
            texts = stage.tokenizer(batch_.captions)
            keys = SampleKeys.of(
                batch_.uids, batch_.image_hashes, batch_.captions, batch_.kept_captions, texts.ids_BL
            )
            [micro_batch] = stage.micro_batches(batch_.pixels_BCHW, texts, position, N, [N])
            encoded = stage.encode(micro_batch)
            actual = stage.global_batch([(encoded.image_BQC, encoded.text_BC)], texts, keys, position, [N])
        texts_of, images_of = (
            actual.negatives.text_of_image_N.tolist(),
            actual.negatives.image_of_text_N.tolist(),
        )
        for drawn in (texts_of, images_of):
            for own, other in enumerate(drawn):
                assert batch_.captions[own] != batch_.captions[other]
                assert {own, other} not in ({0, 6}, {3, 7})
        # The captions "the cat" and "the tree" belong to image 1; its own text may be wrong for their images.
        assert texts_of[1] not in (6, 7) and 1 not in (images_of[6], images_of[7])
        # Among the negatives of "a red circle" the three of the same words would be frequent.
        assert 0.05 < actual.negatives.false_share < 0.9


def test_dropout_is_repeated_and_depends_on_the_step_alone(folder: Path) -> None:
    config = tiny_config(folder, folder, qformer={"dropout": 0.3})
    stage = exact_stage(config, World())
    stage.train()
    texts = stage.tokenizer(CAPTIONS)
    micro_batches = list(stage.micro_batches(batch().pixels_BCHW, texts, 8, 4, [N]))
    with torch.no_grad():
        first = [stage.encode(micro_batch) for micro_batch in micro_batches]
    torch.rand(3)
    again = [stage.encode(micro_batch) for micro_batch in micro_batches]
    for earlier, other in zip(first, again, strict=True):
        assert torch.equal(earlier.image_BQC, other.image_BQC) and torch.equal(earlier.text_BC, other.text_BC)
    results = []
    for position in (8, 16, 8):
        stage.zero_grad()
        losses = stage.training_step(batch(position=position), 4)
        results.append((losses["loss"].item(), gradients(stage)["query_tokens"].clone()))
    assert results[0][0] == results[2][0] and torch.equal(results[0][1], results[2][1])
    assert results[0][0] != results[1][0]


@pytest.mark.slow
def test_compiled_dropout_is_repeated(folder: Path) -> None:
    """Code compiled without gradient and code compiled with it are two graphs: both must draw the same masks."""
    stage = (
        exact_stage(tiny_config(folder, folder, qformer={"dropout": 0.3, "layers": 1}), World())
        .float()
        .train()
    )
    stage.visual_encoder.dtype = stage.Qformer.dtype = torch.float32
    (micro_batch,) = stage.micro_batches(batch().pixels_BCHW, stage.tokenizer(CAPTIONS), 8, N, [N])
    with torch.no_grad():
        eager = stage.encode(micro_batch)
        for block in stage.Qformer.bert.encoder.layer:
            block.compile(dynamic=False)
        first = stage.encode(micro_batch)
    again = stage.encode(micro_batch)
    assert torch.equal(first.image_BQC, again.image_BQC) and torch.equal(first.text_BC, again.text_BC)
    # It was compiled: inductor's masks are not those of eager dropout.
    assert not torch.allclose(first.image_BQC, eager.image_BQC, atol=0.01)


@pytest.mark.parametrize("value", [0.0, -0.02])
def test_a_temperature_that_would_cross_zero_stays_above_it(folder: Path, value: float) -> None:
    stage = exact_stage(exact_config(folder), World())
    with torch.no_grad():
        stage.temp.fill_(value)
    losses = stage.training_step(batch(), 4)
    assert losses["temperature"].item() == stage.temp.item() == 0.001
    assert all(loss.isfinite() for loss in losses.values())
    assert all(gradient.isfinite().all() for gradient in gradients(stage).values())


def test_weights_of_the_losses(folder: Path, whole: tuple) -> None:
    config = exact_config(folder, objective={"itc": 0.5, "itm": 0.0, "itg": 2.0})
    stage = exact_stage(config, World())
    losses = stage.training_step(batch(), 4)
    assert losses["loss"].item() == pytest.approx((0.5 * losses["itc"] + 2 * losses["itg"]).item())
    assert gradients(stage)["itm_head.weight"].abs().max() == 0
    ratio = gradients(stage)["text_proj.weight"] / whole[1]["text_proj.weight"]
    assert torch.allclose(ratio, torch.tensor(0.5, dtype=torch.float64))


def test_only_the_qformer_is_trained(folder: Path) -> None:
    stage = begun_stage(exact_config(folder))
    before = {name: value.clone() for name, value in stage.visual_encoder.state_dict().items()}
    stage.train()
    assert not any(module.training for module in stage.visual_encoder.modules())
    assert stage.Qformer.training
    stage.training_step(batch(), 4)
    names = [name for name, _ in stage.trainable_named_parameters()]
    assert not any(name.startswith("visual_encoder") for name in names)
    assert all(parameter.grad is None for parameter in stage.visual_encoder.parameters())
    assert all(torch.equal(before[name], value) for name, value in stage.visual_encoder.state_dict().items())
    assert stage.training_step(batch(), 4)["loss"].dtype == torch.float32


def test_state_is_strict(folder: Path) -> None:
    stage = begun_stage(exact_config(folder))
    state = {name: value.clone() + 1 for name, value in stage.trainable_state().items()}
    stage.load_trainable_state(state)
    assert all(torch.equal(state[name], value) for name, value in stage.trainable_state().items())
    short = {name: value for name, value in state.items() if name != "temp"}
    for wrong, name in (
        (short, "1 missing, temp first"),
        (state | {"opt_proj.weight": torch.zeros(2, 2)}, "opt_proj.weight"),
        (state | {"itm_head.bias": torch.zeros(3)}, "itm_head.bias"),
    ):
        with pytest.raises(CapfiltError, match=name):
            stage.load_trainable_state({key: value * 0 for key, value in wrong.items()})
    assert all(torch.equal(state[name], value) for name, value in stage.trainable_state().items())


def test_parts_cover_all_in_few_sizes() -> None:
    for count in range(70):
        parts = list(padded_parts(count, 16))
        assert {part.stop - part.start for part in parts} <= {16, 4}
        covered = [index for part in parts for index in range(part.start, part.stop)]
        assert covered[:count] == list(range(count)) and len(covered) - count < 4


def full_size(model: str, pretrained: str) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "run": {"name": "full", "stage": 1},
            "data": {"corpus": [{"path": "nowhere"}]},
            "vision": {"model": model, "pretrained": pretrained},
            "optim": {"batch_size": 1680},
        }
    )


@pytest.mark.parametrize(
    ("model", "pretrained", "parameters", "gflops"),
    [
        ("EVA01-g-14", "laion400m_s11b_b41k", 186_705_470, 701.1),
        ("ViT-L-14", "openai", 183_165_758, 330.2),
    ],
)
def test_full_size_counts(model: str, pretrained: str, parameters: int, gflops: float) -> None:
    stage = meta_stage(full_size(model, pretrained))
    assert sum(parameter.numel() for _, parameter in stage.trainable_named_parameters()) == parameters
    assert stage.flops_per_sample() / 1e9 == pytest.approx(gflops, abs=0.1)
    assert stage.visual_encoder.num_tokens == 257


def test_missing_or_wrong_weights_are_named(tmp_path: Path, folder: Path) -> None:
    def refused(message: str, **overrides: Any) -> None:
        with pytest.raises(CapfiltError, match=message):
            begun_stage(tiny_config(folder, folder, **overrides))

    refused("qformer.weights = .*no such folder", qformer={"weights": str(tmp_path / "nothing")})
    refused("config.json is missing", qformer={"weights": str(tmp_path)})
    refused("does not fit .qformer.", qformer={"width": 64})
    refused("set qformer.vocab_size = 43", qformer={"vocab_size": 30523})
    refused("set data.image_size_px = 32", data={"image_size_px": 224})
    refused("vision.drop_blocks = 2: the tower has 2", vision={"drop_blocks": 2})
    refused("no checkpoint there", run={"init_from": str(tmp_path)})
