"""Surrogates: values by their formula, regions by automatic differentiation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leibler.objective import Clip, Old, Policy, Ratio

RATIOS = torch.cat([torch.linspace(-3, 3, 61, dtype=torch.float64) + 0.0123, torch.tensor([0.0])]).double()


def slopes(surrogate, log_ratio, advantage):
    leaf = log_ratio.clone().requires_grad_()
    surrogate(leaf, advantage).sum().backward()
    return leaf.grad


SURROGATES = [Ratio(), Clip(), Clip(0.2, 0.28), Clip(0.1, cap=3.0), Clip(0.2, 0.28, cap=1.5)]


@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
@pytest.mark.parametrize("sign", [1.0, -1.0, 2.5, -0.3])
def test_the_region_is_where_the_gradient_passes(surrogate, sign):
    advantage = torch.full_like(RATIOS, sign)
    grad = slopes(surrogate, RATIOS, advantage)
    region = surrogate.region(RATIOS, advantage)
    assert torch.equal(grad != 0, region)
    torch.testing.assert_close(grad[region], (-RATIOS.exp() * advantage)[region])
    assert bool(region.any())
    if not isinstance(surrogate, Ratio):
        assert not bool(region.all())


@given(st.floats(-4, 4), st.floats(-3, 3), st.floats(0.05, 0.5), st.floats(0.05, 0.5), st.floats(1.2, 5))
def test_clip_by_its_formula(log_ratio, advantage, low, high, cap):
    ratio = math.exp(log_ratio)
    loss = -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    pair = torch.tensor([log_ratio], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    assert float(Clip(low, high)(*pair)) == pytest.approx(loss, rel=1e-9, abs=1e-12)
    capped = min(loss, cap * abs(advantage)) if advantage < 0 else loss
    assert float(Clip(low, high, cap)(*pair)) == pytest.approx(capped, rel=1e-9, abs=1e-12)


def test_the_ratio_clips_nothing_and_never_overflows():
    log_ratio = torch.tensor([0.0, 2.0, 1e4, -1e4], dtype=torch.float64)
    loss = Ratio()(log_ratio, torch.ones(4, dtype=torch.float64))
    assert loss[:2].tolist() == pytest.approx([-1.0, -math.exp(2)])
    assert bool(torch.isfinite(loss).all())


def test_fresh_samples_give_the_score():
    """At a ratio of one the gradient is the advantage, whatever the surrogate."""
    zero, advantage = torch.zeros(3, dtype=torch.float64), torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    for surrogate in SURROGATES:
        assert slopes(surrogate, zero, advantage).tolist() == [-1.0, 2.0, 0.0]


def test_anchors():
    assert Clip().anchor == Ratio().anchor == Old()
    assert Ratio(anchor=Policy()).anchor == Policy()
