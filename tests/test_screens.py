"""What the reading commands show on terminals of 80, 100 and 200 columns, and in a pipe, to the letter.

The expected screens lie in tests/golden/. After a change that is meant, look at each of them:

    python -m tests.test_screens && git diff tests/golden
"""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.cells import cell_len

from schemas.records import QuarantineRecord
from tests.corpora import RUN, Corpus, make_corpus
from tests.processes import ROOT, what_comes

GOLDEN = Path(__file__).parent / "golden"
WIDTHS = (80, 100, 200, None)
_NOW = "2026-01-01T00:00:00.000000+00:00"
_LONG = "a-path-that-no-screen-is-wide-enough-for/" * 7
_COMMANDS = [
    ["status", "CORPUS"],
    ["stats", "CORPUS"],
    ["runs", "CORPUS"],
    ["failures", "CORPUS"],
    ["shards", "CORPUS", "--source", "cc"],
    ["shards", "CORPUS", "--state", "quarantined"],
    ["verify", "CORPUS", "--quick"],
    ["gc", "CORPUS", "--dry-run"],
    ["trace", "CORPUS", "KEPT"],
    ["trace", "CORPUS", "KEPT", "--wide"],
    ["trace", "CORPUS", "FAILED"],
    ["sql", "CORPUS", "SHOW TABLES"],
    ["sql", "CORPUS", "DESCRIBE curated"],
    ["sql", "CORPUS", "SELECT * FROM samples ORDER BY source, key LIMIT 3"],
    ["sql", "CORPUS", "SELECT uid, url, caption FROM curated ORDER BY source, key LIMIT 2"],
    ["sql", "CORPUS", "SELECT uid, url, sha256 FROM samples WHERE source = 'laion' ORDER BY key LIMIT 2"],
    ["sql", "CORPUS", "SELECT digest, kind, files FROM models ORDER BY kind"],
]
# The command line itself, once for all commands: it takes a second to start.
_SCRIPT = """
import json, sys
from jobs.cli.main import main
for command in json.loads(sys.argv[1]):
    print("$ capfilt", *command, flush=True)
    sys.argv = ["capfilt", *command]
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        if end.code: print("exit code", end.code)
    print()
"""


def build(folder: Path) -> tuple[dict[str, str], set[str]]:
    """Make the corpus that is looked at; return what names in ``_COMMANDS`` stand for, and the attempts' ids."""
    corpus = make_corpus(str(folder / "corpus"), shards=2)
    corpus.add_urls(
        "laion", ["00000"], 4, path=_LONG, caption=" 一只猫坐在垫子上 \x1b[31m" + " and so on" * 9
    )
    corpus.make("laion", "00000")
    corpus.add_urls("laion", ["00001"], 4, batch=1)
    error = (
        "ValueError: \x1b]0;title\x07 the shard's tar is cut: 12 of 40 members, see https://host.example/"
        + _LONG
    )
    corpus.records.quarantine(
        QuarantineRecord(
            stage="crawl",
            source="laion",
            shard="00001",
            run_id=RUN,
            attempts=3,
            error=error,
            finished_at=_NOW,
        )
    )
    attempts = _settle(corpus)
    orphan = Path(corpus.storage.url("raw/cc/00000.0123456789ab.tar"))
    orphan.write_bytes(b"x" * 1234)
    os.utime(orphan, (0, 0))
    kept, failed = (row["uid"] for row in corpus.read("crawl", "laion", "00000")[:2])
    return {"CORPUS": corpus.root, "KEPT": kept, "FAILED": failed}, attempts


def _settle(corpus: Corpus) -> set[str]:
    """Give every record the same time, host and duration; return the ids of their attempts."""
    attempts = set()
    for info in corpus.storage.list("records"):
        record = json.loads(corpus.storage.read(info.path))
        for name in ("started_at", "finished_at", "registered_at"):
            if record.get(name):
                record[name] = _NOW
        if "signature" in record:
            record["signature"] = "e" * 64
        elif "attempt" in record:
            attempts.add(record["attempt"])
        if "host" in record:
            record["host"] = "here"
        if "seconds" in record:
            record["seconds"] = dict.fromkeys(record["seconds"], 0.5)
        corpus.storage.write(info.path, json.dumps(record).encode())
    return attempts


def screen(names: dict[str, str], width: int | None) -> str:
    """Return what the commands print on a terminal of that width, or in a pipe."""
    commands = [[names.get(word, word) for word in command] for command in _COMMANDS]
    process = [sys.executable, "-c", _SCRIPT, json.dumps(commands)]
    if width is None:
        done = subprocess.run(process, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    with subprocess.Popen(
        process, stdin=terminal, stdout=terminal, stderr=subprocess.PIPE, cwd=ROOT, env=environment
    ) as child:
        os.close(terminal)
        printed = b"".join(what_comes(main))
        assert child.wait() == 0, child.stderr.read().decode()
    os.close(main)
    return printed.decode().replace("\r\n", "\n")


def settled(text: str, root: str, attempts: set[str]) -> str:
    """Return a screen with what differs from run to run replaced by as many letters."""
    return re.sub("|".join(attempts), "a" * 12, text).replace(root, "/tmp/capfilt-xxxxxxxx/corpus")


def shots() -> dict[int | None, tuple[str, str]]:
    """Return each width's screen as it is, and settled."""
    # Of this length always: what finds room depends on it.
    with tempfile.TemporaryDirectory(prefix="capfilt-", dir="/tmp") as folder:
        names, attempts = build(Path(folder))
        screen_by_width = {width: screen(names, width) for width in WIDTHS}
        return {
            width: (text, settled(text, names["CORPUS"], attempts)) for width, text in screen_by_width.items()
        }


def golden(width: int | None) -> Path:
    """Return the file of a width's expected screen."""
    return GOLDEN / f"{width or 'pipe'}.txt"


@pytest.fixture(scope="module")
def screens() -> dict[int | None, tuple[str, str]]:
    return shots()


@pytest.mark.parametrize("width", WIDTHS)
def test_screens_are_as_they_were_looked_at(screens: dict, width: int | None) -> None:
    assert screens[width][1] == golden(width).read_text(), "meant? python -m tests.test_screens"


@pytest.mark.parametrize("width", [80, 100, 200])
def test_what_a_screen_shows_of_an_identifier_is_all_of_it(screens: dict, width: int) -> None:
    whole = set(_identifiers(screens[None][0]))
    assert len(whole) > 40
    short = {word[:12] for word in whole if re.fullmatch(r"[0-9a-f]{64}", word)}
    shown = set(_identifiers(screens[width][0]))
    assert shown - whole - short == set()


def _identifiers(text: str) -> Iterator[str]:
    """Yield the uids, run ids, digests, paths and URLs of a screen, and what is left of broken ones."""
    for word in re.split(r"[\s|=,()'\"]+", text):
        if re.fullmatch(r"[0-9a-f]{10,}", word) or "/" in word or re.match(r"\d{8}T", word):
            yield word


@pytest.mark.parametrize("width", [80, 100, 200])
def test_every_column_of_an_answer_is_shown_or_named(screens: dict, width: int) -> None:
    answers = dict(zip(_answers(screens[None][0]), _answers(screens[width][0]), strict=True))
    for (command, piped), (_, shown) in answers.items():
        if command.startswith("$ capfilt sql"):
            assert set(re.findall(r"\w+", piped.splitlines()[0])) <= set(re.findall(r"\w+", shown)), command


def _answers(text: str) -> list[tuple[str, str]]:
    parts = re.split(r"^(\$ capfilt .*)\n", text, flags=re.M)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_table_is_wider_than_its_screen(screens: dict, width: int) -> None:
    for command, shown in _answers(screens[width][1]):
        if "--wide" not in command:
            assert all(cell_len(line) <= width or " " not in line for line in shown.splitlines())


def test_no_screen_holds_a_control_sequence(screens: dict) -> None:
    for text, _ in screens.values():
        assert text.replace("\n", "").isprintable()


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for shot_width, (_, text) in shots().items():
        golden(shot_width).write_text(text)
        print(golden(shot_width))
