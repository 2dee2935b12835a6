"""The command lines of README, docs and recipes, how they are run, and the answers that are printed with them."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import typer.main

from jobs.cli.main import app
from tests.processes import ROOT, cli_here

PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "jobs" / "recipes").glob("*.toml")),
)
# In a code block after the prompt or at its margin, in a recipe's opening comment.
_BLOCK_LINE = re.compile(r"^(?:\$ |\s{2,}|#\s+)?(?:\.venv/bin/)?(capfilt [a-z].*)$")
_INLINE = re.compile(r"`(capfilt [a-z][^`]*)`")


def block_lines(page: Path) -> Iterator[str]:
    """Yield the ``capfilt`` lines of a page's code blocks (of a recipe: of its comments), as printed."""
    in_fence = False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            in_fence = not in_fence
        in_block = in_fence or line.startswith("    ") or (page.suffix == ".toml" and line.startswith("#"))
        if in_block and (match := _BLOCK_LINE.match(line)):
            yield match[1].rstrip()


def inline_commands(page: Path) -> Iterator[str]:
    """Yield what a page's text calls ``capfilt ...``, code blocks left out."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    yield from (" ".join(command.split()) for command in _INLINE.findall(text))


def unknown_words(line: str) -> list[str]:
    """Return the commands and options of a line that the command line does not have."""
    command = typer.main.get_command(app)
    unknown = []
    words = shlex.split(line, comments=True)[1:]
    for position, word in enumerate(words):
        if word == "--":
            break
        if hasattr(command, "commands"):
            if (below := command.commands.get(word)) is None:
                return [*unknown, word]
            command = below
        elif re.fullmatch(r"--?[a-z][a-z-]*(=.*)?", word):
            options = {
                option for parameter in command.params for option in parameter.opts + parameter.secondary_opts
            }
            # "-h" and "--help" are the library's own.
            if word.partition("=")[0] not in options | {"-h", "--help"} and words[position - 1] != "--set":
                unknown.append(word)
    return unknown


def shell(line: str, folder: Path, timeout: float = 600) -> subprocess.CompletedProcess:
    """Run a line as it is printed, in a folder that stands for the checkout: ``capfilt`` on PATH, the recipes there."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", _with_recipes(line)],
        cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def run_line(line: str, folder: Path) -> subprocess.CompletedProcess:
    """Run a ``capfilt`` line as ``shell`` does, but in this process, which has its libraries already."""
    with contextlib.chdir(folder):
        return cli_here(*shlex.split(_with_recipes(line), comments=True)[1:])


def _with_recipes(line: str) -> str:
    # By their own place, since a run keeps the absolute paths of its models.
    return line.replace("jobs/recipes/", f"{ROOT}/jobs/recipes/")


def answer_of(page: Path, command: str) -> list[str]:
    """Return what a page prints beneath ``$ command`` up to the next prompt, without what it leaves out (``...``)."""
    lines = page.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"$ {command}"))
    answer = []
    for line in lines[start + 1 :]:
        if line.startswith(("$ ", "```")):
            break
        if line.strip() not in ("", "..."):
            answer.append(line)
    return answer


def agrees(printed: str, comes: str, tolerance: float) -> bool:
    """Tell whether a line says the same, its numbers within a share of themselves, durations apart.

    Numbers may differ in their last digits on another processor; every word, name and digest may not.
    """
    # Where the command is not on PATH, its place is printed.
    printed = printed.replace(".venv/bin/capfilt ", "capfilt ")
    expected, actual = (re.sub(r"[\d.]+ s\b", "some s", line).split() for line in (printed, comes))
    return len(expected) == len(actual) and all(
        left == right or _close(left, right, tolerance) for left, right in zip(expected, actual, strict=True)
    )


def _close(printed: str, comes: str, tolerance: float) -> bool:
    numbers = [re.fullmatch(r"(-?[\d,]*\.?\d+)([%,]?)", word) for word in (printed, comes)]
    if not all(numbers) or numbers[0][2] != numbers[1][2]:
        return False
    expected, actual = (float(number[1].replace(",", "")) for number in numbers)
    # Half of the last digit that is printed is rounding.
    decimals = len(numbers[0][1].partition(".")[2])
    return abs(expected - actual) <= max(tolerance * abs(expected), 0.5 * 10**-decimals)
