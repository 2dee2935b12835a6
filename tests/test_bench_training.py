"""The benchmarks of the training stages, on models small enough for a test."""

from pathlib import Path

import pytest
from tiny_training import tiny_config

from jobs.bench.training.train_step import measure_precision, measure_steps, synthetic_step
from training.build import empty_stage
from training.distributed import World

pytestmark = pytest.mark.training

FACTS = {
    "samples_per_s",
    "step_s",
    "gflop_per_sample",
    "tflops",
    "matmul_tflops",
    "mfu",
    "peak_bytes",
    "micro_batch",
}


def test_stage1_steps_are_measured(tmp_path: Path) -> None:
    stage = empty_stage(tiny_config(tmp_path, tmp_path), World(), "cpu")
    figures = measure_steps(stage.train(), synthetic_step(stage, 4), batch=4, steps=2, micro_batch=2)
    assert figures.keys() >= FACTS
    assert figures["trainable_parameters"] == sum(
        weight.numel() for _, weight in stage.trainable_named_parameters()
    )
    assert figures["samples_per_s"] == pytest.approx(4 / figures["step_s"], rel=0.2)
    assert 0 < figures["mfu"] < 1
    assert set(figures["losses"]) == {
        "loss",
        "itc",
        "itm",
        "itg",
        "itm_accuracy",
        "temperature",
        "false_negative_share",
    }


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_stage2_steps_are_measured(tmp_path: Path, family: str) -> None:
    config = tiny_config(tmp_path, tmp_path, 2, language={"family": family, "max_text_tokens": 24})
    stage = empty_stage(config, World(), "cpu")
    figures = measure_steps(stage.train(), synthetic_step(stage, 4), batch=4, steps=1, micro_batch=3)
    assert figures.keys() >= FACTS and figures["micro_batch"] == 3
    assert set(figures["losses"]) == {"loss"}


def test_precisions_begin_alike_and_stay_near() -> None:
    figures = measure_precision(steps=3, batch=4)
    assert figures["losses"]["bf16"] != figures["losses"]["fp32"] != figures["losses"]["fp32_other_seed"]
    assert figures["distance"]["bf16"] < 0.05 * figures["first_loss"]
