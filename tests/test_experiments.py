"""Experiments: what arms keep, what is made of their trainings, and one that is run and continued."""

import json
import random
from pathlib import Path

import pytest

from jobs.demo.world.scenes import Scene, is_true
from jobs.experiments.arms import at_random, by_truth, first_synthetic, ranked, web
from jobs.experiments.corpus import write_arm
from jobs.experiments.questions import QUESTIONS, TRAINED, question
from jobs.experiments.report import FIGURES, Results, Trial, write_page
from pipeline.candidates import Candidate
from schemas.config import SelectConfig
from tests.processes import cli_here

SCENE = Scene(colour="red", shape="star", size="large", background="snow")
TEXTS = [
    "a red star",
    "A red star",
    "a blue star",
    "a large red star on snow",
    "a red moon",
    "a red star in snow",
]
CANDIDATES = [
    Candidate(origin="synthetic", candidate=index, text=text, score=0.1 * index)
    for index, text in enumerate(TEXTS)
] + [Candidate(origin="web", candidate=0, text="IMG_1.JPG", score=0.05)]
ARGUMENTS = (
    "experiment",
    "curation",
    "--arm",
    "web",
    "--urls",
    "100",
    "--scenes",
    "20",
    "--seeds",
    "1",
    "--steps",
    "60",
)


def kept(keep: object, seed: int = 0) -> list[str]:
    return keep(CANDIDATES, SCENE, random.Random(seed))


def test_arms_keep_what_they_say() -> None:
    assert kept(web) == ["IMG_1.JPG"] and kept(first_synthetic) == ["a red star"]
    # Texts that differ in case are one; the web's has the lowest score.
    assert kept(ranked(SelectConfig(), 10)) == ["a red star in snow", "a red moon"]
    assert kept(ranked(SelectConfig(), 4)) == ["a large red star on snow", "a blue star"]
    assert kept(by_truth(2, 10)) == ["a large red star on snow", "a red star in snow"]
    assert kept(by_truth(9, 3)) == ["a red star"]
    draws = {tuple(kept(at_random(2, 10), seed)) for seed in range(200)}
    assert (
        all(len(set(texts)) == 2 for texts in draws) and len({text for texts in draws for text in texts}) == 6
    )
    assert kept(at_random(2, 10), 7) == kept(at_random(2, 10), 7)


def test_every_question_names_arms_that_it_has() -> None:
    for each in QUESTIONS.values():
        names = [arm.name for arm in each.arms]
        assert len(set(names)) == len(names) and each.baseline in names
        assert {name for pair in each.better for name in pair} | set(TRAINED[each.name]) <= set(names)
    assert len(TRAINED["captions"]) == 12


def trial(arm: str, seed: int, recall: float) -> Trial:
    return Trial(arm=arm, seed=seed, figures=dict.fromkeys(FIGURES, recall), cpu_seconds=1.0)


def test_differences_are_taken_seed_by_seed(tmp_path: Path) -> None:
    facts = {"images": 5, "texts": 9, "true_share": 0.5, "distinct_share": 1.0, "words": 4.0}
    # Seeds differ by far more than arms do: only pairs show it.
    trials = [trial("web", seed, 0.2 * seed) for seed in range(3)]
    trials += [trial("ranked", seed, 0.2 * seed + 0.05 + 0.001 * seed) for seed in range(3)]
    results = Results(
        question=question("curation"),
        facts={"web": facts, "ranked": facts},
        trials=trials,
        steps=9,
        num_scenes=50,
    )
    found = results.difference("ranked", "web")
    assert found is not None and found.seeds == 3
    assert found.mean == pytest.approx(0.051) and found.error == pytest.approx(0.001 / 3**0.5)
    assert results.difference("oracle", "web") is None
    [verdict] = results.verdicts()
    assert (
        verdict.startswith("ranked over web: +5.1% recall, as the papers have it; 3 seeds")
        and "more than" in verdict
    )
    write_page(results, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert (
        "+5.1% ± 0.1%" in page and page.count("<rect") == 2 and "<script" not in page and "http" not in page
    )


@pytest.mark.training
def test_an_experiment_is_run_and_gone_on_with(tmp_path: Path) -> None:
    out = str(tmp_path / "experiments")
    done = cli_here(*ARGUMENTS, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    [row] = told["arms"]
    assert row["arm"] == "web" and 0.3 < row["true_share"] < 0.7 and row["images"] > 70
    assert 0 <= row["text_r1"] <= 1 and row["text_r1_spread"] is None and row["cpu_seconds"] > 0
    assert "web" in Path(told["page"]).read_text()
    again = cli_here(*ARGUMENTS, "--out", out, "--json")
    assert json.loads(again.stdout)["arms"] == told["arms"] and "training" not in again.stderr
    # Every arm has the same images under the same keys; what is kept of them without training is known at once.
    corpus = Path(out, "corpus")
    for arm in question("curation").arms:
        facts = write_arm(corpus, arm, tmp_path / arm.name)
        assert facts["images"] <= row["images"]
        assert (facts["true_share"] == 1.0) == (arm.name == "oracle")
    assert is_true("a red star", SCENE)
    for wrong, said in (
        (("experiment", "curatoin"), "did you mean"),
        ((*ARGUMENTS[:2], "--arm", "rank"), "no such arm"),
        ((*ARGUMENTS, "--urls", "200", "--out", out), "has begun with 100"),
    ):
        refused = cli_here(*wrong)
        assert refused.returncode == 2 and said in refused.stderr, refused.stderr
