"""docs/quickstart.md as a newcomer follows it: each command in its order, and the answers that it prints."""

from pathlib import Path

import pytest

from jobs.demo.world.site import image_bytes
from tests.documented import ROOT, agrees, answer_of, block_lines, run_line

pytestmark = pytest.mark.slow
PAGE = ROOT / "docs" / "quickstart.md"


def test_the_page_is_what_happens(tmp_path: Path) -> None:
    (tmp_path / "pets").mkdir()
    for number in range(200):
        (tmp_path / "pets" / f"{number:03d}.jpg").write_bytes(image_bytes(number))
    lines = list(block_lines(PAGE))
    assert len(lines) == 9
    output = {}
    for line in lines:
        done = run_line(line, tmp_path)
        assert done.returncode == 0, (line, done.stderr)
        output[line] = (done.stdout + done.stderr).splitlines()
    for line in lines:
        printed = [shown for shown in answer_of(PAGE, line.partition("  #")[0]) if shown.strip()]
        assert [
            shown for shown in printed if not any(agrees(shown, came, 0.01) for came in output[line])
        ] == []
    init, *_ = lines
    # What a command suggests next runs too.
    for suggested in output[init][output[init].index("try next:") + 1 :]:
        assert run_line(suggested.strip(), tmp_path).returncode == 0, suggested
