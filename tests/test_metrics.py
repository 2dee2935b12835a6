"""The metrics' names: in the documentation, the board and the alert rules, and nothing else there."""

import json
import re
from pathlib import Path

import pytest
import yaml

from pipeline.runs.events import ShardEvent
from pipeline.runs.metrics import LABELS, METRICS, STORAGE_AWAY, RunMetrics, rows_by_reason
from pipeline.runs.progress import ProgressCounter
from schemas.json_record import utc_now
from tests.processes import ROOT

FOLDER = Path(ROOT) / "docs" / "cluster"
EXPORTED = {f"ray_{name}" for name in (*METRICS, STORAGE_AWAY)}


def expressions() -> dict[str, str]:
    """Return the PromQL of the board's panels and of the alerts, by title."""
    board = json.loads((FOLDER / "grafana.json").read_text())
    of_panels = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in board["panels"]
        for target in panel["targets"]
    }
    [group] = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return of_panels | {rule["alert"]: rule["expr"] for rule in group["rules"]}


@pytest.mark.parametrize("title", expressions())
def test_the_board_and_the_alerts_ask_for_metrics_and_labels_that_there_are(title: str) -> None:
    expression = expressions()[title]
    selectors = re.findall(r"(ray_\w+)(?:\{([^}]*)\})?", expression)
    assert selectors
    for name, matchers in selectors:
        assert name in EXPORTED
        metric = METRICS.get(name.removeprefix("ray_"))
        labels = {"corpus"} | ({*LABELS, *metric.labels} if metric else set())
        assert set(re.findall(r"(\w+)[!=]", matchers)) <= labels, matchers
    for names in re.findall(r"by \(([^)]*)\)", expression):
        known = {"corpus", *LABELS} | {label for metric in METRICS.values() for label in metric.labels}
        assert {name.strip() for name in names.split(",")} <= known


def test_the_documentation_names_each_metric() -> None:
    page = (FOLDER.parent / "cluster.md").read_text()
    assert set(re.findall(r"`(ray_capfilt_\w+)`", page)) == EXPORTED


def test_a_count_under_a_status_includes_those_under_its_reasons() -> None:
    counts = {"ok": 5, "failed": 4, "failed/timeout": 3, "failed/dns": 1, "stored": 9}
    assert rows_by_reason("crawl", counts) == {("ok", ""): 5, ("failed", "timeout"): 3, ("failed", "dns"): 1}


def a_lost_attempt(cause: str) -> ShardEvent:
    return ShardEvent(
        time=utc_now(),
        event="lost",
        run_id="r",
        stage="caption",
        source="cc",
        shard="00000",
        attempt=1,
        node="n",
        seconds=10.0,
        gpus=0.2,
        cause=cause,
    )


def test_lost_attempts_count_with_their_share_of_a_gpu() -> None:
    metrics = RunMetrics()
    metrics.add_event(a_lost_attempt("killed"))
    assert metrics.gpu_seconds == 2.0
    assert metrics.sums()["capfilt_attempts_lost_total", ("caption", "cc", "n", "killed")] == 1


def test_only_sums_that_changed_since_the_last_snapshot_that_came_are_sent() -> None:
    counter = ProgressCounter()
    counter.log_event(a_lost_attempt("killed"))
    first = counter.snapshot()
    assert counter.snapshot(0, 0).metrics == first.metrics != {}, "the answer may have been lost"
    assert counter.snapshot(0, first.number).metrics == {}
    counter.log_event(a_lost_attempt("failed"))
    changed = counter.snapshot(0, first.number).metrics
    assert changed["capfilt_attempts_lost_total", ("caption", "cc", "n", "failed")] == 1
    assert ("capfilt_attempts_lost_total", ("caption", "cc", "n", "killed")) not in changed
    assert changed["capfilt_gpu_seconds_total", ("caption", "cc", "n", "lost")] == 4.0
    restarted = ProgressCounter()
    restarted.log_event(a_lost_attempt("killed"))
    assert restarted.snapshot(0, 7).metrics == first.metrics
