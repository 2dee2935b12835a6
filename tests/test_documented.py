"""What README, docs and recipes call ``capfilt ...`` exists, command and option; tests/test_demo.py runs the lines."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documented import PAGES, ROOT, block_lines, inline_commands, unknown_words

TEXTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_exists(page: Path) -> None:
    lines = [*block_lines(page), *inline_commands(page)]
    assert {line: unknown for line in lines if (unknown := unknown_words(line))} == {}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_every_test_that_a_page_names_is_there(page: Path) -> None:
    named = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", page.read_text())
    assert page.name not in ("testing.md", "security.md") or named
    for file, function in named:
        assert (ROOT / file).is_file(), file
        assert not function or f"def {function}(" in (ROOT / file).read_text(), (file, function)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_every_file_that_a_guide_names_is_there(name: str) -> None:
    text = (ROOT / name).read_text()
    named = re.findall(r"`((?:schemas|pipeline|training|jobs|tests|docs)/[\w./-]*)`", text)
    assert named and [path for path in named if "NAME" not in path and not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_every_name_of_the_code_that_a_guide_names_is_there(name: str) -> None:
    code = {
        word
        for folder in ("schemas", "pipeline", "training", "jobs", "capfilt")
        for file in (ROOT / folder).rglob("*.py")
        for word in re.findall(r"\w+", file.read_text())
    }
    quoted = " ".join(re.findall(r"`([^`\n]+)`", (ROOT / name).read_text()))
    named = set(re.findall(r"\b(?:[A-Z]+_[A-Z_]+|(?:[A-Z][a-z]+){2,})\b", quoted))
    assert len(named) >= 2
    assert named - code == set()


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_every_link_to_a_page_leads_to_a_file_and_a_heading(page: Path) -> None:
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not link.startswith("http") and not (
            target.exists() and (not anchor or anchor in _anchors(target))
        ):
            lost.append(link)
    assert lost == []


def _anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_lines_are_found_and_wrong_ones_too() -> None:
    commands = {page.name: list(block_lines(page)) for page in PAGES}
    assert (
        len(commands["README.md"]) >= 10
        and len(commands["pretrain.md"]) >= 4
        and commands["demo-stage1.toml"]
    )
    assert unknown_words("capfilt statsu demo-corpus") == ["statsu"]
    assert unknown_words("capfilt stats demo-corpus --jsn") == ["--jsn"]
    assert unknown_words("capfilt bench stage3") == ["stage3"]
    assert unknown_words('capfilt sql C "SELECT 1 -- x" --json   # --none') == []


def test_the_program_is_called_by_its_path_where_it_is_not_on_path() -> None:
    """So that what the demo ends with runs as printed before the environment is activated."""
    binaries = Path(sys.executable).parent

    def name(folder: Path, path: str) -> str:
        asked = "from jobs.environment import program_name; print(program_name())"
        done = subprocess.run(
            [sys.executable, "-c", asked],
            cwd=folder,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert name(binaries, str(binaries)) == "capfilt"
    assert name(binaries.parent, "/usr/bin:/bin") == f"{binaries.name}/capfilt"
    assert name(Path("/usr"), "/usr/bin:/bin") == str(binaries / "capfilt")
