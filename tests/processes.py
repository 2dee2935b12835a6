"""The command line, in this process or as one; Ray's workers as processes: found, killed."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from jobs.cli.main import main

ROOT = Path(__file__).resolve().parent.parent


def start_cli(*arguments: str, **options: object) -> subprocess.Popen:
    """Start ``capfilt`` as a process of its own, in a group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def cli(*arguments: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """Run ``capfilt`` to its end, with changes to this process's environment."""
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def cli_here(*arguments: str) -> subprocess.CompletedProcess:
    """Run ``capfilt`` to its end in this process, which has its libraries already; else as ``cli``."""
    output, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["capfilt", *arguments]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return subprocess.CompletedProcess(arguments, ended.value.code or 0, output.getvalue(), errors.getvalue())


@contextlib.contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Call a function in a thread while the block runs a command in this process, which it may send signals.

    A signal that comes after the command's end has no effect. If the function fails, the command is asked to stop.
    """
    failures: list[BaseException] = []

    def call() -> None:
        try:
            act()
        except BaseException as error:
            failures.append(error)
            os.kill(os.getpid(), signal.SIGTERM)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert failures == []


def what_comes(terminal: int) -> Iterator[bytes]:
    """Yield what is written to the other end of a pseudo-terminal, until that is closed."""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # Linux says so where the other end is closed
            return
        if not part:
            return
        yield part


def descendants(pid: int) -> list[int]:
    """Return every living process below ``pid``."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    pids, queue = [], [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        pids += children
        queue += children
    return pids


def stage_workers(pid: int, stage: str = "") -> list[int]:
    """Return the processes below ``pid`` that are actors of a stage (of any)."""
    workers = []
    for child in descendants(pid):
        try:
            command = Path(f"/proc/{child}/cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if command.startswith("ray::MapWorker") and f"{stage.title()}Actor" in command:
            workers.append(child)
    return workers


def kill(pid: int) -> bool:
    """Kill -9; False: it was gone."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
