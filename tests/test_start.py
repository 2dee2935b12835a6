"""What a command imports before its first line: reading commands nothing heavy, errors next to nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.corpora import make_corpus
from tests.processes import ROOT
from tests.runs import config_file
from tests.tiny_training import tiny_config

HEAVY = {"pandas", "torch", "ray", "transformers", "open_clip", "cv2", "img2dataset"}
_SCRIPT = """
import json, sys
from typer.testing import CliRunner
from jobs.cli.main import app
from schemas.errors import CapfiltError
for arguments, exit_codes in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, arguments)
    code = 2 if isinstance(result.exception, CapfiltError) else result.exit_code
    assert code in exit_codes, (arguments, result.output, result.exception)
print(json.dumps(sorted(sys.modules)))
"""


def modules_after(*commands: list[str], exit_codes: tuple[int, ...] = (0,)) -> set[str]:
    """Return what is imported in a new process that has run some commands."""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, json.dumps([[command, exit_codes] for command in commands])],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_reading_commands_import_nothing_heavy(tmp_path: Path) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"), shards=1)
    uid = corpus.read("crawl", "cc", "00000")[0]["uid"]
    names = ("status", "stats", "runs", "failures", "shards", "verify", "gc")
    asked = [[name, corpus.root] for name in names]
    asked += [["trace", corpus.root, uid], ["sql", corpus.root, "FROM samples"]]
    asked += [
        ["sql", corpus.root, "FROM candidates JOIN curated USING (uid)", flag] for flag in ("--csv", "--json")
    ]
    assert modules_after(*asked) & HEAVY == set()


def test_planning_and_training_on_one_machine_import_no_ray(tmp_path: Path) -> None:
    corpus = make_corpus(str(tmp_path / "corpus"), shards=1, images=24)
    (tmp_path / "cc.csv").write_text("url,caption\nhttp://example.org/a.jpg,a cat\n")
    source = corpus.config.source[0].model_copy(update={"input": (str(tmp_path / "cc.csv"),)})
    built = str(config_file(corpus.config.model_copy(update={"source": (source,)}), tmp_path / "c.json"))
    trained = str(config_file(tiny_config(tmp_path, corpus.root, optim={"steps": 1}), tmp_path / "t.json"))
    planning = modules_after(
        ["init", str(tmp_path / "cc.csv"), "--out", str(tmp_path / "corpus.toml")],
        ["plan", "-c", built, "--set", f"corpus.path={tmp_path}/new"],
        ["crawl", "-c", built, "--dry-run"],
    )
    assert planning & HEAVY == set()
    training = modules_after(["pretrain", "-c", trained, "--dry-run"], ["pretrain", "-c", trained])
    # The scorers of captions are for a training that scores captions.
    assert {"ray", "pycocoevalcap"} & training == set() and "torch" in training


def test_pandas_can_still_be_had_after_a_reading_command(tmp_path: Path) -> None:
    """Arrow was told that there is none; it must ask again."""
    code = (
        "from jobs.arrow_alone import import_arrow_alone; import_arrow_alone(); import sys; "
        "assert 'pandas' not in sys.modules; import pyarrow; "
        "print(pyarrow.table({'x': [1, 2]}).to_pandas().x.sum())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "3\n", done.stderr


_CONFIG = ["-c", "nowhere.toml"]


@pytest.mark.parametrize(
    "command",
    [
        ["run", *_CONFIG],
        ["plan", *_CONFIG],
        ["crawl", *_CONFIG, "--dry-run"],
        ["pretrain", *_CONFIG],
        ["submit", *_CONFIG, "--", "run"],
        ["doctor", *_CONFIG],
        ["export", "model", "folder", *_CONFIG],
        ["evaluate", "probe", "model", *_CONFIG],
        ["evaluate", "vqa", "model", "--questions", "nowhere.json", "--images", "."],
        ["evaluate", "caption", "model", "--annotations", "nowhere.json", "--images", "."],
        ["status", "nowhere"],
        ["sql", "nowhere", "SELECT 1"],
        ["verify", "nowhere"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_wrong_name_is_told_before_libraries_are_imported(command: list[str]) -> None:
    modules = modules_after(command, exit_codes=(2,))
    assert modules & (HEAVY | {"pyarrow", "duckdb", "numpy"}) == set()
