"""What the nodes of a cluster say of themselves, in one table."""

from pathlib import Path

import pytest

from jobs.cluster.node_checks import names_of, rows_of
from jobs.doctor import Check, node_checks
from schemas.config import CapfiltConfig
from tests.runs import small_config


def test_findings_are_rows_and_differing_versions_are_named() -> None:
    alike = Check(name="python", state="ok", found="3.11.7")
    bad = Check(name="storage", state="fail", found="refused", mend="give it credentials")
    found = {
        f"10.0.0.{n}": [alike, Check(name="torch", state="ok", found="2.0" if n else "2.1")] for n in range(5)
    }
    found["10.0.0.3"].append(bad)
    rows = rows_of(found)
    assert [(row["state"], row["check"], row["found"]) for row in rows] == [
        ("fail", "storage", "refused"),
        ("warn", "torch", "2.1"),
        ("warn", "torch", "2.0"),
        ("ok", "python", "3.11.7"),
    ]
    assert [names_of(row["nodes"], 5) for row in rows] == [
        "10.0.0.3",
        "10.0.0.0",
        "4 of 5",
        "all 5",
    ]
    assert [row["mend"] for row in rows] == [
        "give it credentials",
        *["install one version on all nodes"] * 2,
        "",
    ]


@pytest.mark.parametrize(
    ("listed", "gpus", "state"), [("A\nA\nB\n", 3, "ok"), ("A\n", 2, "fail"), ("", 0, "ok")]
)
def test_a_node_shows_the_gpus_that_the_cluster_counts_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str, gpus: int, state: str
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{listed.replace(chr(10), chr(92) + 'n')}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    config = small_config(str(tmp_path / "corpus"), tmp_path / "urls.parquet", "http://127.0.0.1:9", 1, 1)
    checks = {check.name: check for check in node_checks(CapfiltConfig.model_validate(config), gpus)}
    assert (checks["device"].state, ("compiler" in checks)) == (state, gpus > 0)
    assert checks["captioner"].state == checks["storage"].state == "ok"
    if listed.startswith("A\nA"):
        assert checks["device"].found == "2 x A, 1 x B"
