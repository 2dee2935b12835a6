"""BLIP's step: losses and updates equal the definition's over fifty steps, in any micro-batches and on any ranks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from blip_reference import Reference
from pydantic import ValidationError
from ranks import on_ranks
from tiny_models import IMAGE_PX
from tiny_training import tiny_blip_config
from torch import Tensor
from trained import pictures

from schemas.pretrain import BlipKind, PretrainConfig
from tests.test_blip_model import normalised, spread_stage
from training.blip.global_batch import alpha_at
from training.blip.momentum import EmbeddingQueue
from training.blip.stage import BlipStage
from training.blip.vision import DropPath
from training.convert.export_blip import blip_config
from training.convert.key_map import blip_to_hf
from training.distributed import World
from training.trainer.steps.optim import Schedule, fill_preset, make_optimizer

pytestmark = pytest.mark.training

STEPS, N, GROUP, EPOCH_STEPS = 50, 8, 4, 20
CAPTIONS = [
    "a red circle",
    "the dog on grass",
    "two cats near a tree , under the blue sky",
    "photo",
    "a large white square",
    "the small black cat running",
    "car on street",
    "two red triangle and three green circle",
    "a dog",
    "a dog",
    "the sky",
]
IMAGES = 20


def exact_config(folder: Path, kind: BlipKind = "blip-pretrain", **overrides: Any) -> PretrainConfig:
    """Return a run without dropout, whose momentum encoders move enough to be seen."""
    optim = {"batch_size": N, "epoch_steps": EPOCH_STEPS, "peak_lr": 1e-3}
    config = tiny_blip_config(folder, folder, kind, optim=optim, **overrides)
    text = config.blip.text.model_copy(update={"dropout": 0.0})
    blip = config.blip.model_copy(update={"text": text, "momentum": 0.9, "negatives_of": GROUP})
    return fill_preset(config.model_copy(update={"blip": blip}), 100)


def exact_stage(config: PretrainConfig, world: World) -> BlipStage:
    stage = spread_stage(config, world).double()
    stage.visual_encoder.dtype = torch.float64
    stage.momentum.visual_encoder.dtype = stage.momentum.text_encoder.dtype = torch.float64
    stage.text_encoder.dtype = torch.float64
    if stage.decodes_text:
        stage.text_decoder.bert.dtype = torch.float64
    stage.begin()
    return stage.train()


def batch(step: int, rows: slice = slice(0, N)) -> SimpleNamespace:
    """Return a step's samples: twenty images in turn, so that the queue holds images of the step."""
    numbers = [(step * N + row) * 3 % IMAGES for row in range(N)]
    # A batch with one image twice, and often one with equal captions.
    numbers[1] = numbers[0] if step % 5 == 4 else numbers[1]
    return SimpleNamespace(
        pixels_BCHW=pictures(IMAGES, IMAGE_PX)[numbers][rows],
        captions=[CAPTIONS[number % len(CAPTIONS)] for number in numbers][rows],
        uids=[f"{number:032x}" for number in numbers][rows],
        image_hashes=numbers[rows],
        kept_captions=[[CAPTIONS[number % len(CAPTIONS)]] for number in numbers][rows],
        position=(step + 1) * N,
    )


def trained(
    world: World,
    folder: Path,
    micro_batch_size: int,
    steps: int = STEPS,
    kind: BlipKind = "blip-pretrain",
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Train this rank's part of fifty steps; return all losses and the last parameters."""
    config = exact_config(folder, kind)
    stage = exact_stage(config, world)
    parameters = list(stage.trainable_named_parameters())
    optimizer, size = make_optimizer(parameters, config.optim), N // world.size
    losses = []
    for step in range(steps):
        values = stage.training_step(
            batch(step, slice(world.rank * size, (world.rank + 1) * size)), micro_batch_size
        )
        world.all_reduce_sum_([parameter.grad for _, parameter in parameters])
        optimizer.step()
        optimizer.zero_grad()
        losses.append({name: value.item() for name, value in values.items()})
    return losses, stage.trainable_state() | {
        name: tensor.clone() for name, tensor in stage.auxiliary_state().items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blip")


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[list[dict[str, float]], Reference]:
    return defined(folder)


def defined(
    folder: Path, kind: BlipKind = "blip-pretrain", steps: int = STEPS
) -> tuple[list[dict[str, float]], Reference]:
    """Return the losses of each step by the definition, and what it ends with."""
    config = exact_config(folder, kind)
    stage = exact_stage(config, World())
    shape = config.blip
    mapped, unmapped = blip_to_hf(stage.trainable_state())
    queue = {name: tensor.clone() for name, tensor in stage.queue.state_dict().items()}
    reference = Reference(
        blip_config(stage), mapped | unmapped, stage.begin_id, queue, momentum=shape.momentum, group=GROUP,
        alpha=shape.alpha, alpha_epochs=shape.alpha_epochs, epoch_steps=EPOCH_STEPS, seed=config.run.seed,
        filter=kind == "blip-filter",
    )  # fmt: skip
    optimizer = torch.optim.AdamW(
        reference.parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05
    )
    losses = []
    for step in range(steps):
        samples = batch(step)
        texts = stage.tokenize(samples.captions)
        values = reference.step(
            normalised(samples.pixels_BCHW, stage), texts.ids_BL, texts.mask_BL.long(), samples.uids, step,
            samples.position,
        )  # fmt: skip
        optimizer.step()
        losses.append({name: value.item() for name, value in values.items()})
    return losses, reference


def test_momentum_targets_begin_at_once_where_no_epoch_is_given(folder: Path) -> None:
    config = exact_config(folder)
    at_once = config.blip.model_copy(update={"alpha_epochs": 0.0})
    size = config.optim.batch_size
    assert [alpha_at(config, at_once, size * step) for step in (1, 2)] == [at_once.alpha] * 2
    assert alpha_at(config, config.blip, size) == 0 < alpha_at(config, config.blip, 2 * size)


def assert_as_defined(
    actual: tuple[list[dict[str, float]], dict[str, Tensor]],
    expected: tuple[list[dict[str, float]], Reference],
) -> None:
    for step, (losses, wanted) in enumerate(zip(actual[0], expected[0], strict=True)):
        for name, value in wanted.items():
            assert losses[name] == pytest.approx(value, abs=1e-8), (step, name)
    state, reference = actual[1], expected[1]
    queued = torch.stack([embedding for embedding, _ in reference.images])
    pointer = int(state["queue.pointer"])
    assert torch.allclose(state["queue.image_KC"].roll(-pointer, 0), queued, atol=1e-8)
    assert state["queue.id_K"].roll(-pointer).tolist() == [identity for _, identity in reference.images]
    slow = reference.twins["vision_model"].state_dict()
    own = {
        n.removeprefix("momentum."): t for n, t in state.items() if n.startswith("momentum.visual_encoder")
    }
    for name, tensor in blip_to_hf(own)[0].items():
        assert torch.allclose(slow[name.removeprefix("vision_model.")], tensor, atol=1e-8), name
    assert state["temp"].item() == pytest.approx(reference.temp.item(), abs=1e-8)


def test_fifty_steps_equal_the_definition(folder: Path, expected: tuple) -> None:
    actual = trained(World(), folder, N)
    assert_as_defined(actual, expected)
    # It learns, and alpha has risen to its end: nothing stood still.
    assert actual[0][-1]["loss"] < actual[0][0]["loss"] - 1


def test_micro_batches_are_exact(folder: Path, expected: tuple) -> None:
    losses, _ = trained(World(), folder, 3, steps=8)
    for step, values in enumerate(losses):
        assert {name: values[name] for name in expected[0][step]} == pytest.approx(
            expected[0][step], abs=1e-8
        )


def test_two_ranks_equal_the_definition(folder: Path, expected: tuple) -> None:
    for actual in on_ranks(2, trained, folder, N // 2):
        assert_as_defined(actual, expected)


def test_a_filter_equals_the_definition_on_two_ranks(folder: Path) -> None:
    # Its negatives are drawn by the online encoders' similarities alone, where pretraining's are not.
    expected = defined(folder, "blip-filter", steps=25)
    for actual in on_ranks(2, trained, folder, 3, 25, "blip-filter"):
        assert_as_defined(actual, expected)
    assert expected[0][0].keys() == {"itc", "itm"}


def test_the_prompt_stays_out_of_the_loss(folder: Path) -> None:
    config = tiny_blip_config(folder, folder, "blip-captioner")
    prompted = config.model_copy(update={"blip": config.blip.model_copy(update={"prompt": "a picture of "})})
    stage = spread_stage(prompted)
    texts = stage.tokenize(["dog", "red cat"])
    words = stage.tokenizer.tokenizer.convert_ids_to_tokens
    assert words(texts.ids_BL[0, :6].tolist()) == ["[CLS]", "a", "picture", "of", "dog", "[SEP]"]
    labels = stage.labels(texts).tolist()
    assert [words(label) for label in labels[1] if label >= 0] == ["red", "cat", "[SEP]"]
    assert labels[0][3] == texts.ids_BL[0, 4]
    losses = stage.training_step(
        SimpleNamespace(
            pixels_BCHW=pictures(2, IMAGE_PX),
            captions=["dog", "red cat"],
            uids=["0", "1"],
            image_hashes=[0, 1],
            kept_captions=[["dog"], ["red cat"]],
            position=8,
        ),
        1,
    )
    assert losses.keys() == {"loss", "lm"}


def test_embeddings_that_are_not_finite_stay_out_of_the_queue() -> None:
    queue = EmbeddingQueue(4, 2)
    queue.push(torch.ones(4, 2), torch.ones(4, 2), torch.arange(4))
    images, texts = torch.full((3, 2), 2.0), torch.full((3, 2), 3.0)
    images[0, 1], texts[2, 0] = torch.nan, torch.inf
    queue.push(images, texts, torch.arange(10, 13))
    # The sample in the middle alone is whole; the pointer has passed all three.
    assert queue.image_KC.tolist() == [[1, 1], [2, 2], [1, 1], [1, 1]]
    assert queue.text_KC.tolist() == [[1, 1], [3, 3], [1, 1], [1, 1]]
    assert queue.id_K.tolist() == [0, 11, 2, 3] and queue.pointer == 3


def test_the_queue_replaces_its_oldest_embeddings() -> None:
    queue = EmbeddingQueue(6, 2)
    queue.reset(1)
    first = queue.image_KC.clone()
    assert torch.allclose(first.norm(dim=1), torch.ones(6))
    for step in range(4):
        ids = torch.arange(2) + 2 * step
        queue.push(torch.full((2, 2), float(step)), torch.full((2, 2), -float(step)), ids)
    assert queue.id_K.tolist() == [6, 7, 2, 3, 4, 5] and queue.pointer.item() == 2
    assert queue.image_KC[:, 0].tolist() == [3.0, 3.0, 1.0, 1.0, 2.0, 2.0]
    queue.reset(1)
    assert torch.equal(queue.image_KC, first)


def test_rates_fall_by_a_factor_an_epoch(folder: Path) -> None:
    config = tiny_blip_config(
        folder,
        folder,
        optim={
            "steps": None, "warmup_steps": 10, "schedule": "epochs", "epoch_decay": 0.5, "peak_lr": 3e-4,
        },
    )  # fmt: skip
    optim = fill_preset(config, 170).optim
    assert (optim.epoch_steps, optim.steps, optim.min_lr, optim.betas) == (21, 420, 1e-6, (0.9, 0.999))
    schedule = Schedule.of(optim)
    assert schedule.lr(0) == 1e-6 and schedule.lr(10) == schedule.lr(20) == 3e-4
    assert schedule.lr(21) == schedule.lr(41) == 1.5e-4 and schedule.lr(42) == 0.75e-4
    assert schedule.lr(419) == 1e-6


def test_weight_decay_reaches_every_parameter(folder: Path) -> None:
    stage = spread_stage(exact_config(folder))
    parameters = list(stage.trainable_named_parameters())
    (group,) = make_optimizer(parameters, stage.config.optim).param_groups
    assert group["weight_decay"] == 0.05 and len(group["params"]) == len(parameters)


def test_bfloat16_computes_the_same_losses(folder: Path) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        config = exact_config(folder, performance={"precision": precision})
        stage = spread_stage(config).train()
        losses.append({name: value.item() for name, value in stage.training_step(batch(0), 4).items()})
        assert all(
            parameter.grad.dtype == torch.float32 for _, parameter in stage.trainable_named_parameters()
        )
    for name in ("itc", "lm", "loss"):
        assert losses[1][name] == pytest.approx(losses[0][name], rel=0.03), name
    assert losses[1] != losses[0]


def test_drop_path_keeps_the_mean() -> None:
    drop = DropPath(0.25)
    torch.manual_seed(0)
    dropped = drop(torch.ones(4000, 2, 3))
    kept = dropped[:, 0, 0] > 0
    assert torch.equal(dropped[kept], torch.full_like(dropped[kept], 1 / 0.75)) and not dropped[~kept].any()
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.03)
    assert torch.equal(drop.eval()(dropped), dropped)


def test_a_sample_without_another_one_to_compare_with_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"must be at least 2 and divide optim\.batch_size \(8\)"):
        tiny_blip_config(tmp_path, "nowhere", blip={"negatives_of": 1})
