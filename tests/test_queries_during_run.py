"""Two processes query the manifest while a run writes: no lock, no error, never a half-written row."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.demo.world.site import serving
from tests.processes import ROOT, cli_here, start_cli
from tests.runs import config_file, small_config, with_values

pytestmark = pytest.mark.slow

# Opens the catalog anew each time, as a person at a prompt would, until standard input ends.
_PLAIN_DUCKDB = """
import duckdb, json, os, select, sys, time
counts, path = [], sys.argv[1]
while not select.select([sys.stdin], [], [], 0.4)[0]:
    if os.path.exists(path):
        with duckdb.connect(path, read_only=True) as connection:
            counts.append(connection.sql(
                "SELECT (SELECT count(*) FROM samples), (SELECT count(*) FROM curated), "
                "(SELECT count(*) FROM curated WHERE len(captions) = 0)").fetchall()[0])
print(json.dumps(counts))
"""


def test_readers_and_a_writing_run_do_not_disturb_each_other(tmp_path: Path) -> None:
    with serving(flaky=False) as base_url:
        config = small_config(str(tmp_path / "corpus"), tmp_path / "urls.parquet", base_url, 50, 5)
        config = with_values(config, cluster={"compact_interval_s": 0.5})
        run = start_cli("run", "--local", "-c", str(config_file(config, tmp_path / "c.json")))
        plain = subprocess.Popen(
            [sys.executable, "-c", _PLAIN_DUCKDB, str(tmp_path / "corpus" / "manifest.duckdb")],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        driver_counts: list[int] = []
        while run.poll() is None:
            asked = cli_here("sql", config.corpus.path, "SELECT count(*) AS n FROM curated", "--json")
            if asked.returncode == 0:
                driver_counts.append(json.loads(asked.stdout)[0]["n"])
            else:
                assert "is not a corpus" in asked.stderr and not driver_counts, (
                    asked.stderr
                )  # before the first record
            time.sleep(0.4)
        output, errors = run.communicate()
        assert run.returncode == 0, output + errors
        seen, errors = plain.communicate("", timeout=60)
        assert plain.returncode == 0, errors
    reader_counts = json.loads(seen)
    final = json.loads(
        cli_here("sql", config.corpus.path, "SELECT count(*) AS n FROM curated", "--json").stdout
    )[0]["n"]
    samples, curated, empty = zip(*reader_counts, strict=True)
    for counts in (driver_counts, samples, curated):
        assert list(counts) == sorted(counts)
        assert len(set(counts)) >= 2, "nobody looked while the run wrote"
    assert set(empty) == {0}
    assert max(curated) <= final and max(driver_counts) <= final and final > 30
