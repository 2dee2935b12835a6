"""``capfilt demo`` as a newcomer runs it, judged by the world's own truth."""

import json
from pathlib import Path

import pytest

from tests.processes import cli

pytestmark = pytest.mark.slow


def test_demo_makes_captions_true_and_runs_again_in_no_time(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    first = cli("demo", "--out", str(out), "--json", timeout=600)
    assert first.returncode == 0, first.stderr
    figures = json.loads(first.stdout)
    assert figures["urls"] >= 2000
    assert figures["images"] + figures["failures"] == figures["urls"]
    assert 0.10 <= figures["failures"] / figures["urls"] <= 0.20
    assert sum(figures["failures_by_reason"].values()) == figures["failures"]
    assert figures["curated_images"] + figures["dropped"] == figures["images"]
    assert figures["web_true_share"] <= 0.60
    assert figures["curated_true_share"] >= 0.90
    assert figures["seconds"] > 0

    again = cli("demo", "--out", str(out))
    assert again.returncode == 0, again.stderr
    assert "12 of 12 shards done" in again.stdout
    share = f"{figures['curated_true_share']:.1%}"
    assert share in again.stdout and "try next:" in again.stdout
    # The commands that it ends with do what they say.
    for line in again.stdout.partition("try next:")[2].strip().splitlines():
        command = line.strip().removeprefix("capfilt ")
        name, corpus, *rest = command.split(" ", 2)
        done = cli(name, corpus, *(argument.strip('"') for argument in rest))
        assert done.returncode == 0 and done.stdout, done.stderr
    assert cli("verify", str(out)).returncode == 0


def test_demo_leaves_other_peoples_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    refused = cli("demo", "--out", str(tmp_path))
    assert refused.returncode == 2 and "something other than a demo corpus" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
