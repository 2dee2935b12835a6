"""Of several ranks the first alone reads language model, initial weights and checkpoint; the others have no files."""

import shutil
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.pretrain import pretrain as pretrain_here
from jobs.run_record import begin_run
from pipeline.corpus.checkpoint_files import run_folder
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from tests.corpora import make_corpus
from tests.tiny_training import tiny_config
from training.checkpoint import read_model
from training.distributed import World
from training.models.language import load_language
from training.models.language_on_ranks import load_on_ranks
from training.trainer.run import pretrain

pytestmark = pytest.mark.training


def stage2_config(folder: Path, name: str, family: str = "t5", shard: bool = False) -> PretrainConfig:
    return tiny_config(
        folder,
        folder / "corpus",
        2,
        run={"name": name, "init_from": str(folder / "run" / "stage1" / "first")},
        language={"family": family},
        performance={"precision": "fp32", "shard_language": shard},
        optim={"steps": 4},
    )


def without_files(config: PretrainConfig, folder: Path) -> PretrainConfig:
    """Return the config of a rank that finds a tokenizer and a shape, but no weights and no run's folder."""
    model = folder / "no-weights" / config.language.family
    if not model.exists():
        ignored = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(config.language.model, model, ignore=ignored)
    run = config.run.model_copy(update={"output": str(folder / "nowhere"), "init_from": "/nowhere"})
    language = config.language.model_copy(update={"model": str(model)})
    return config.model_copy(update={"run": run, "language": language})


def train(world: World, folder: Path) -> list[tuple[str, int, int]]:
    """Train whole, then with a stop after step 2, and on from there."""
    ends = []
    for name, stop_after in (("whole", 9), ("parts", 2), ("parts", 9)):
        config = stage2_config(folder, name, shard=True)
        if world.rank:
            config = without_files(config, folder)
        steps = iter(range(1, 9))
        summary = pretrain(
            config,
            world,
            begin_run("pretrain", config),
            stop_asked=lambda steps=steps, last=stop_after: next(steps) >= last,
            log=print,
        )
        ends.append((summary.outcome, summary.resumed_from, summary.step))
    return ends


def languages(world: World, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Load both families, whole and sharded; return what the sharded blocks hold when gathered."""
    loaded = {}
    for family in ("opt", "t5"):
        for shard in (False, True):
            config = stage2_config(folder, "x", family, shard)
            if world.rank:
                config = without_files(config, folder)
            language = load_on_ranks(config.language, world, torch.device("cpu"), shard=shard)
            embeddings, head = language.model.get_input_embeddings().weight, language.model.lm_head.weight
            assert (embeddings is head) == (family == "opt")
            assert not any(parameter.requires_grad for parameter in language.parameters())
            loaded[f"{family} {shard}"] = {
                name: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
                for name, value in language.model.named_parameters()
            }
    damaged = stage2_config(folder, "x").language.model_copy(update={"model": str(folder / "none")})
    with pytest.raises(CapfiltError, match="no such folder"):
        load_on_ranks(damaged, world, torch.device("cpu"), shard=False)
    return loaded


def handed_on(world: World) -> list[tuple[str, list[float], int]]:
    mine = (
        {"a": torch.arange(3.0), "b": torch.tensor(2.0), "c": torch.tensor([True])} if not world.rank else {}
    )
    return [(name, tensor.tolist(), len(mine)) for name, tensor in world.broadcast_tensors(mine)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_reader")
    make_corpus(str(folder / "corpus"))
    for family in ("opt", "t5"):
        stage2_config(folder, "models", family)
    # An output head of its own, as FlanT5's.
    weights = load_file(folder / "t5" / "model.safetensors")
    weights["lm_head.weight"] = weights["shared.weight"].flip(0)
    save_file(weights, folder / "t5" / "model.safetensors", {"format": "pt"})
    return folder


def test_tensors_are_handed_on_one_after_the_other() -> None:
    first, second = on_ranks(2, handed_on)
    assert first == [("a", [0, 1, 2], 2), ("b", 2.0, 1), ("c", [True], 0)]
    assert [line[:2] for line in second] == [line[:2] for line in first]


def test_a_language_model_is_read_by_one_rank(folder: Path) -> None:
    expected = {
        family: dict(load_language(stage2_config(folder, "x", family).language).model.named_parameters())
        for family in ("opt", "t5")
    }
    for loaded in on_ranks(2, languages, folder):
        for kind, tensors in loaded.items():
            wanted = expected[kind.split()[0]]
            assert tensors.keys() == wanted.keys()
            assert all(torch.equal(tensors[name], tensor) for name, tensor in wanted.items())


def test_a_run_is_resumed_by_ranks_that_have_no_files(folder: Path) -> None:
    pretrain_here(tiny_config(folder, folder / "corpus", run={"name": "first"}, optim={"steps": 1}))
    ends = [("done", 0, 4), ("interrupted", 0, 2), ("done", 2, 4)]
    assert on_ranks(2, train, folder) == [ends, ends]
    whole, parts = (read_model(run_folder(stage2_config(folder, name)))[1] for name in ("whole", "parts"))
    assert whole.tensors.keys() == parts.tensors.keys()
    assert all(torch.equal(parts.tensors[name], tensor) for name, tensor in whole.tensors.items())
    assert not (folder / "nowhere").exists()
