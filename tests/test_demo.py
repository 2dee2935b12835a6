"""``capfilt demo`` as a newcomer runs it, judged by the world's own truth."""

import json
import shlex
from pathlib import Path

import pytest

from tests.processes import cli

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Return the folder of a whole demo and the figures that it printed."""
    out = tmp_path_factory.mktemp("whole") / "demo"
    done = cli("demo", "--out", str(out), "--json", timeout=1800)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


@pytest.mark.timeout(2000)
def test_demo_makes_captions_true_and_training_better(demo: tuple[Path, dict]) -> None:
    _, figures = demo
    assert figures["urls"] >= 2000
    assert figures["images"] + figures["failures"] == figures["urls"]
    assert 0.10 <= figures["failures"] / figures["urls"] <= 0.20
    assert sum(figures["failures_by_reason"].values()) == figures["failures"]
    assert figures["curated_images"] + figures["dropped"] == figures["images"]
    assert figures["web_true_share"] <= 0.60
    assert figures["curated_true_share"] >= 0.90
    assert figures["seconds"] > 0
    assert 0 < figures["training_seconds"] <= 240
    curated, web, chance = (figures["stage1"][name] for name in ("curated", "web", "chance"))
    for recall in ("text_r1", "image_r1"):
        assert curated[recall] >= 5 * chance
        assert curated[recall] >= web[recall] + 0.1
    assert curated["itm_accuracy"] > 0.80
    for found in figures["stage2"].values():
        assert found["caption_loss"] < found["text_only_loss"]


def test_demo_runs_again_in_no_time(demo: tuple[Path, dict]) -> None:
    out, figures = demo
    again = cli("demo", "--out", str(out))
    assert again.returncode == 0, again.stderr
    assert "12 of 12 shards done" in again.stdout
    for share in (figures["curated_true_share"], figures["stage1"]["curated"]["text_r1"]):
        assert f"{share:.1%}" in again.stdout
    # The commands that it ends with do what they say.
    commands = again.stdout.partition("try next:")[2].strip().splitlines()
    assert len(commands) == 4
    for line in commands:
        done = cli(*shlex.split(line.strip().removeprefix("capfilt ")))
        assert done.returncode == 0 and done.stdout, done.stderr
    assert cli("verify", str(out)).returncode == 0


def test_demo_without_training(demo: tuple[Path, dict]) -> None:
    out, figures = demo
    corpus = cli("demo", "--out", str(out), "--corpus-only", "--json")
    assert corpus.returncode == 0, corpus.stderr
    expected = {name: figures[name] for name in figures.keys() - {"training_seconds", "stage1", "stage2", "seconds"}}
    found = json.loads(corpus.stdout)
    assert found.pop("seconds") > 0 and found == expected


def test_demo_leaves_other_peoples_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    refused = cli("demo", "--out", str(tmp_path))
    assert refused.returncode == 2 and "something other than a demo corpus" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
