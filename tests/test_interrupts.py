"""Signals: none is lost, whatever library is at work when it comes."""

import io
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console
from rich.live import Live

from jobs.interrupts import Interrupts
from tests.processes import ROOT


class _Handle:
    """Sends a signal from its destructor, where what a handler raises is lost."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_inside_a_destructor_still_interrupts(capfd: pytest.CaptureFixture[str]) -> None:
    with Interrupts("at once") as interrupts:
        handle = _Handle()
        with pytest.raises(KeyboardInterrupt):
            del handle
            time.sleep(20)
        assert interrupts.count == 1 and interrupts.exit_code == 143
    assert capfd.readouterr().err == "capfilt: SIGTERM: stopping; at once\n"


def test_what_a_signal_says_stands_above_a_live_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=80)
    with Interrupts("soon") as interrupts, Live("a table", console=console, auto_refresh=False):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        interrupts.log("and more")
    assert "capfilt: SIGTERM: stopping; soon\ncapfilt: and more\na table" in re.sub(
        r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", terminal.getvalue()
    ).replace("a tablecapfilt", "capfilt")


def test_a_signal_inside_the_hook_of_a_fork_waits_for_the_end_of_the_start() -> None:
    armed = [True]

    def signal_once() -> None:
        if armed and armed.pop():
            signal.raise_signal(signal.SIGTERM)

    os.register_at_fork(after_in_parent=signal_once)
    went_on = False
    with Interrupts(quiet=True) as interrupts:
        with pytest.raises(KeyboardInterrupt), interrupts.delayed():
            if not (child := os.fork()):
                os._exit(0)
            os.waitpid(child, 0)
            went_on = True
        assert went_on and interrupts.count == 1


def test_a_start_that_takes_sigterm_for_itself_does_not_get_it() -> None:
    own = signal.getsignal(signal.SIGTERM)
    with Interrupts(quiet=True) as interrupts:
        with pytest.raises(KeyboardInterrupt), interrupts.delayed():
            signal.signal(signal.SIGTERM, lambda number, frame: os._exit(number))
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == interrupts.handle
    assert signal.getsignal(signal.SIGTERM) == own


def test_the_second_signal_does_not_wait_for_the_start() -> None:
    with Interrupts(quiet=True) as interrupts, pytest.raises(KeyboardInterrupt), interrupts.delayed():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on after the second signal")


def test_work_that_asks_is_not_interrupted_where_a_start_ends() -> None:
    with Interrupts(quiet=True) as interrupts:
        assert not interrupts.asked()
        with interrupts.delayed():
            signal.raise_signal(signal.SIGTERM)
        assert interrupts.asked()


def test_a_first_signal_leaves_the_grace_and_a_second_does_not() -> None:
    with Interrupts(quiet=True) as interrupts, pytest.raises(KeyboardInterrupt), interrupts.graced(60):
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.count == 1, "the block goes on"
    with Interrupts(quiet=True) as interrupts, pytest.raises(KeyboardInterrupt), interrupts.graced(0.2):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(20)
    with Interrupts(quiet=True) as interrupts, pytest.raises(KeyboardInterrupt), interrupts.graced(60):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("went on after the second signal")


@pytest.mark.slow
def test_ray_does_not_abort_a_process_that_was_asked_to_stop_while_it_starts() -> None:
    code = (
        "import os, signal, sys, time, ray\n"
        "from jobs.interrupts import Interrupts\n"
        "with Interrupts('soon') as interrupts:\n"
        "    try:\n"
        "        with interrupts.delayed():\n"
        "            ray.init(address='local', num_cpus=1, include_dashboard=False, log_to_driver=False)\n"
        "            os.kill(os.getpid(), signal.SIGTERM)  # where Ray's own handler is in force\n"
        "            time.sleep(4)\n"
        "    except KeyboardInterrupt:\n"
        "        print('stopped')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr
