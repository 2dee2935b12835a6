"""The command line as a person meets it: exit codes, one clear line for an error, JSON on standard output alone."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli.main import app
from jobs.demo.world.site import write_url_list
from pipeline.corpus.records import Records
from pipeline.storage.storage import Storage
from tests.processes import ROOT, cli, cli_here, start_cli, what_comes
from tests.runs import config_file, small_config, with_values

COMMANDS = (
    "demo init run crawl caption rank select submit plan status stats failures sql trace verify gc shards manifest "
    "doctor"
)


def test_every_command_is_there_and_documented() -> None:
    page = (Path(__file__).parent.parent / "docs" / "cli.md").read_text()
    documented = set(re.findall(r"^## (\w+)$", page, re.M))
    assert set(COMMANDS.split()) <= documented


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "-c", "absent.toml"], r"absent\.toml: no such config file"),
        (
            ["run", "-c", "{good}", "--set", "crawl.thread=1"],
            r"crawl\.thread: unknown key; did you mean crawl\.threads",
        ),
        (["crawl", "-c", "{good}", "--retry", "everything"], r"--retry 'everything'"),
        (["run", "-c", "{good}", "--set", "caption.model=./nowhere"], r"caption\.model"),
        (["caption", "-c", "{good}"], r"no shard|model"),
        (["stats", "{empty}"], r"is not a corpus"),
        (["sql", "{empty}", "SELECT 1"], r"is not a corpus"),
        (
            ["submit", "-c", "{good}", "--address", "http://127.0.0.1:9", "--", "crawl"],
            r"--address http://127\.0\.0\.1:9",
        ),
        (["submit", "-c", "{good}", "--", "demo"], r"must be one of run, crawl"),
        (["plan", "-c", "{good}", "--set", "corpus.path={good}"], r"corpus\.path '.*good\.toml' is a file"),
        (["run", "-c", "{good}", "--set", "corpus.path={good}/x"], r"corpus\.path .* above it is a file"),
        (
            ["submit", "-c", "{good}", "--set", "corpus.path={good}", "--", "crawl"],
            r"corpus\.path .* is a file",
        ),
        # What needs neither weights nor open_clip to be known is known before anything is asked for.
        (["plan", "-c", "{good}", "--set", "rank.model=ViT-L-15"], r"not an architecture .* mean ViT-L-16"),
        (
            ["plan", "-c", "{good}", "--set", "caption.model=nosuch"],
            r"caption\.model = 'nosuch': no such folder",
        ),
        (
            ["run", "--dry-run", "-c", "{good}", "--set", "rank.model=local-dir:/no/such"],
            r"rank\.model = 'local-dir:/no/such': there is no folder /no/such",
        ),
        (["pretrain", "-c", "{good}"], r"is the config of a corpus, for capfilt run"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_user_errors_are_one_clear_line_and_exit_2(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "u.csv").write_text("url,caption\nhttp://example.org/a.jpg,a cat\n")
    good = tmp_path / "good.toml"
    good.write_text('[corpus]\npath = "corpus"\n[[source]]\nname = "s"\ninput = ["u.csv"]\n')
    (tmp_path / "empty").mkdir()
    filled = [argument.format(good=good, empty=tmp_path / "empty") for argument in arguments]
    done = cli_here(*filled)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(message, done.stderr) and "Traceback" not in done.stderr
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize("words", [(), ("bench",), ("evaluate",)], ids=" ".join)
@pytest.mark.parametrize("columns", ["80", "100"])
def test_help_cuts_no_description(words: tuple[str, ...], columns: str) -> None:
    printed = CliRunner(env={"COLUMNS": columns}).invoke(app, [*words, "-h"]).output
    assert "..." not in printed.replace("[ARGS]...", "").replace("(step-...)", "")
    assert all(len(line) <= int(columns) for line in printed.splitlines())


def test_help_groups_the_commands_each_on_one_line() -> None:
    printed = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["--help"]).output
    sections = dict(re.findall(r"^(\w[^\n]*):\n((?:  .*\n)+)", printed, re.M))
    groups = {
        heading: [line.split()[0] for line in lines.splitlines()]
        for heading, lines in sections.items()
        if heading != "Options"
    }
    assert groups == {
        "Build a corpus": [
            "init",
            "run",
            "crawl",
            "caption",
            "rank",
            "filter",
            "select",
            "plan",
            "submit",
            "jobs",
            "logs",
            "stop",
            "demo",
        ],
        "Look into a corpus": [
            "look",
            "status",
            "stats",
            "runs",
            "failures",
            "shards",
            "card",
            "sql",
            "trace",
        ],
        "Keep a corpus in order": ["mark", "verify", "gc", "manifest", "doctor"],
        "Train": ["pretrain", "bootstrap", "export"],
        "Measure": ["experiment", "evaluate", "bench"],
    }


def test_the_shell_completes_commands_and_options() -> None:
    def complete(line: str) -> list[str]:
        words = line.split(" ")
        asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_CAPFILT_COMPLETE": "complete_bash"}
        script = "from jobs.cli.main import main; import sys; sys.argv = ['capfilt']; main()"
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, **asked},
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        return done.stdout.split()

    assert complete("capfilt st") == ["stop", "status", "stats"]
    assert "--hosts" in complete("capfilt failures --h")


@pytest.mark.parametrize("command", ["run", "stats"])
def test_no_name_reaches_the_terminal_as_a_control_sequence(command: str, tmp_path: Path) -> None:
    name = str(tmp_path / "\x1b[31mred\x9b2J\u202e.toml")
    done = cli(*([command, "-c", name] if command == "run" else [command, name]))
    assert done.returncode == 2
    assert done.stderr.replace("\n", "").isprintable() and "[31mred" in done.stderr


def catches_sigterm(pid: int) -> bool:
    """Tell whether a process has a handler for SIGTERM."""
    [caught] = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def signalled(
    run: subprocess.Popen, reached: Callable[[], bool], *numbers: signal.Signals
) -> tuple[str, str]:
    """Send a command some signals once it has come so far; return what it printed."""
    deadline = time.monotonic() + 120
    while not reached() and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.02)
    for number in numbers:
        run.send_signal(number)
        time.sleep(0.1)
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + numbers[0], output + errors
    assert "Traceback" not in errors and "***" not in errors, errors
    return output, errors


def test_sigterm_at_pythons_start_leaves_nothing(base_url: str, tmp_path: Path) -> None:
    config = small_config(str(tmp_path / "corpus"), tmp_path / "urls.parquet", base_url, 60, 6)
    run = start_cli("run", "-c", str(config_file(config, tmp_path / "c.json")))
    _, errors = signalled(run, lambda: catches_sigterm(run.pid), signal.SIGTERM)
    assert "SIGTERM: stopping" in errors and not (tmp_path / "corpus").exists()


@pytest.mark.slow
@pytest.mark.ray
def test_signals_end_a_run_on_ray_in_order_and_the_same_command_goes_on(
    base_url: str, tmp_path: Path
) -> None:
    config = small_config(str(tmp_path / "corpus"), tmp_path / "urls.parquet", base_url, 90, 6)
    # The first stage, which loads no model: what follows it is stopped in the same way.
    command = ("crawl", "-c", str(config_file(config, tmp_path / "c.json")))
    records = Records(Storage(config.corpus.path))
    output, errors = signalled(start_cli(*command), records.shards, signal.SIGTERM)
    assert "SIGTERM: stopping" in errors and "the same command goes on" in output
    [ended] = records.runs()
    first = records.shards()
    assert (ended.outcome, ended.shards_done) == ("interrupted", len(first)) and first

    goes_on = start_cli(*command)
    output, errors = signalled(goes_on, lambda: records.shards() != first, signal.SIGINT, signal.SIGINT)
    assert f"crawl    {len(first)} of 15 shards done" in output and "the same command goes on" in output
    assert "Ctrl-C: stopping" in errors and "Ctrl-C again: stopping" in errors
    ended = records.runs()[-1]
    # The second signal does not wait for Ray: until that is down, a worker may commit what it has at hand.
    assert ended.outcome == "interrupted"
    assert len(records.shards()) - len(first) - ended.shards_done in range(4)


@pytest.mark.slow
@pytest.mark.ray
def test_a_terminal_is_left_as_it_was_where_ray_is_interrupted_at_its_start(
    base_url: str, tmp_path: Path
) -> None:
    config = small_config(str(tmp_path / "corpus"), tmp_path / "urls.parquet", base_url, 20, 10)
    main, terminal = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "run", "-c", str(config_file(config, tmp_path / "c.json"))],
        cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(terminal)
    printed = b""
    for part in what_comes(main):
        printed += part
        if b"starting Ray" in printed:
            run.send_signal(signal.SIGTERM)
            break
    printed += b"".join(what_comes(main))
    os.close(main)
    assert run.wait(60) == 143
    assert printed.rindex(b"\x1b[?25h") > printed.rindex(b"\x1b[?25l"), "the cursor stays hidden"
    after = printed.partition(b"SIGTERM: stopping")[2].decode()
    assert "the same command goes on" in after and "starting Ray" not in after
    [ended] = Records(Storage(config.corpus.path)).runs()
    assert (ended.outcome, ended.shards_done) == ("interrupted", 0)


@pytest.mark.slow
def test_plan_before_and_after(base_url: str, tmp_path: Path) -> None:
    config = small_config(str(tmp_path / "corpus"), tmp_path / "urls.parquet", base_url, 20, 10)
    file = str(config_file(config, tmp_path / "c.json"))

    def plan(file: str) -> dict:
        return json.loads(cli_here("plan", "-c", file, "--json").stdout)

    before = plan(file)
    assert before["unread_rows"] == {"world": 20} and before["worker_hours"] > 0 and before["bytes"] > 0
    assert [(row["stage"], row["pending"], row["basis"]) for row in before["stages"]] == [
        (stage, 2, "estimate") for stage in ("crawl", "caption", "rank", "select")
    ]
    assert not (tmp_path / "corpus").exists(), "plan must not write"
    crawled = json.loads(cli_here("crawl", "-c", file, "--local", "--json").stdout)
    assert crawled["outcome"] == "done" and crawled["stages"]["crawl"] == {"done": 2, "total": 2}
    write_url_list(tmp_path / "urls.parquet", base_url, 20, seed=1)
    assert plan(file)["unread_rows"] == {"world": 0}
    assert "world: its lists have changed, none is longer" in cli_here("plan", "-c", file).stdout
    rows = {row["stage"]: row for row in plan(file)["stages"]}
    assert rows["crawl"]["done"] == 2 and rows["crawl"]["basis"] == "measured"
    assert rows["caption"]["pending"] == 2 and rows["caption"]["basis"] == "estimate"
    smaller = with_values(config, crawl={"image_size_px": 32})
    stale = {row["stage"]: row for row in plan(str(config_file(smaller, tmp_path / "d.json")))["stages"]}
    assert stale["crawl"]["stale"] == 2
