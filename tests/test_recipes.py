"""The recipes that ship are valid as they stand and say what the papers say; docs/config.md is up to date."""

import re
from pathlib import Path

import pytest

from jobs.bootstrap.rounds import load_rounds
from jobs.cli.commands.plan import worker_needs
from jobs.docs import FOLDER, PAGES, page
from pipeline.config import load_config
from pipeline.config_messages import section_class
from pipeline.runs.plan import stages_in_use, stages_of
from schemas.bootstrap import BootstrapConfig
from schemas.config import CapfiltConfig, Section
from schemas.pretrain import PretrainConfig
from schemas.stages import STAGES

RECIPES = Path(__file__).parent.parent / "jobs" / "recipes"


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_recipe_is_valid_and_opens_with_what_it_needs(recipe: Path) -> None:
    kinds = {"\n[run]\n": PretrainConfig, "\n[bootstrap]\n": BootstrapConfig}
    kind = next((kind for header, kind in kinds.items() if header in recipe.read_text()), CapfiltConfig)
    load_config(recipe, kind=kind)
    opening = recipe.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in opening.splitlines())
    for word in ("What", "Hardware", "Expected"):
        assert f"# {word}" in opening


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*-bootstrap.toml")), ids=lambda path: path.stem)
def test_the_recipes_that_a_bootstrapping_names_fit_each_other(recipe: Path) -> None:
    rounds = load_rounds(str(recipe))
    assert {"clean", "coco"} & set(rounds.sources("human"))


@pytest.mark.parametrize("recipe", ["blip2", "laion-coco", "blip-capfilt"])
def test_all_pools_fit_the_hardware_that_the_recipe_names(recipe: str) -> None:
    path = RECIPES / f"{recipe}.toml"
    config = load_config(path)
    numbers = re.search(r"(\d+) H200 GPUs and (\d+) CPU cores", path.read_text())
    assert numbers is not None
    most = worker_needs(config.cluster, stages_in_use(config, STAGES))["most"]
    assert most["gpus"] <= int(numbers[1]) and most["cpus"] <= int(numbers[2])


def test_blip2_names_the_six_sources() -> None:
    config = load_config(RECIPES / "blip2.toml")
    kinds = {source.name: source.kind for source in config.source}
    assert kinds == {
        "coco": "human",
        "visual-genome": "human",
        "cc3m": "web",
        "cc12m": "web",
        "sbu": "web",
        "laion-115m": "web",
    }
    assert (config.caption.num_captions, config.select.top_k, config.select.web_caption) == (10, 2, "compete")
    assert (config.rank.model, config.rank.pretrained) == ("ViT-L-14", "openai")


@pytest.mark.parametrize(
    "recipe",
    sorted([*RECIPES.glob("blip2-stage*.toml"), *RECIPES.glob("blip-pretrain-*.toml")]),
    ids=lambda path: path.stem,
)
def test_a_pretraining_recipe_has_the_weights_by_pairs_as_a_comment(recipe: Path, tmp_path: Path) -> None:
    assert load_config(recipe, kind=PretrainConfig).data.corpus[0].weights == {}
    chosen = tmp_path / recipe.name
    chosen.write_text(recipe.read_text().replace("# weights =", "weights ="))
    weights = load_config(chosen, kind=PretrainConfig).data.corpus[0].weights
    human = [source.name for source in load_config(RECIPES / "blip2.toml").source if source.kind == "human"]
    assert list(weights) == human
    # Their images: 113K and 100K.
    assert weights["coco"] / 113_000 == pytest.approx(5, abs=0.05)
    assert weights["visual-genome"] / 100_000 == pytest.approx(7.7, abs=0.05)


def test_laion_coco_ranks_twice() -> None:
    config = load_config(RECIPES / "laion-coco.toml")
    assert config.rank.rerank is not None
    assert (config.caption.num_captions, config.rank.rerank.first, config.select.top_k) == (40, 5, 1)
    assert (config.rank.model, config.rank.rerank.model) == ("ViT-L-14", "RN50x64")


def test_blip_capfilt_lets_the_filter_alone_decide() -> None:
    config = load_config(RECIPES / "blip-capfilt.toml")
    assert config.filter is not None and config.filter.model == "Salesforce/blip-itm-large-coco"
    assert (config.caption.num_captions, config.caption.top_p) == (1, 0.9)
    assert (config.select.by, config.select.min_match, config.select.web_caption) == ("itm", 0.5, "compete")
    assert stages_of(config, "web") == ("crawl", "caption", "filter", "select")
    assert stages_of(config, "human") == ("crawl", "rank", "select")


def test_demo_names_its_own_weights() -> None:
    config = load_config(RECIPES / "demo.toml")
    weights = RECIPES.parent / "demo" / "weights"
    assert config.caption.model == str(weights / "captioner")
    assert config.rank.model == f"local-dir:{weights / 'ranker'}"


@pytest.mark.parametrize("name", PAGES)
def test_generated_page_is_up_to_date(name: str) -> None:
    assert (FOLDER / name).read_text() == page(name), "run `make docs`"


def test_every_key_is_described() -> None:
    def undescribed(section: type[Section], path: str) -> list[str]:
        missing = []
        for name, info in section.model_fields.items():
            below = section_class(info.annotation)
            missing += undescribed(below, f"{path}{name}.") if below else []
            if below is None and not info.description:
                missing.append(path + name)
        return missing

    assert undescribed(CapfiltConfig, "") == undescribed(BootstrapConfig, "") == []
