"""Batches that do not divide by the ranks: the same losses and gradients, and every recipe on 1 to 64 ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn

from pipeline.config import load_config
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from tests import test_blip_training, test_stage1, test_stage2
from tests.corpora import make_corpus
from tests.tiny_training import tiny_config
from training.data.loader import TrainingData
from training.data.snapshot import take_snapshot
from training.distributed import World, rank_rows
from training.trainer.estimate import plan

RECIPES = sorted((Path(__file__).parent.parent / "jobs" / "recipes").glob("*.toml"))
TRAININGS = [path for path in RECIPES if "\n[run]\n" in path.read_text()]

Step = tuple[dict[str, float], dict[str, Tensor]]


def stage_of(method: str, world: World, folder: Path) -> tuple[nn.Module, Any, int]:
    """Return a model in float64, what gives some rows of its batch, and the batch's size."""
    if method == "stage 1":
        config = test_stage1.exact_config(folder)
        return test_stage1.exact_stage(config, world), test_stage1.batch, test_stage1.N
    if method == "stage 2":
        config = test_stage2.exact_config(folder, "opt")
        return test_stage2.exact_stage(config, world), test_stage2.batch, test_stage2.N
    if method == "stage 2, spread":
        config = test_stage2.exact_config(folder, "t5", performance={"shard_language": True})
        return test_stage2.exact_stage(config, world, double=False), test_stage2.batch, test_stage2.N
    config = test_blip_training.exact_config(folder, method)
    stage = test_blip_training.spread_stage(config, world).double()
    for part in stage.modules():
        if isinstance(getattr(part, "dtype", None), torch.dtype):
            part.dtype = torch.float64
    stage.begin()
    return stage, lambda rows: test_blip_training.batch(3, rows), test_blip_training.N


METHODS = {
    "stage 1": 1e-9,
    "stage 2": 1e-9,
    # T5 in float32: spread over the ranks, its micro-batches are as many on each.
    "stage 2, spread": 1e-4,
    "blip-pretrain": 1e-9,
    "blip-captioner": 1e-9,
    "blip-filter": 1e-9,
}


def steps(world: World, folder: Path) -> dict[str, Step]:
    """Do a step of each training, in micro-batches of two images; return losses and the summed gradients."""
    results = {}
    for method in METHODS:
        stage, batch, size = stage_of(method, world, folder)
        losses = stage.training_step(batch(rank_rows(size, world.rank, world.size)), 2)
        gradients = {name: parameter.grad for name, parameter in stage.trainable_named_parameters()}
        world.all_reduce_sum_(gradients.values())
        results[method] = ({name: value.item() for name, value in losses.items()}, gradients)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uneven")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Step]:
    return steps(World(), folder)


@pytest.mark.training
@pytest.mark.parametrize("size", [3, 5])
def test_uneven_parts_are_exact(folder: Path, alone: dict[str, Step], size: int) -> None:
    for results in on_ranks(size, steps, folder):
        for method, tolerance in METHODS.items():
            (losses, gradients), (expected, wanted) = results[method], alone[method]
            assert losses == pytest.approx(expected, rel=tolerance), method
            for name, tensor in wanted.items():
                difference = (gradients[name] - tensor).abs().max()
                assert difference <= tolerance * max(1, tensor.abs().max()), (method, name)


@pytest.mark.parametrize("recipe", TRAININGS, ids=lambda path: path.stem)
def test_every_recipe_starts_on_1_to_64_ranks(recipe: Path) -> None:
    """The sampler's part and the plan's are of one function."""
    batch_size = load_config(recipe, kind=PretrainConfig).optim.batch_size
    for size in range(1, min(64, batch_size) + 1):
        parts = [rank_rows(batch_size, rank, size) for rank in range(size)]
        assert [row for part in parts for row in range(batch_size)[part]] == list(range(batch_size))
        counts = [part.stop - part.start for part in parts]
        assert max(counts) - min(counts) <= 1 and counts == sorted(counts, reverse=True)


def test_recipes_are_for_64_ranks() -> None:
    sizes = {path.stem: load_config(path, kind=PretrainConfig).optim.batch_size for path in TRAININGS}
    assert {name for name, size in sizes.items() if size < 64} <= {
        path.stem for path in TRAININGS if path.stem.startswith("demo")
    }
    assert {1680, 2320, 1520} <= set(sizes.values())


@pytest.mark.parametrize("size", [3, 5])
def test_the_ranks_of_the_loader_share_what_one_reads(tmp_path: Path, size: int) -> None:
    make_corpus(str(tmp_path / "corpus"))
    config = tiny_config(tmp_path, tmp_path / "corpus")
    snapshot = take_snapshot(config.data)

    def uids(rank: int, size: int) -> list[list[str]]:
        batches = iter(TrainingData(config, snapshot, rank, size))
        return [next(batches).uids for _ in range(3)]

    of_ranks = zip(*(uids(rank, size) for rank in range(size)), strict=True)
    assert [[uid for part in parts for uid in part] for parts in of_ranks] == uids(0, 1)


def test_plan_and_run_refuse_the_same(tmp_path: Path) -> None:
    make_corpus(str(tmp_path / "corpus"))
    config = tiny_config(tmp_path, tmp_path / "corpus", cluster={"gpus": 9})
    messages = []
    for start in (lambda: plan(config), lambda: TrainingData(config, take_snapshot(config.data), 0, 9)):
        with pytest.raises(
            CapfiltError, match=r"optim\.batch_size: 8 images are too few for 9 ranks"
        ) as refused:
            start()
        messages.append(str(refused.value))
    assert messages[0] == messages[1]
    fits = tiny_config(tmp_path, tmp_path / "corpus", cluster={"gpus": 3})
    assert plan(fits)["steps"] == 8 and TrainingData(fits, take_snapshot(fits.data), 2, 3)
