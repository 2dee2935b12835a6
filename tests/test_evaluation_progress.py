"""What the commands ``evaluate`` and ``export`` tell people: progress, tables, how to load an export."""

import io
import time
from types import SimpleNamespace

import pytest

from jobs.cli.commands.evaluate import _how_to_load, _rows
from jobs.output.evaluation_progress import EvaluationProgress
from training.evaluate.published import Result

pytestmark = pytest.mark.training


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def told(stream: io.StringIO, **options: object) -> str:
    """Return what is written while an evaluation is half done."""
    with EvaluationProgress(stream=stream, interval_s=0.01, **options) as report:
        report("loading m")
        _wait_for(stream, "loading m")
        report("comparing", 0, 40)
        report("comparing", 20, 40)
        _wait_for(stream, "20 of 40")
    return stream.getvalue()


def _wait_for(stream: io.StringIO, text: str) -> None:
    until = time.monotonic() + 5
    while text not in stream.getvalue() and time.monotonic() < until and not isinstance(stream, Quiet):
        time.sleep(0.01)


class Quiet(io.StringIO):
    """A stream that nothing is expected on."""


def test_lines_say_the_share_done_and_the_time_left() -> None:
    lines = told(io.StringIO()).splitlines()
    assert any(line.endswith("loading m: 0s") for line in lines)
    assert any("comparing: 20 of 40 images (50%), " in line and line.endswith(" left") for line in lines)
    assert all(line.startswith("[") and "\x1b" not in line for line in lines)


def test_a_terminal_has_one_line_that_is_gone_at_the_end() -> None:
    text = told(Terminal())
    assert "\n" not in text and text.endswith("\r\x1b[K")
    assert "20 of 40 images (50%)" in text


def test_quiet_writes_nothing() -> None:
    assert told(Quiet(), quiet=True) == ""


def test_a_table_shows_both_itc_and_itm_in_per_cent() -> None:
    metrics = {"text_r1": 80.0, "image_r1": 77.5, "itc_text_r1": 84.0, "itc_image_r1": 81.0}
    result = Result(
        task="retrieval",
        dataset="flickr30k",
        samples=200,
        metrics=metrics,
        protocol={"rerank": 10},
        published={"ViT-g": {"text_r1": 97.6}},
    )
    assert _rows(result) == [
        {"": "ITC", "text_r1": "84.0%", "image_r1": "81.0%"},
        {"": "ITM over the first 10", "text_r1": "80.0%", "image_r1": "77.5%"},
        {"": "published: ViT-g", "text_r1": "97.6%", "image_r1": "-"},
    ]
    probe = Result(
        task="probe", dataset="", samples=4, metrics={"itm_accuracy": 0.885, "cider": 25.41}, protocol={}
    )
    assert _rows(probe) == [{"": "this model", "itm_accuracy": "88.5%", "cider": "25.4"}]


def test_an_export_says_how_it_is_loaded() -> None:
    config = SimpleNamespace(run=SimpleNamespace(stage=1), vision=SimpleNamespace(model="ViT-L-14"))
    assert "Blip2ForImageTextRetrieval.from_pretrained('out')" in _how_to_load("huggingface", "out", config)
    config_only = _how_to_load("capfilt", "out", config)
    assert (
        "capfilt evaluate" in config_only
        and "transformers cannot" in config_only
        and "'ViT-L-14'" in config_only
    )
