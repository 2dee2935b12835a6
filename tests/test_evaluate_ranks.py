"""Evaluations that ranks share, as torchrun or srun starts them: the results of one process."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ranks import on_ranks
from trained import pictures, trained_stage
from typer.testing import CliRunner

from jobs.cli.commands.evaluate import evaluate
from training.convert.export import export_model
from training.convert.load import load_trained
from training.distributed import World
from training.evaluate.annotations import read_captioned_images, read_questions
from training.evaluate.generation import Decoding
from training.evaluate.tasks import Evaluation

pytestmark = pytest.mark.training

IMAGES = 7
TEXTS = [
    "a red circle",
    "blue square on grass",
    "a cat under tree",
    "two car",
    "the green",
    "three dog",
    "red",
]
GREEDY = Decoding(beams=1, min_tokens=1, max_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model of each stage, and images with captions and questions."""
    folder = tmp_path_factory.mktemp("evaluated")
    for stage in (1, 2):
        export_model(trained_stage(folder, stage), folder / f"stage{stage}")
    images = folder / "images"
    images.mkdir()
    for n, pixels_CHW in enumerate(pictures(IMAGES)):
        for name in (f"{n}.png", f"n{n}.jpg"):
            Image.fromarray(pixels_CHW.permute(1, 2, 0).numpy()).save(images / name)
    captions = [{"image": f"{n}.png", "caption": [TEXTS[n], f"a photo of {TEXTS[n]}"]} for n in range(IMAGES)]
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "one.json").write_text(json.dumps(captions[:1]))
    questions = {str(n): {"imageId": f"n{n}", "question": "A dog?", "answer": "red"} for n in range(IMAGES)}
    (folder / "questions.json").write_text(json.dumps(questions))
    return folder


def results(world: World, folder: Path) -> dict[str, tuple[int, dict[str, float]]]:
    """Return every task's number of images and metrics; of one image too, which leaves a rank without any."""
    first, second = (load_trained(str(folder / f"stage{stage}")) for stage in (1, 2))
    done = {}
    for name in ("captions", "one"):
        captioned = read_captioned_images(str(folder / f"{name}.json"), "test")
        done |= {
            f"retrieval of {name}": evaluation_of(first, folder, world).retrieval(captioned, 3),
            f"ITC of {name}": evaluation_of(first, folder, world).retrieval(captioned, 0),
            f"captions of {name}": evaluation_of(second, folder, world).captions(
                captioned, prompt="", decoding=GREEDY, predictions=str(folder / f"{name}-{world.size}")
            ),
        }
    asked = read_questions(str(folder / "questions.json"), "")
    done["answers"] = evaluation_of(second, folder, world).answers(
        asked, prompt="question : {} answer :", predictions=str(folder / f"answers-{world.size}")
    )
    return {task: (result.samples, result.metrics) for task, result in done.items()}


def evaluation_of(stage: Any, folder: Path, world: World) -> Evaluation:
    return Evaluation(stage, str(folder / "images"), batch_size=3, world=world)


def test_ranks_share_the_images_and_have_one_result(folder: Path) -> None:
    alone = results(World(), folder)
    assert {samples for samples, _ in alone.values()} == {IMAGES, 1}
    for shared in on_ranks(2, results, folder):
        for task, (samples, metrics) in alone.items():
            assert shared[task] == (samples, pytest.approx(metrics, abs=1e-3)), task
    for name in ("captions", "one", "answers"):
        predictions = [json.loads((folder / f"{name}-{size}").read_text()) for size in (1, 2)]
        assert predictions[0] == predictions[1] and len(predictions[0]) in (1, IMAGES)


def command(world: World, folder: Path) -> tuple[int, str, str]:
    """Run the command as the rank that the environment describes."""
    os.environ["LOCAL_RANK"] = str(world.rank)
    arguments = ["retrieval", str(folder / "stage1"), "--annotations", str(folder / "captions.json")]
    done = CliRunner().invoke(evaluate, [*arguments, "--images", str(folder / "images"), "--json"])
    return done.exit_code, done.stdout, done.stderr


def test_the_first_rank_alone_prints_the_result(folder: Path) -> None:
    (code, output, _), (other_code, nothing, no_progress) = on_ranks(2, command, folder)
    assert (code, other_code, nothing, no_progress) == (0, 0, "", "")
    assert json.loads(output)["samples"] == IMAGES
