"""Schedules and controllers."""

from __future__ import annotations

import math

import pytest
import torch

from leibler.objective import AdaptiveKL, Hinge, Linear, StepEnd, Switch, Validation
from objective.made import rows, view


@pytest.mark.parametrize(("step", "expected"), [(0, 2.0), (1, 1.8), (5, 1.0), (10, 0.0), (11, 0.0), (1000, 0.0)])
def test_linear(step, expected):
    made = view(rows([1])).at(step, {})
    assert float(Linear(2.0, 0.0, steps=10)(made)) == pytest.approx(expected)


def test_linear_without_steps_is_its_end():
    assert float(Linear(2.0, 1.0, steps=0)(view(rows([1])).at(1, {}))) == 1.0


def test_a_switch_turns_at_its_step():
    seen = [float(Switch(2.0, 0.5, at=3)(view(rows([1])).at(step, {}))) for step in (0, 2, 3, 4)]
    assert seen == [2.0, 2.0, 0.5, 0.5]


def heard(kl: float, sequences: float = 100.0) -> StepEnd:
    return StepEnd(1, {}, {"divergence_per_sequence": kl, "sequences": sequences})


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1 + 0.1 * 100 / 1000),
        (5.4, 1 - 0.1 * 100 / 1000),
        (600.0, 1 + 0.2 * 100 / 1000),
        (0.0, 1 - 0.2 * 100 / 1000),
        (-3.0, 1 - 0.2 * 100 / 1000),
    ],
)
def test_adaptive_kl_moves_in_proportion_within_bounds(kl, factor):
    controller = AdaptiveKL(target=6.0, initial=0.1, horizon=1000.0)
    state = controller.observe(controller.init(), heard(kl))
    assert state["coefficient"] == pytest.approx(0.1 * factor, rel=1e-12)
    made = view(rows([1])).at(0, {controller: state})
    assert float(controller(made)) == pytest.approx(0.1 * factor)


@pytest.mark.parametrize(
    "event",
    [StepEnd(1, {"divergence_per_sequence": 9.0}, {}), Validation(1, {"nll": 3.0}), heard(math.nan), heard(math.inf)],
)
def test_adaptive_kl_stands_still_without_a_measurement(event):
    controller = AdaptiveKL(target=6.0)
    assert controller.observe(controller.init(), event) == controller.init()


def test_adaptive_kl_finds_its_target():
    """With a divergence that falls as the coefficient grows, the coefficient settles where it equals the target."""
    controller = AdaptiveKL(target=2.0, initial=0.01, horizon=1000.0)
    state = controller.init()
    for _ in range(4000):
        state = controller.observe(state, heard(1.0 / state["coefficient"], sequences=64))
    assert 1.0 / state["coefficient"] == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize(("kl", "expected"), [(0.0, 0.0), (0.1, 0.0), (0.3, 2.0), (1.1, 10.0), (-5.0, 0.0)])
def test_hinge(kl, expected):
    assert float(Hinge(bound=0.1, slope=10.0).of(torch.tensor(kl, dtype=torch.float64))) == pytest.approx(expected)


def test_a_hinge_as_coefficient_is_the_derivative_of_the_squared_hinge():
    x = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    divergence = x**2
    (0.5 * 3.0 * (divergence - 0.2).clamp_min(0) ** 2).backward()
    assert float(Hinge(0.2, 3.0).of(divergence.detach()) * 2 * x.detach()) == pytest.approx(float(x.grad))


def test_reaches_and_clocks():
    for signal in (Linear(0.0, 1.0, 2), AdaptiveKL(1.0), Hinge(0.1, 1.0)):
        assert signal.reach == "batch"
    assert Hinge(0.1, 1.0).clock == "step"
    assert AdaptiveKL(1.0).clock == Linear(0.0, 1.0, 2).clock == "previous"
    assert Linear(0.0, 1.0, 2).init() is None
