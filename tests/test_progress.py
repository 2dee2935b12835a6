"""What a run and a training tell while they work: what is waited for, how far they are, how long it will take."""

import pytest

from jobs.output.progress import LineProgress, _Rates
from pipeline.runs.progress import StageProgress
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
