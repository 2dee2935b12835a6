"""The plan of a training: counts to the unit for every recipe, without weights, with and without the corpus."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.commands.train import plan_text
from pipeline.config import load_config
from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from tests.corpora import make_corpus
from tests.processes import cli_here
from tests.tiny_training import tiny_config
from training.trainer.estimate import plan

RECIPES = Path(__file__).parent.parent / "jobs" / "recipes"

# Trainable parameters: LAVIS's modules counted, of which two its training logs print. Then samples, in millions, and
# GFLOP a sample, counted by hand from the shapes (to a few per cent).
PUBLISHED = {
    "blip2-stage1-vitg": (186_705_470, 420.0, 701),
    "blip2-stage1-vitl": (183_165_758, 580.0, 330),
    "blip2-stage2-vitg-opt2.7b": (107_133_696, 153.6, 1110),
    "blip2-stage2-vitl-opt2.7b": (103_593_984, 153.6, 739),
    "blip2-stage2-vitg-opt6.7b": (108_314_880, 153.6, 1943),
    "blip2-stage2-vitl-opt6.7b": (104_775_168, 153.6, 1572),
    "blip2-stage2-vitg-flant5xl": (106_739_968, 121.6, 868),
    "blip2-stage2-vitl-flant5xl": (103_200_256, 121.6, 497),
    "blip2-stage2-vitg-flant5xxl": (108_314_880, 121.6, 1785),
    "blip2-stage2-vitl-flant5xxl": (104_775_168, 121.6, 1414),
}
# The same of BLIP (the MED of ViT-B by table 3), and GFLOP as its own code computes a sample.
BLIP = {
    "blip-pretrain-vitb": (252_441_919, 279.9936, 256.3, 306.5),
    "blip-pretrain-vitl": (474_729_023, 279.984, 613.8, 680.7),
    "blip-captioner-vitb": (223_971_644, 2.83264, 414, None),
    "blip-captioner-vitl": (446_290_492, 2.83264, 1244, None),
    "blip-filter-vitb": (223_744_259, 3.399168, 586, 684.4),
    "blip-filter-vitl": (446_128_643, 3.399168, 1687, 1818.1),
}
ALL = PUBLISHED | {name: values[:3] for name, values in BLIP.items()}


@functools.cache
def planned(name: str, *settings: str) -> dict[str, Any]:
    """Return the plan of a recipe; counting the operations of a large model takes seconds."""
    return plan(load_config(RECIPES / f"{name}.toml", settings, PretrainConfig))


@pytest.mark.parametrize("name", ALL)
def test_recipe_trains_what_the_paper_trains(name: str) -> None:
    path = RECIPES / f"{name}.toml"
    estimate = planned(name)
    trainable, samples, gflop = ALL[name]
    assert estimate["trainable_parameters"] == trainable
    assert estimate["samples"] == pytest.approx(samples * 1e6)
    assert estimate["gflop_per_sample"] == pytest.approx(gflop, rel=0.03)
    seconds = samples * 1e6 * estimate["gflop_per_sample"] * 1e9 / (0.5 * 790e12)
    assert estimate["gpu_hours"] == pytest.approx(seconds / 3600, rel=1e-3, abs=0.005)
    assert estimate["memory_gb"]["total"] < 80
    assert not estimate["data"]["found"]
    # What the file's opening says is what the plan says.
    opening = " ".join(line.strip("# ") for line in path.read_text().split("\n\n")[0].splitlines())
    assert f"{trainable:,} parameters" in opening
    hours = ".1f" if name in BLIP else ".0f"
    assert f"{estimate['gpu_hours']:,{hours}} GPU-hours" in opening
    if name in BLIP:
        published = BLIP[name][3]
        assert estimate["gflop_per_sample_published"] == published
        assert published is None or f"BLIP's code has {published:,}" in opening
        assert f"{estimate['gflop_per_sample']:,} GFLOP" in opening
    assert f"about {estimate['memory_gb']['total']:,.0f} GB" in opening


def test_every_training_recipe_is_planned() -> None:
    recipes = {path.stem for path in RECIPES.glob("blip*.toml") if "\n[run]\n" in path.read_text()}
    assert recipes == set(ALL)


def test_the_command_prints_it_as_json_and_writes_nothing(tmp_path: Path) -> None:
    recipe = RECIPES / "blip-captioner-vitb.toml"
    settings = ["--set", f"data.corpus.path={tmp_path}/none", "--set", f"run.output={tmp_path}/out"]
    printed = cli_here("pretrain", "-c", str(recipe), "--dry-run", *settings, "--json")
    assert printed.returncode == 0, printed.stderr
    assert json.loads(printed.stdout)["trainable_parameters"] == 223_971_644
    assert list(tmp_path.iterdir()) == []
    # A training that would keep its checkpoints in a corpus that is not there names the corpus.
    refused = cli_here("pretrain", "-c", str(recipe), *settings[:2])
    assert refused.returncode == 2 and f"data.corpus: {tmp_path}/none is not there" in refused.stderr


def test_the_command_prints_it_as_text(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path / "corpus")
    (tmp_path / "tiny.json").write_text(config.model_dump_json())
    printed = cli_here("pretrain", "-c", str(tmp_path / "tiny.json"), "--dry-run")
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout == plan_text(plan(config)) + "\n" and "is not there yet" in printed.stdout


@pytest.mark.parametrize("name", ["blip-pretrain-vitl", "blip-captioner-vitb", "blip2-stage2-vitg-flant5xxl"])
def test_the_text_fits_80_columns_and_names_what_there_is(name: str) -> None:
    lines = plan_text(planned(name)).splitlines()
    assert len(lines) == 8 and max(map(len, lines)) <= 80
    assert ("momentum encoders" in lines[2]) == (name == "blip-pretrain-vitl")
    assert f"{ALL[name][0]:,} parameters" in lines[2]


def test_the_corpus_is_looked_at_when_it_is_there(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path / "corpus")
    assert plan(config)["data"] == {"found": False, "paths": [str(tmp_path / "corpus")]}
    make_corpus(str(tmp_path / "corpus"))
    data = plan(config)["data"]
    assert (data["found"], data["images"], data["shards"], data["sources"]) == (True, 18, 2, {"cc": 18})
    assert data["epochs"] == pytest.approx(64 / 18, abs=0.01)
    lavis = tiny_config(tmp_path, tmp_path / "corpus", optim={"preset": "lavis", "steps": None})
    assert plan(lavis)["steps"] == 23  # ten epochs of 18 images, 8 at once


def test_a_spread_language_model_takes_a_share_of_each_rank() -> None:
    def memory_gb(*settings: str) -> float:
        return planned("blip2-stage2-vitg-flant5xxl", *settings)["memory_gb"]["weights_and_optimizer"]

    blocks = (
        24 * 2 * 4 * 4096**2 + 24 * 4 * 4096**2 + 48 * 3 * 4096 * 10240
    )  # attention, cross-attention, gated FFN
    # What is not shared out does not depend on the number of ranks.
    saved = memory_gb() - memory_gb("cluster.gpus=8", "performance.shard_language=true")
    assert saved == pytest.approx(blocks * 2 * 7 / 8 / 1e9, rel=0.01)


def test_lavis_without_corpus_or_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CapfiltError, match=r"optim\.steps"):
        plan(tiny_config(tmp_path, tmp_path / "corpus", optim={"preset": "lavis", "steps": None}))
