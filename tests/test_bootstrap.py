"""``capfilt bootstrap`` at tiny sizes: two rounds, killed between and inside steps; the trace across rounds; errors."""

import io
import json
import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from jobs.bootstrap.progress import is_trained, require_fetched
from jobs.bootstrap.rounds import Rounds, load_rounds
from jobs.bootstrap.run import BootstrapStopped, bootstrap, steps
from jobs.demo.bootstrap import corpus_truth, demo_rounds
from jobs.demo.world.site import serving
from pipeline.corpus.records import Records
from pipeline.lineage.sample_trace import trace
from pipeline.manifest.manifest import Manifest
from pipeline.storage.storage import Storage
from schemas.errors import CapfiltError
from schemas.stages import Stage
from tests.processes import cli_here, start_cli
from tests.tiny_models import save_captioner, save_ranker
from tests.tiny_training import tiny_blip_config
from tests.trained import pictures
from training.checkpoint import read_model
from training.data.loader import TrainingData
from training.data.snapshot import take_snapshot

pytestmark = pytest.mark.training

SOURCES = {"coco": ("human", "the red circle on grass"), "web": ("web", "a dog near the tree")}
SILENT = Console(file=io.StringIO())


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def write_bootstrap(folder: Path, models: Path) -> str:
    """Write the pictures of two sources and the configs of a bootstrapping; return the file that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    for start, (name, (_, caption)) in zip((0, 12), SOURCES.items(), strict=True):
        (folder / name).mkdir()
        for number, pixels in enumerate(pictures(24)[start : start + 12]):
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize(
                (72, 72), Image.Resampling.NEAREST
            )
            image.save(folder / name / f"{number:02}.png")
            (folder / name / f"{number:02}.txt").write_text(f"{caption} number {number}")
    corpus = {
        "corpus": {"path": "crawled", "samples_per_shard": 12},
        "source": [
            {"name": name, "kind": kind, "input": [name], "format": "imagefolder"}
            for name, (kind, _) in SOURCES.items()
        ],
        "caption": {"model": str(models / "captioner"), "num_captions": 2, "max_length": 10},
        "rank": {"model": f"local-dir:{models / 'ranker'}", "pretrained": ""},
        "filter": {"model": str(models / "none"), "max_tokens": 12},
        "select": {"by": "itm", "min_match": 0.0},
    }
    write_json(folder / "corpus.json", corpus)
    for name in ("pretrain", "captioner", "filter"):
        changes: dict[str, Any] = {"optim": {"steps": 4}, "run": {"output": ""}}
        if name == "captioner":
            changes["blip"] = {"prompt": ""}
        config = tiny_blip_config(models, folder / "crawled", f"blip-{name}", **changes)
        write_json(folder / f"{name}.json", config.model_dump(mode="json"))
    names = {name: f"{name}.json" for name in ("corpus", "pretrain", "captioner", "filter")}
    file = write_json(folder / "bootstrap.json", {"bootstrap": {"path": "rounds", "rounds": 2, **names}})
    return str(file)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_captioner(folder / "captioner")
    save_ranker(folder / "ranker")
    return folder


def do_steps(file: str, rounds: int, kill_at: int = 0) -> list[str]:
    """Do the steps that are missing, up to the one that is numbered, from 1; return the names of those begun."""
    begun = []
    for step in bootstrap(load_rounds(file, rounds=rounds), SILENT, local=True):
        begun.append(step.name)
        if len(begun) == kill_at:
            break
    return begun


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Rounds:
    """Two rounds without an interruption."""
    file = write_bootstrap(tmp_path_factory.mktemp("whole"), models)
    assert len(do_steps(file, 2)) == 2 + 2 * 6 + 1
    return load_rounds(file)


def digests(corpus: str, stage: Stage, output: str) -> dict[tuple[str, str], str]:
    records = Records(Storage(corpus)).shards((stage,))
    return {(source, shard): record.outputs[output].sha256 for (_, source, shard), record in records.items()}


def assert_same_round(rounds: Rounds, others: Rounds) -> None:
    """Compare the corpus of round 1 byte by byte, and the model after it to the bit."""
    tars, other_tars = (digests(side.corpus_path(1), "select", "tar") for side in (rounds, others))
    assert tars == other_tars and len(tars) == 2
    model, other = (read_model(side.run_folder("pretrain", 2))[1].model for side in (rounds, others))
    assert model.keys() == other.keys()
    assert all(torch.equal(model[name], other[name]) for name in model)


# -- rounds --------------------------------------------------------------------------------------------------


def test_a_round_takes_over_the_images_and_captions_them_with_its_own_models(whole: Rounds) -> None:
    crawled, first, second = (whole.corpus_path(number) for number in range(3))
    tars = [digests(corpus, "crawl", "tar") for corpus in (crawled, first, second)]
    assert tars[0] == tars[1] == tars[2]
    places = [Records(Storage(corpus)).read("crawl", "web", "00000") for corpus in (crawled, second)]
    inodes = [
        Path(corpus, record.outputs["tar"].path).stat().st_ino
        for corpus, record in zip((crawled, second), places, strict=True)
    ]
    assert inodes[0] == inodes[1], "on local disk an image is stored once"
    names = {model.kind: model.name for model in Records(Storage(second)).models()}
    assert names["captioner"] == whole.model_folder("captioner", 2)
    assert names["filter"] == whole.model_folder("filter", 2)
    # The crawled corpus has the human captions curated, and the web's as they came.
    assert {source for source, _ in digests(crawled, "select", "tar")} == {"coco"}


def test_crawled_images_are_trained_on_with_the_texts_of_their_lists(whole: Rounds) -> None:
    config = whole.training("pretrain", 1)
    snapshot = take_snapshot(config.data)
    assert {(source.name, source.kind, source.num_images) for source in snapshot.sources} == {
        ("coco", "human", 12),
        ("web", "web", 12),
    }
    drawn = {text for batch in islice(TrainingData(config, snapshot), 6) for text in batch.captions}
    assert all(
        text.rpartition(" number ")[0] in {caption for _, caption in SOURCES.values()} for text in drawn
    )
    assert len({text for text in drawn if text.startswith("a dog")}) > 6


def test_what_is_done_is_not_done_again(whole: Rounds) -> None:
    files = {
        path: path.stat().st_mtime_ns
        for path in Path(whole.config.bootstrap.path).rglob("*")
        if path.is_file()
    }
    assert list(bootstrap(whole, SILENT, local=True)) == []
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in files.items())


def test_a_round_more_goes_on(whole: Rounds, models: Path) -> None:
    file = f"{Path(whole.config.bootstrap.path).parent}/bootstrap.json"
    shown = cli_here("bootstrap", "-c", file, "--rounds", "3", "--dry-run", "--json")
    states = {row["step"]: row["state"] for row in json.loads(shown.stdout)["steps"]}
    assert [name for name, state in states.items() if state == "to do"] == [
        "round 3: captioner",
        "round 3: captioner for the corpus",
        "round 3: filter",
        "round 3: filter for the corpus",
        "round 3: corpus",
        "round 4: pretrain",
    ]


def test_trace_walks_from_a_caption_of_round_2_to_the_urls_that_taught_its_captioner(whole: Rounds) -> None:
    corpus = whole.corpus_path(2)
    manifest = Manifest(Storage(corpus))
    with manifest.open() as query:
        (uid,) = query.rows("SELECT uid FROM curated WHERE source = 'web' ORDER BY uid LIMIT 1")[0].values()
    rows = trace(manifest, uid)[0]["taught_by"]
    walked = [(row["model"], row["corpus"], row["source"]) for row in rows]
    crawled, first = whole.corpus_path(0), whole.corpus_path(1)
    assert walked[:2] == [("captioner", first, "coco"), ("filter", first, "coco")]
    # The second round's MED learnt from the first round's captions, whose captioner began with the first MED, which
    # learnt from the web's own.
    assert {("blip", first, "web"), ("captioner", crawled, "coco"), ("blip", crawled, "web")} <= set(walked)
    assert all(row["images"] == row["urls"] == 12 for row in rows)
    shown = cli_here("trace", corpus, uid).stdout
    assert "taught by, nearest first" in shown and "checkpoints/blip-captioner/round-1" in shown
    # What is left of a checkpoint that was removed is its path.
    folder = Path(rows[0]["checkpoint"])
    for path in (folder, Path(f"{folder}.json")):
        path.rename(f"{path}.away")
    left = trace(manifest, uid)[0]["taught_by"]
    for path in (folder, Path(f"{folder}.json")):
        Path(f"{path}.away").rename(path)
    assert left[0] == dict.fromkeys(rows[0], None) | {"model": "captioner", "checkpoint": str(folder)}
    with Manifest(Storage(crawled)).open() as query:
        assert query.rows("SELECT count(*) AS urls FROM samples WHERE source = 'web'") == [{"urls": 12}]


def test_the_demo_world_has_a_part_with_true_captions(tmp_path: Path) -> None:
    with serving() as base_url:
        rounds = demo_rounds(tmp_path, base_url, 1, num_web=40, num_human=40, overrides=[])
        names = []
        for step in bootstrap(rounds, SILENT, local=True):
            names.append(step.name)
            if len(names) == 3:
                break
    assert names == ["crawl", "human captions", "round 1: pretrain"]
    human = corpus_truth(rounds.corpus_path(0), "clean")
    assert human["true"] == human["images_kept"] == 1.0
    assert {source.kind for source in take_snapshot(rounds.training("pretrain", 1).data).sources} == {
        "web",
        "human",
    }


# -- kills ---------------------------------------------------------------------------------------------------


def test_killed_between_any_two_steps_it_comes_to_the_same_result(
    whole: Rounds, models: Path, tmp_path: Path
) -> None:
    file = write_bootstrap(tmp_path, models)
    begun = []
    while len(names := do_steps(file, 1, kill_at=2)) == 2:
        begun.append(names[0])
    assert len([*begun, *names]) == 2 + 6 + 1
    assert_same_round(load_rounds(file), whole)


def test_killed_at_any_time_it_comes_to_the_same_result(whole: Rounds, models: Path, tmp_path: Path) -> None:
    file = write_bootstrap(tmp_path, models)
    process = start_cli("bootstrap", "-c", file, "--local", "--rounds", "1")
    round_1 = Path(load_rounds(file).corpus_path(1))
    while not round_1.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(random.Random().uniform(0, 1))
    process.kill()
    process.communicate()
    do_steps(file, 1)
    assert_same_round(load_rounds(file), whole)


# -- what is refused -----------------------------------------------------------------------------------------


def refused(file: str, *overrides: str) -> str:
    with pytest.raises(CapfiltError) as error:
        load_rounds(file, overrides)
    return str(error.value)


def test_configs_that_do_not_fit_are_named(models: Path, tmp_path: Path) -> None:
    file = write_bootstrap(tmp_path, models)
    assert 'select.by = "clip", which does not ask the filter' in refused(file, "corpus.select.by=clip")
    assert 'no [[source]] of kind = "human"' in refused(file, "corpus.source.coco.kind=web")
    swapped = refused(file, f"bootstrap.pretrain={tmp_path / 'filter.json'}")
    assert "bootstrap.pretrain" in swapped and "'blip-pretrain' is needed" in swapped
    assert "make them equal" in refused(file, "captioner.blip.prompt=a picture of ")
    # Heads do not show in the weights.
    heads = refused(file, "captioner.blip.text.heads=2")
    assert (
        "captioner.json has blip.text.heads = 2" in heads and "pretrain.json, has 4; make them equal" in heads
    )
    assert "filter.json has blip.projection_width = 8" in refused(file, "filter.blip.projection_width=8")
    load_rounds(file, ["captioner.blip.projection_width=8"])
    probed = refused(file, "captioner.probe.every_steps=2")
    assert "captioner.json has probe.every_steps, and BLIP's models have no probe" in probed
    assert "filter.json ends at" in refused(file, "corpus.filter.max_tokens=500")
    assert "has caption.max_length = 500" in refused(file, "corpus.caption.max_length=500")
    assert "corpus.path of round 2's" in refused(
        file, f"corpus.corpus.path={tmp_path / 'rounds' / 'round-2'}"
    )
    assert "bootstrap.models" in refused(file, "bootstrap.path=s3://bucket/rounds")
    assert "did you mean bootstrap.rounds?" in refused(file, "bootstrap.round=2")
    assert "no such config file" in refused(file, "bootstrap.corpus=nowhere.toml")
    assert "--set pretrain.optim.stepz=2: optim.stepz: unknown key" in refused(file, "pretrain.optim.stepz=2")
    for key in ("run.init_from", "blip.vision.init"):
        assert f"has {key} = '/nothere', and there is no such" in refused(file, f"pretrain.{key}=/nothere")
    with pytest.raises(
        CapfiltError, match="for capfilt run; this command takes the config of a bootstrapping"
    ):
        load_rounds(str(tmp_path / "corpus.json"))


def test_a_recipe_that_has_changed_since_is_refused(whole: Rounds) -> None:
    file = f"{Path(whole.config.bootstrap.path).parent}/bootstrap.json"
    changed = load_rounds(file, ["captioner.optim.peak_lr=0.5"])
    with pytest.raises(
        CapfiltError,
        match=r"blip-captioner/round-1 was begun with another config \(optim.peak_lr.*set another bootstrap.path",
    ):
        list(bootstrap(changed, SILENT, local=True))
    checks: dict[str, Callable[[], bool]] = {step.name: step.is_done for step in steps(changed, SILENT)}
    assert checks["round 1: pretrain"]()


def test_a_corpus_whose_config_has_changed_since_is_refused(whole: Rounds) -> None:
    file = f"{Path(whole.config.bootstrap.path).parent}/bootstrap.json"
    for override, change in (
        (
            "corpus.caption.num_captions=3",
            r"round-1 was begun.*\(caption.num_captions 2 -> 3\); restore it, or set ",
        ),
        (
            "corpus.crawl.image_size_px=100",
            r"crawled was begun.*\(crawl.image_size_px 384 -> 100\).*corpus.path",
        ),
    ):
        with pytest.raises(CapfiltError, match=change):
            list(bootstrap(load_rounds(file, [override]), SILENT, local=True))


@pytest.mark.parametrize(
    ("removed", "overrides", "refusal"),
    [
        (
            ["round-1"],
            ["corpus.caption.num_captions=1"],
            "blip-pretrain/round-2 was trained on 2 shards, 1 of which .*round-1 does not have any more; remove it",
        ),
        (
            ["checkpoints/blip-pretrain/round-1"],
            ["pretrain.run.seed=8"],
            "blip-captioner/round-1 began with another checkpoint than the last one of .*blip-pretrain/round-1",
        ),
        (
            ["checkpoints/blip-captioner/round-1", "models/round-1/captioner"],
            ["captioner.run.seed=8"],
            "round-1 was made with another model than .*models/round-1/captioner; remove it",
        ),
    ],
    ids=["corpus", "model", "export"],
)
def test_what_was_made_of_something_that_was_made_anew_since_is_refused(
    whole: Rounds, tmp_path: Path, removed: list[str], overrides: list[str], refusal: str
) -> None:
    """Done as it is: but of a model or a corpus that is gone."""
    folder = shutil.copytree(Path(whole.config.bootstrap.path).parent, tmp_path / "copy")
    rounds = load_rounds(str(folder / "bootstrap.json"), overrides, 1)
    for place in removed:
        shutil.rmtree(folder / "rounds" / place)
    for _ in range(2):
        with pytest.raises(CapfiltError, match=refusal):
            list(bootstrap(rounds, SILENT, local=True))


def test_a_corpus_that_has_grown_since_leaves_what_was_trained_on_it(whole: Rounds, tmp_path: Path) -> None:
    config, folder = whole.training("pretrain", 1), whole.run_folder("pretrain", 1)
    copy = shutil.copytree(folder, tmp_path / "run")
    [file] = copy.glob("snapshot-*.json")
    saved = json.loads(file.read_text())
    assert len(saved["sources"][0]["shards"]) == 1
    saved["sources"] = saved["sources"][1:]
    file.write_text(json.dumps(saved))
    assert is_trained(config, str(copy))


def test_nothing_is_trained_on_a_corpus_whose_every_web_text_was_refused(
    whole: Rounds, tmp_path: Path
) -> None:
    file, made = f"{Path(whole.config.bootstrap.path).parent}/bootstrap.json", whole.config.bootstrap.path
    for part in (
        "checkpoints/blip-pretrain",
        "checkpoints/blip-captioner",
        "checkpoints/blip-filter",
        "models",
    ):
        shutil.copytree(f"{made}/{part}/round-1", tmp_path / part / "round-1")
    rounds = load_rounds(file, ["corpus.select.min_match=1.0", f"bootstrap.path={tmp_path}"], 1)
    for _ in range(2):
        with pytest.raises(
            CapfiltError, match="none of 12 images of the sources of kind 'web'.*filtered_out"
        ):
            list(bootstrap(rounds, SILENT, local=True))
    assert not (tmp_path / "checkpoints/blip-pretrain/round-2").exists()


def test_nothing_is_trained_on_what_an_outage_left(models: Path, tmp_path: Path) -> None:
    file = write_bootstrap(tmp_path, models)
    for number in range(1, 12):
        (tmp_path / "web" / f"{number:02}.png").write_bytes(b"<html>")
    refusal = r"1 of 12 URLs or files .* kind 'web' .*min_fetched = 0\.1; .* not_an_image; `capfilt failures"
    for _ in range(2):
        with pytest.raises(CapfiltError, match=refusal):
            list(bootstrap(load_rounds(file), SILENT, local=True))
    assert not (tmp_path / "rounds" / "checkpoints").exists()
    rounds = load_rounds(file, ["bootstrap.min_fetched=0"])
    require_fetched(rounds.corpus, file, rounds.config.bootstrap.min_fetched)


# -- stops ---------------------------------------------------------------------------------------------------


def test_two_drivers_export_a_model_once(whole: Rounds, tmp_path: Path) -> None:
    file = f"{Path(whole.config.bootstrap.path).parent}/bootstrap.json"
    rounds = load_rounds(file, [f"bootstrap.models={tmp_path}"])
    step = next(step for step in steps(rounds, SILENT) if step.name == "round 1: captioner for the corpus")
    assert not step.is_done()
    with ThreadPoolExecutor(2) as drivers:
        for driver in [drivers.submit(step.do) for _ in range(2)]:
            driver.result()
    assert step.is_done()


def test_a_training_at_its_time_limit_ends_the_command_as_pretrain_does(whole: Rounds) -> None:
    file = f"{Path(whole.config.bootstrap.path).parent}/bootstrap.json"
    rounds = load_rounds(file, ["captioner.run.max_hours=1e-9"], 3)
    step = next(step for step in steps(rounds, SILENT) if step.name == "round 3: captioner")
    with pytest.raises(BootstrapStopped) as stopped:
        step.do()
    assert stopped.value.exit_code == 3
