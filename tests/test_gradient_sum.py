"""Sums of gradients that begin during the backward passes: the same numbers, earlier; on 2 and 3 ranks."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor

from schemas.pretrain import PretrainConfig
from tests import test_stage1, test_stage2
from tests.small_stage import BATCH_SIZE, Kept, SmallStage, batches, config, make_loop
from tests.test_uneven_ranks import stage_of
from training.distributed import World, rank_rows
from training.trainer.steps.gradient_sum import OverlappedSum, make_gradient_sum
from training.trainer.steps.optim import fill_preset

pytestmark = pytest.mark.training

METHODS = ("stage 1", "stage 2, spread", "blip-pretrain", "blip-filter")
# So that a model of a few thousand parameters has tens of buckets.
BUCKET_ELEMENTS = 2000


def sums(world: World, folder: Path) -> dict[str, dict[str, object]]:
    """Do two steps of each method and kind; return how far the sums are from the plain ones, and when they began."""
    results = {}
    # On three ranks the arithmetic is another one, and the same for all methods.
    for method in METHODS if world.size == 2 else METHODS[:1]:
        stage, batch, size = stage_of(method, world, folder)
        parameters = list(stage.trainable_named_parameters())
        part = batch(rank_rows(size, world.rank, world.size))

        def step(
            stage: torch.nn.Module = stage, part: object = part, parameters: list = parameters
        ) -> list[Tensor]:
            for _, parameter in parameters:
                parameter.grad = None
            stage.training_step(part, 2)
            return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for _, p in parameters]

        # BLIP's queue and momentum encoders change with each step: they are put back.
        kept = {name: tensor.clone() for name, tensor in stage.auxiliary_state().items()}
        plain = step()
        world.all_reduce_sum_(plain)
        found: dict[str, object] = {}
        for name, dtype in (("exact", None), ("bf16", torch.bfloat16)):
            overlapped = OverlappedSum(world, parameters, dtype, BUCKET_ELEMENTS)
            stage.begin_last_passes = overlapped.begin_last_passes
            under_way: list[int] = []
            hooks = [
                parameter.register_post_accumulate_grad_hook(
                    lambda _, seen=under_way, overlapped=overlapped: seen.append(len(overlapped.under_way))
                )
                for _, parameter in parameters
            ]
            distances = []
            for _ in range(2):
                under_way.clear()
                stage.load_auxiliary_state(kept)
                step()
                summed = overlapped.finish()
                largest = max(tensor.abs().max().item() for tensor in plain)
                differences = [(a - b).abs().max().item() for a, b in zip(summed, plain, strict=True)]
                distances.append(max(differences) / largest)
            found[name] = (distances, list(under_way), len(overlapped.buckets))
            for hook in hooks:
                hook.remove()
        results[method] = found
    return results


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all models of the methods: made once, before there are ranks."""
    folder = tmp_path_factory.mktemp("sums")
    for family in ("opt", "t5"):
        test_stage2.exact_config(folder, family)
    return folder


@pytest.mark.parametrize("size", [2, 3])
def test_overlapped_sums_are_the_plain_ones_and_begin_before_the_end(models: Path, size: int) -> None:
    for results in on_ranks(size, sums, models):
        for method, found in results.items():
            distances, under_way, num_buckets = found["exact"]
            # Two numbers have one sum; three are added in another order.
            assert max(distances) <= (0 if size == 2 else 1e-14), method
            # Each arrival's count of sums under way: some before the last gradient has arrived, none twice.
            assert under_way == sorted(under_way) and under_way[0] == 0, method
            assert num_buckets >= 5 and under_way[-2] >= num_buckets // 2, (method, under_way, num_buckets)
            assert under_way[-1] == num_buckets, method
            rounded, _, _ = found["bf16"]
            # bfloat16 has 8 bits: each of the parts, and each of the sums, is rounded by at most 2^-9 of itself.
            assert 0 < max(rounded) < 2 * size * 2**-9, method


def trained(world: World, output: Path) -> dict[str, object]:
    """Train by each kind of sum, and once more with a stop in the middle."""
    results: dict[str, object] = {}
    for name, kind, stop_after in (
        ("after", "after", 99),
        ("overlapped", "overlapped", 99),
        ("bf16", "overlapped-bf16", 99),
        ("parts", "overlapped", 5),
        ("parts", "overlapped", 99),
    ):
        settings = config(output / name, performance={"gradient_sum": kind, "micro_batch_size": 1})
        stage = SmallStage(explode_at={4}, world_size=world.size)
        steps = iter(range(1, 99))
        loop = make_loop(
            settings,
            stage,
            world=world,
            sinks=[Kept()] if world.rank == 0 else [],
            stop_asked=lambda steps=steps, last=stop_after: next(steps) >= last,
        )
        if record := world.broadcast_object(lambda loop=loop: loop.checkpoints.newest_good(print)):
            loop.resume(loop.checkpoints.read(record), record)
        loop.run(batches(loop.samples, world.rank, world.size))
        results[name] = {key: tensor.clone() for key, tensor in stage.trainable_state().items()}
    return results


@pytest.mark.parametrize("size", [2, 3])
def test_a_training_and_its_resume_are_equal(tmp_path: Path, size: int) -> None:
    first, *others = on_ranks(size, trained, tmp_path)
    for results in others:
        for name, weights in results.items():
            assert all(torch.equal(first[name][key], tensor) for key, tensor in weights.items()), name
    for key, tensor in first["overlapped"].items():
        assert torch.equal(first["parts"][key], tensor), key
        if size == 2:
            assert torch.equal(first["after"][key], tensor), key
        assert (first["bf16"][key] - tensor).abs().max() < 0.05
    assert not all(torch.equal(first["bf16"][key], tensor) for key, tensor in first["after"].items())


def encoded(world: World, folder: Path, output: Path) -> dict[str, tuple[list[float], list[int], int]]:
    """Train both stages by both kinds of sum; return losses, the sums under way at each encoding, and the buckets."""
    results = {}
    for method, stage_tests in (("stage 1", test_stage1), ("stage 2", test_stage2)):
        for kind in ("after", "overlapped"):
            made = stage_tests.exact_config(folder, *(["opt"] if method == "stage 2" else []))
            changes = made.model_dump(mode="json")
            changes["optim"]["steps"] = 4
            changes["performance"] |= {"gradient_sum": kind, "micro_batch_size": 2}
            changes["run"]["output"] = str(output / method / kind)
            settings = fill_preset(PretrainConfig.model_validate(changes), None)
            stage, sink, under_way = stage_tests.exact_stage(settings, world), Kept(), []
            rows = rank_rows(stage_tests.N, world.rank, world.size)
            loop = make_loop(settings, stage, world=world, sinks=[sink])
            stage.visual_encoder.register_forward_hook(
                lambda *_, loop=loop, seen=under_way: seen.append(
                    len(getattr(loop.gradient_sum, "under_way", ()))
                )
            )
            loop.run(_batches(stage_tests, rows))
            buckets = getattr(loop.gradient_sum, "buckets", ())
            results[f"{method} {kind}"] = (sink.of("loss"), under_way, len(buckets))
    return results


def _batches(stage_tests: Any, rows: slice) -> Iterator[Any]:
    for step in count(1):
        batch = stage_tests.batch(rows)
        # Other images in each step.
        batch.pixels_BCHW = batch.pixels_BCHW.roll(step, dims=3)
        batch.position = step * stage_tests.N
        yield batch


def test_the_next_images_are_encoded_while_sums_are_under_way(models: Path, tmp_path: Path) -> None:
    for results in on_ranks(2, encoded, models, tmp_path):
        for method in ("stage 1", "stage 2"):
            losses, seen, num_buckets = results[f"{method} overlapped"]
            expected, without, _ = results[f"{method} after"]
            assert losses == expected and len(set(losses)) == 4
            # Each image once; from the second step on those of the next step while all sums are under way.
            assert len(seen) == len(without) and set(without) == {0} and num_buckets > 0
            per_step = len(seen) // 4
            assert seen == [0] * 2 * per_step + [num_buckets] * 2 * per_step


def changed(world: World) -> str:
    """Do two steps, the second of which gives a gradient that the first one did not."""
    stage = SmallStage(world_size=world.size)
    overlapped = make_gradient_sum("overlapped", world, list(stage.trainable_named_parameters()))
    stage.begin_last_passes = overlapped.begin_last_passes
    stream = batches(0, world.rank, world.size)
    stage.training_step(next(stream), BATCH_SIZE)
    overlapped.finish()
    stage.training_step(next(stream), BATCH_SIZE)
    stage.unused.sum().backward()
    with pytest.raises(AssertionError) as refused:
        overlapped.finish()
    return str(refused.value)


def test_a_step_that_gives_other_gradients_is_a_fault() -> None:
    messages = on_ranks(2, changed)
    assert messages == ["the last backward passes gave other gradients than in the first step"] * 2
