"""The optimiser and its schedule: presets as published, decay groups, norms, moments by name."""

import math

import pytest
import torch
from torch import nn

from schemas.errors import CapfiltError
from schemas.pretrain import PretrainConfig
from training.trainer.steps.optim import (
    Schedule,
    clip_gradients,
    decays,
    fill_preset,
    gradients_of,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    set_lr,
)


def config(stage: int = 1, **optim: object) -> PretrainConfig:
    language = {"language": {"model": "x/y", "family": "opt"}} if stage == 2 else {}
    return PretrainConfig.model_validate(
        {
            "run": {"name": "r", "stage": stage},
            "data": {"corpus": [{"path": "c"}]},
            "optim": {"batch_size": 100} | optim,
            **language,
        }
    )


@pytest.mark.parametrize(
    ("stage", "preset", "expected"),
    [
        (1, "paper", (250_000, 0.0, 2_000, (0.9, 0.98))),
        (2, "paper", (80_000, 5e-5, 2_000, (0.9, 0.98))),
        (1, "lavis", (1_000, 1e-5, 100, (0.9, 0.999))),
        (2, "lavis", (1_000, 1e-5, 100, (0.9, 0.999))),
    ],
)
def test_presets_fill_what_is_left_out(stage: int, preset: str, expected: tuple) -> None:
    optim = fill_preset(config(stage, preset=preset), num_images=10_000).optim
    assert (optim.steps, optim.min_lr, optim.warmup_steps, optim.betas) == expected
    assert (optim.peak_lr, optim.weight_decay, optim.eps, optim.clip_norm) == (1e-4, 0.05, 1e-8, 0.0)


def test_lavis_warms_up_for_5000_steps_of_a_long_run() -> None:
    assert fill_preset(config(preset="lavis", steps=90_000), None).optim.warmup_steps == 5_000
    assert fill_preset(config(2, preset="lavis", steps=90_000), None).optim.warmup_steps == 2_000


def test_what_the_file_says_stands() -> None:
    given = {"steps": 7, "min_lr": 1e-6, "warmup_steps": 3, "warmup_lr": 2e-6, "betas": (0.5, 0.6)}
    assert fill_preset(config(**given), None).optim == config(**given).optim


def test_lavis_needs_the_number_of_images() -> None:
    with pytest.raises(CapfiltError, match=r"optim\.steps: preset lavis trains for 10 epochs"):
        fill_preset(config(preset="lavis"), None)


def test_schedule_is_linear_then_cosine() -> None:
    schedule = Schedule(steps=1001, warmup_steps=100, warmup_lr=1e-6, peak_lr=1e-4, min_lr=1e-5)
    assert schedule.lr(0) == 1e-6
    assert schedule.lr(50) == pytest.approx((1e-6 + 1e-4) / 2)
    assert schedule.lr(100) == 1e-4
    assert schedule.lr(550) == pytest.approx((1e-4 + 1e-5) / 2)
    assert schedule.lr(325) == pytest.approx(1e-5 + 9e-5 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule.lr(1000) == pytest.approx(1e-5)
    rates = [schedule.lr(step) for step in range(1001)]
    assert rates[:101] == sorted(rates[:101]) and rates[100:] == sorted(rates[100:], reverse=True)


def test_a_run_of_one_step_has_a_rate() -> None:
    assert Schedule.of(fill_preset(config(steps=1), None).optim).lr(0) == 1e-4


def test_vectors_and_biases_do_not_decay() -> None:
    module = nn.Module()
    module.queries = nn.Parameter(torch.ones(1, 4, 8))
    module.temp = nn.Parameter(torch.tensor(0.07))
    module.norm = nn.LayerNorm(8)
    module.linear = nn.Linear(8, 8)
    module.words = nn.Embedding(5, 8)
    decaying = {name for name, parameter in module.named_parameters() if decays(name, parameter)}
    assert decaying == {"queries", "temp", "linear.weight", "words.weight"}
    named = list(module.named_parameters())
    groups = make_optimizer(named, fill_preset(config(), None).optim).param_groups
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert {id(p) for p in groups[0]["params"]} == {id(p) for name, p in named if name in decaying}
    assert sum(len(group["params"]) for group in groups) == len(named)


def test_decay_alone_moves_an_unreached_parameter_as_adamw_says() -> None:
    named = [("w", nn.Parameter(torch.full((2, 2), 3.0)))]
    optimizer = make_optimizer(named, fill_preset(config(), None).optim)
    gradients_of(named)
    set_lr(optimizer, 0.1)
    optimizer.step()
    assert torch.allclose(named[0][1], torch.full((2, 2), 3.0 * (1 - 0.1 * 0.05)))


def test_clipping_scales_to_the_norm_and_tells_the_norm_before() -> None:
    gradients = [torch.full((3,), 2.0), torch.full((1, 2), 4.0)]
    norm = math.sqrt(3 * 4 + 2 * 16)
    assert clip_gradients(gradients, 0.0).item() == pytest.approx(norm)
    assert gradients[0][0] == 2.0
    assert clip_gradients(gradients, 1.0).item() == pytest.approx(norm)
    assert clip_gradients(gradients, 1e9).item() == pytest.approx(1.0, rel=1e-5)


def test_half_precision_parameters_are_not_masters() -> None:
    with pytest.raises(AssertionError, match="w is not an fp32 master"):
        make_optimizer(
            [("w", nn.Parameter(torch.ones(2, dtype=torch.bfloat16)))], fill_preset(config(), None).optim
        )


def test_moments_go_by_name() -> None:
    optim = fill_preset(config(), None).optim

    def trained(order: list[str]) -> tuple[dict, torch.optim.AdamW]:
        parameters = {name: nn.Parameter(torch.full((2, 3), float(len(name)))) for name in ("a", "bb")}
        named = [(name, parameters[name]) for name in order]
        return dict(named), make_optimizer(named, optim)

    first, optimizer = trained(["a", "bb"])
    for name, parameter in first.items():
        parameter.grad = torch.full((2, 3), 0.1 * len(name))
    optimizer.step()
    state = optimizer_state(optimizer, list(first.items()))
    assert set(state) == {f"{name}.{part}" for name in first for part in ("step", "exp_avg", "exp_avg_sq")}
    second, other = trained(["bb", "a"])
    load_optimizer_state(other, list(second.items()), state)
    again = optimizer_state(other, list(second.items()))
    assert all(torch.equal(again[name], state[name]) for name in state)
    del state["bb.exp_avg"]
    with pytest.raises(CapfiltError, match="has no exp_avg of bb"):
        load_optimizer_state(other, list(second.items()), state)
