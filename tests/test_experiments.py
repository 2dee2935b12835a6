"""Experiments: what arms keep, what is made of their trainings, and one that is run and continued."""

import json
import random
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from rich.console import Console

from jobs.demo.world.scenes import Scene, is_true
from jobs.demo.world.site import serving
from jobs.docs import experiments_page
from jobs.experiments.arms import (
    BASE,
    CAPFILT,
    FILTERED,
    Arm,
    Keep,
    all_synthetic,
    at_random,
    by_truth,
    first_synthetic,
    selected,
    web,
)
from jobs.experiments.corpora import _served, make_corpus, write_arm
from jobs.experiments.facts import facts_of
from jobs.experiments.judges import STAGE1
from jobs.experiments.questions import QUESTIONS, question
from jobs.experiments.report import read_results, shown_rows, write_page
from jobs.experiments.results import Results, Trial
from jobs.experiments.run import Extent, _arms, _task
from jobs.experiments.task import Task
from jobs.experiments.trainings import read_trial, ready, train, training_digest
from jobs.experiments.world import require_served
from jobs.output.tables import table_lines
from pipeline.candidates import Candidate
from pipeline.corpus.records import Records
from pipeline.storage.storage import Storage
from schemas.config import SelectConfig
from schemas.errors import CapfiltError
from tests.documented import ROOT
from tests.processes import cli_here
from tests.tiny_models import save_matcher

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
    Candidate(
        origin="synthetic", candidate=index, text=text, score=0.1 * index, match_probability=1 - 0.15 * index
    )
    for index, text in enumerate(TEXTS)
] + [Candidate(origin="web", candidate=0, text="IMG_1.JPG", score=0.05, match_probability=0.2)]
MEASURED = ROOT / "docs" / "experiments"
PAGE, RECIPES = ((ROOT / "docs" / name).read_text() for name in ("experiments.md", "recipes.md"))
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


def kept(keep: Keep | None, seed: int = 0) -> list[str]:
    assert keep is not None
    return keep(CANDIDATES, SCENE, random.Random(seed))


def test_arms_keep_what_they_say() -> None:
    assert kept(web) == ["IMG_1.JPG"] and kept(first_synthetic) == ["a red star"]
    # Texts that differ in case are one; the web's has the lowest score.
    assert kept(selected(SelectConfig(), 10)) == ["a red star in snow", "a red moon"]
    assert kept(selected(SelectConfig(), 4)) == ["a large red star on snow", "a blue star"]
    # The filter refuses the web's text, and what it likes best comes first.
    assert kept(FILTERED.keep) == [] and kept(CAPFILT.keep) == ["a red star"]
    itm, both = (question("selection").arm(name).keep for name in ("itm", "both"))
    assert kept(itm) == ["a red star", "a blue star"]
    assert kept(both) == ["a large red star on snow", "a blue star"]
    assert kept(all_synthetic(2)) == ["a red star", "A red star"]
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
        assert set(each.headline) <= set(names)
        trained = {arm.name for arm in each.arms if arm.trained}
        assert len(set(names)) == len(names) and each.baseline in names
        assert {name for pair in each.better for name in pair} <= trained
        # An arm goes on from an earlier one of its question.
        assert all(arm.after in names[:place] for place, arm in enumerate(each.arms) if arm.after)
        if each.judge:
            assert {name for names in each.judge.measures.values() for name in names} <= set(
                each.judge.figures
            )
            # They stand in one row.
            assert not set(each.judge.figures) & set(facts_of([]))
    assert sum(arm.trained for arm in question("captions").arms) == 12


def test_facts_are_of_texts_that_claim_something() -> None:
    other = Scene(colour="blue", shape="ring", size="small", background="sand")
    facts = facts_of(
        [
            (["a red star", "A red star.", "a large blue star on snow"], SCENE),
            (["IMG_1.JPG"], other),
            ([], other),
        ]
    )
    assert facts["images"] == 2 and facts["texts"] == 4 and facts["an_image"] == 1.5
    assert facts["true_share"] == 0.5 and facts["distinct_share"] == 0.75 and facts["parsed_share"] == 0.75
    assert facts["colour_true"] == pytest.approx(2 / 3) and facts["shape_true"] == 1.0
    assert facts["size_true"] == 1.0 and facts["background_true"] == 1.0
    assert facts_of([])["true_share"] == 0.0


def test_a_training_waits_for_the_one_that_it_goes_on_from(tmp_path: Path) -> None:
    first = Arm(name="first", what="")
    chain = (
        first,
        replace(first, name="second", after="first"),
        replace(first, name="third", after="second"),
    )
    asked = replace(question("curation"), arms=chain)
    assert [arm.name for arm in _arms(asked, ("third",))] == ["first", "second", "third"]
    extent = Extent(seeds=2)
    tasks = [_task(asked, arm, seed, tmp_path, extent, 900) for seed in range(2) for arm in chain]
    assert [(task.arm, task.seed) for task in ready(tasks)] == [("first", 0), ("first", 1)]
    assert [(task.arm, task.seed) for task in ready(tasks[1:])] == [("second", 0), ("first", 1)]


def test_a_training_that_another_experiment_has_done_is_not_done_again(tmp_path: Path) -> None:
    def task_of(name: str, arm: str, seed: int = 0) -> Task:
        asked = question(name)
        task = _task(asked, asked.arm(arm), seed, tmp_path, Extent(), 900)
        task.data.mkdir(parents=True, exist_ok=True)
        (task.data / "00000.tar").write_bytes(arm.encode())
        return task

    web, ranked, without_itg = (
        task_of("curation", "web"),
        task_of("losses", "itc-itm-itg"),
        task_of("losses", "itc-itm"),
    )
    same, other_seed = task_of("search", "web"), task_of("search", "web", 1)
    for task in (ranked, without_itg):
        (task.data / "00000.tar").write_bytes(b"ranked")
    digests = [training_digest(task) for task in (web, ranked, without_itg, other_seed)]
    assert len(set(digests)) == 4 and all(digests) and training_digest(same) == digests[0]
    # MED with its recipe's own sharing is the one whose texts are captioned and filtered.
    own, new = task_of("sharing", "all-but-self-attention"), task_of("longer", "new")
    (new.data / "00000.tar").write_bytes((own.data / "00000.tar").read_bytes())
    assert training_digest(own) == training_digest(new)
    # What a training goes on from is more than its task says.
    assert training_digest(task_of("longer", "continued")) == ""
    result = {"training": digests[0], "figures": {"text_r1": 0.5}, "cpu_seconds": 7.0}
    file = tmp_path / "results" / "curation" / "web.seed-0.steps-900.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(result))
    assert train([same], question("search"), Console(quiet=True)) == 0.0
    assert read_trial(same) == Trial(arm="web", seed=0, figures={"text_r1": 0.5}, cpu_seconds=7.0)


def test_beam_search_writes_one_caption_whatever_the_seed() -> None:
    import torch

    from jobs.demo.weights_training.evaluate_weights import caption_config
    from jobs.demo.weights_training.models import CAPTIONER_DIR
    from jobs.demo.world.pictures import demo_images
    from jobs.experiments.beam_search import BeamCaptioner
    from pipeline.models.weights import captioner_weights

    config = caption_config(CAPTIONER_DIR).model_copy(update={"num_captions": 1})
    captioner = BeamCaptioner(config, captioner_weights(config), 0)
    pictures = demo_images(20, 3)
    pixels = [torch.from_numpy(pixels_HWC).permute(2, 0, 1) for pixels_HWC in pictures.pixels_NHWC]

    def written(uids: list[str], count: int) -> list[str]:
        batch = captioner.load(pixels[:count], uids[:count])
        return [caption.text for [caption] in captioner.decode_text(captioner.generate(batch))]

    texts = written([f"{index:032x}" for index in range(20)], 20)
    assert written([f"{index + 50:032x}" for index in range(20)], 7) == texts[:7]
    assert sum(map(is_true, texts, pictures.scenes)) >= 16


@pytest.mark.training
def test_a_med_is_asked_what_it_finds_and_what_it_writes(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from jobs.demo.evaluate_med import evaluate_med
    from jobs.demo.held_out import held_out_scenes
    from jobs.demo.training_configs import trial_config
    from jobs.demo.weights_training.models import CAPTIONER_DIR
    from training.build import build_blip
    from training.convert.key_map import blip_from_hf
    from training.distributed import World

    config = trial_config("demo-blip-pretrain", tmp_path, "med", tmp_path, ('blip.share="none"',))
    stage, scenes = build_blip(config, World(), torch.device("cpu")), held_out_scenes(40)
    fresh = evaluate_med(stage, scenes)
    assert fresh["true_captions"] == 0.0 and fresh["text_r1"] < 0.2 and fresh["image_r1"] < 0.2
    # The decoder of a captioner that knows the world, whose vocabulary lacks [ENC]; the text encoder stays random.
    captioner = blip_from_hf(load_file(CAPTIONER_DIR / "model.safetensors"), str(CAPTIONER_DIR))
    state = {name: tensor.detach().clone() for name, tensor in stage.trainable_state().items()}
    for name in state.keys() & captioner.keys():
        state[name][: len(captioner[name])] = captioner[name]
    stage.load_trainable_state(state)
    writes = evaluate_med(stage, scenes)
    assert writes["true_captions"] > 0.8 and writes["text_r1"] < 0.2


def trial(arm: str, seed: int, recall: float) -> Trial:
    by_itc = {"text_r1": 0.3, "image_r1": 0.2 if arm == "web" else 0.0}
    figures = dict.fromkeys(STAGE1.figures, recall) | by_itc
    return Trial(arm=arm, seed=seed, figures=figures, cpu_seconds=1.0)


def test_differences_are_taken_seed_by_seed(tmp_path: Path) -> None:
    facts = facts_of([(["a red star"], SCENE)])
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
    verdict, by_itc = results.verdicts()
    assert (
        verdict.startswith("ranked over web: +5.1% recall, as expected; 3 seeds") and "more than" in verdict
    )
    assert by_itc.startswith("ranked over web: -10.0% recall by ITC alone, not as expected; 3 seeds")
    # What all arms keep alike tells none from another.
    assert "images" not in shown_rows(results)[0] and "images" in shown_rows(results, whole=True)[0]
    # Fits the terminal, at its widest.
    every = replace(
        results,
        facts={arm.name: facts | {"images": number} for number, arm in enumerate(results.question.arms)},
    )
    assert max(map(len, table_lines(shown_rows(every), list(shown_rows(every)[0]), width=None))) <= 100
    write_page(results, tmp_path / "page.html")
    assert read_results(tmp_path / "page.json") == results
    page = (tmp_path / "page.html").read_text()
    assert "+5.1 ±0.1" in page and page.count("<rect") == 2 and "<script" not in page and "http" not in page


def test_the_page_prints_what_was_measured() -> None:
    """A night's work cannot be repeated here: docs/experiments/ has what it wrote, ``NAME.json`` of each."""
    printed = re.findall(r"^\$ capfilt experiment (\w+) --out experiments$", PAGE, re.M)
    assert sorted(printed) == sorted(file.stem for file in MEASURED.glob("*.json"))
    assert experiments_page() == PAGE


def test_recipes_tell_what_was_measured() -> None:
    rows = re.findall(
        r"^\| [^|]+ \| [^|]+ \| ([\d.]+)% \| (\d+)% \| ([\d.]+)% \| ([\d.]+)% \|", RECIPES, re.M
    )
    arms = ("web", "filtered", "captioned", "captioned-filtered", "ranked", "both")
    assert len(rows) == len(arms)
    for row, name in zip(rows, arms, strict=True):
        results = read_results(MEASURED / ("selection.json" if name == "both" else "curation.json"))
        facts, of_all = results.facts[name], results.facts["random"]
        by_itc, behind_itm = (
            fmean(results.scores(name, measure).values()) for measure in ("recall by ITC alone", "recall")
        )
        shares = (facts["true_share"], facts["images"] / of_all["images"], by_itc, behind_itm)
        assert row == tuple(
            f"{100 * share:.{digits}f}" for share, digits in zip(shares, (1, 0, 1, 1), strict=True)
        )


def test_the_page_has_every_cell_of_the_surface() -> None:
    facts = read_results(MEASURED / "captions.json").facts
    rows = re.findall(r"^\| (\d+) \| ([\d., ]+) \| ([\d., ]+) \| ([\d., ]+) \|$", PAGE, re.M)
    told = {
        f"{made}-{kept}-{web_caption}": share
        for made, *columns in rows
        for web_caption, shares in zip(("compete", "never", "always"), columns, strict=True)
        for kept, share in zip((1, 2, 5), shares.split(", "), strict=False)
    }
    assert told == {arm: f"{100 * of_arm['true_share']:.1f}" for arm, of_arm in facts.items()}


def test_one_model_differs_from_two_in_nothing_but_that(tmp_path: Path) -> None:
    from jobs.experiments.trials.rounds import joint_config, rounds_of

    task = Task(
        root=tmp_path,
        question="decoupled",
        arm="one",
        seed=1,
        after="",
        steps=350,
        num_scenes=20,
        num_urls=100,
    )
    rounds = rounds_of(task, 1)
    joint = joint_config(rounds, "med")
    captioner, matcher = rounds.training("captioner", 1), rounds.training("filter", 1)
    assert joint.objective == captioner.objective and joint.optim == matcher.optim
    assert joint.blip is not None and matcher.blip is not None
    assert joint.blip.alpha_epochs == matcher.blip.alpha_epochs
    assert joint.data.corpus == matcher.data.corpus == captioner.data.corpus
    assert (joint.run.stage, joint.run.init_from) == ("blip-pretrain", "med")


def test_a_corpus_that_was_killed_before_its_list_was_read_is_served(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    assert not isinstance(_served(tmp_path), nullcontext)


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
    # Judged by other scenes, the same training has another result.
    other = cli_here(*ARGUMENTS, "--scenes", "30", "--out", out, "--json")
    assert json.loads(other.stdout)["arms"] != told["arms"], other.stderr
    assert json.loads(cli_here(*ARGUMENTS, "--out", out, "--json").stdout)["arms"] == told["arms"]
    # The filter is added to a corpus without captioning it again; every arm is told of without training.
    corpus = Path(out, "corpus")
    records = Records(Storage(str(corpus)))
    before = records.shards(("caption",))
    other_filter = str(save_matcher(tmp_path / "filter"))
    make_corpus(Path(out), BASE, 100, Console(quiet=True), filtered=True, filter_folder=other_filter)
    assert records.shards(("caption",)) == before
    for arm in question("curation").arms:
        facts = write_arm(corpus, arm, tmp_path / arm.name)
        assert facts["images"] <= row["images"]
        assert (facts["true_share"] == 1.0) == (arm.name == "oracle")
    with pytest.raises(CapfiltError, match=r"of 99 URLs of the demo's world gave an image, where 85% do"):
        require_served(str(corpus), least=1.0)
    with serving(8423), pytest.raises(CapfiltError, match="port 8423"):
        make_corpus(tmp_path / "other", BASE, 100, Console(quiet=True))
    for wrong, said in (
        (("experiment", "curatoin"), "did you mean"),
        ((*ARGUMENTS[:2], "--arm", "rank"), "did you mean ranked?; it has web, "),
        (("experiment", "rounds", "--filter", str(tmp_path)), "rounds does not ask the demo's filter"),
        (("experiment", "all", "--arm", "web"), "in place of all"),
        (
            (*ARGUMENTS[:2], "--filter", str(tmp_path / "none"), *ARGUMENTS[4:], "--out", out),
            "no such folder",
        ),
        ((*ARGUMENTS, "--urls", "200", "--out", out), "has begun with 100"),
    ):
        refused = cli_here(*wrong)
        assert refused.returncode == 2 and said in refused.stderr, refused.stderr
