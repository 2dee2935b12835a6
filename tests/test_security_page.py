"""docs/security.md: what listens is what the page says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/security.md").read_text()
TABLE = dict(re.findall(r"^\| ([a-z_ ]+) \| .* \| ([^|]+) \|$", PAGE, re.MULTILINE))
# Asks the control store for its nodes.
CLIENT = (
    "import sys; from ray._raylet import GcsClient; print(len(GcsClient(sys.argv[1]).get_all_node_info()))"
)


def ask(address: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", CLIENT, address], env=os.environ | environment,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_runs_ray_listens_where_the_page_says_and_asks_for_a_token() -> None:
    command = [sys.executable, "-m", "tests.listeners"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        told = json.loads(process.stdout.readline())
        friend = ask(told["address"], RAY_AUTH_MODE="token")
        strangers = [
            ask(told["address"], RAY_AUTH_MODE="disabled"),
            ask(told["address"], RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64),
        ]
        process.stdin.close()
    assert told["auth"] == "token"
    assert friend.stdout.strip() == "1", friend.stderr
    for stranger in strangers:
        assert stranger.returncode != 0 and "token" in stranger.stderr and not stranger.stdout
    assert told["listeners"] == {name: ["127.0.0.1"] for name in told["listeners"]}
    assert set(told["listeners"]) <= set(TABLE)
    assert {"driver", "gcs_server", "raylet", "worker"} <= set(told["listeners"])
    assert {TABLE[name].strip() for name in told["listeners"]} == {"127.0.0.1"}
