"""What a run and a training tell while they work: what is waited for, how far they are, how long it will take."""

import json
import logging

import pytest

from jobs.output.progress import JsonProgress, LineProgress, _Rates
from pipeline.runs.events import EventName, ShardEvent
from pipeline.runs.progress import ProgressCounter, StageProgress
from pipeline.runs.survey import StageCount, Survey
from pipeline.text import readable_duration
from training.trainer.loop import progress_line


def test_a_stage_says_what_it_waits_for_until_its_first_shard(capsys: pytest.CaptureFixture[str]) -> None:
    counts = [StageCount(stage=stage, source="a", total=4) for stage in ("crawl", "caption", "rank")]
    progress = LineProgress(_Rates(Survey(counts=counts), ("crawl", "caption", "rank"), None))
    crawled = StageProgress(shards=1, images=3, rows_in=4, rows_out=3, state="at work")
    progress.update({"crawl": crawled, "caption": StageProgress(state="loading weights")})
    progress.close()
    line = capsys.readouterr().err
    assert "crawl 1/4 (" in line and "75% kept" in line and line.count(" left)") == 1
    assert "caption 0/4 (loading weights)" in line and "rank 0/4 (starting)" in line


def an_event(name: EventName, **more: object) -> ShardEvent:
    place = {"run_id": "r", "stage": "rank", "source": "a", "shard": "00002", "node": "n"}
    return ShardEvent(time="2026-01-01T00:00:00+00:00", event=name, attempt=2, **place, **more)


EVENTS = [
    an_event("retry"),
    an_event("lost", cause="failed", error="Traceback ...\nRuntimeError: no"),
    an_event("commit", seconds=1.5),
]


def test_of_the_events_a_person_is_told_what_went_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    progress = LineProgress(_Rates(Survey(counts=[]), (), None))
    for event in EVENTS:
        progress.event(event)
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("rank a/00002: attempt 2 was lost (failed: RuntimeError: no)")


def test_a_program_is_told_all_in_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    progress = JsonProgress(_Rates(Survey(counts=[]), (), None), "r")
    for event in EVENTS:
        progress.event(event)
    logging.getLogger("some.library").warning("the disk is %d%% full", 91)
    progress.close()
    logging.getLogger("some.library").warning("after the run")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert [(line["event"], line["level"]) for line in lines] == [
        ("retry", "info"),
        ("lost", "warning"),
        ("commit", "info"),
        ("message", "warning"),
    ]
    assert lines[1]["error"].endswith("RuntimeError: no") and lines[2]["seconds"] == 1.5
    assert lines[3]["message"] == "the disk is 91% full"
    assert {line["run_id"] for line in lines} == {"r"}


def test_events_come_once_however_often_they_are_asked_for() -> None:
    counter = ProgressCounter()
    for event in EVENTS[:2]:
        counter.log_event(event)
    first = counter.snapshot(0)
    assert counter.snapshot(0).events == first.events == tuple(EVENTS[:2]), "the answer may have been lost"
    counter.log_event(EVENTS[2])
    second = counter.snapshot(2)
    assert (second.events, second.events_before) == ((EVENTS[2],), 2)
    restarted = ProgressCounter()
    restarted.log_event(EVENTS[0])
    assert restarted.snapshot(3).events == (EVENTS[0],)


def test_a_training_line_has_the_share_done_and_the_time_left() -> None:
    line = progress_line(10, 40, {"samples": 80, "loss": 1.5, "samples_per_s": 2.0})
    assert line == "step 10 of 40 (25%): loss 1.5; 2.0 samples/s, 2m00s left"
    assert progress_line(40, 40, {"samples": 320, "loss": 1.5, "samples_per_s": 2.0}).endswith(
        "2.0 samples/s"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (3_599, "59m59s"), (4_000_000, "1,111h06m")]
)
def test_durations(seconds: float, text: str) -> None:
    assert readable_duration(seconds) == text
