"""Laws that hold for whole families, on random rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from divergence.brute import EVERY, F_DIVERGENCES
from leibler.divergence import (
    Alpha,
    CauchySchwarz,
    ChiSquared,
    Divergence,
    Entropy,
    ForwardKL,
    Hellinger,
    Jeffreys,
    JensenShannon,
    Renyi,
    ReverseChiSquared,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    Tsallis,
    to_row,
)

few = settings(max_examples=12)  # times some thirty divergences
each = pytest.mark.parametrize("divergence", EVERY, ids=str)
logit = st.floats(-12.0, 12.0, width=32)


@st.composite
def pairs(draw: st.DrawFn, smallest: int = 2) -> tuple[Tensor, Tensor]:
    vocab = draw(st.integers(smallest, 9))
    block = draw(st.lists(logit, min_size=2 * vocab, max_size=2 * vocab))
    rows = torch.tensor(block, dtype=torch.float64).reshape(2, vocab)
    return rows[0], rows[1]


def gradient_of(divergence: Divergence, model: Tensor, target: Tensor) -> Tensor:
    leaf = model.clone().requires_grad_()
    return torch.autograd.grad(divergence(leaf, target), leaf)[0]


@each
@few
@given(rows=pairs())
def test_not_negative_and_zero_only_for_equal_rows(divergence: Divergence, rows: tuple[Tensor, Tensor]) -> None:
    model, target = rows
    value = divergence(model, target).item()
    assert value >= 0.0
    assert divergence(model, model + 3.0).item() < 1e-12
    if (model.softmax(-1) - target.softmax(-1)).abs().max() > 1e-3:
        assert value > 1e-8


@each
@few
@given(rows=pairs(), seed=st.integers(0, 2**31 - 1))
def test_order_of_the_vocabulary_does_not_matter(
    divergence: Divergence, rows: tuple[Tensor, Tensor], seed: int
) -> None:
    model, target = rows
    order = torch.randperm(len(model), generator=torch.Generator().manual_seed(seed))
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(divergence(model[order], target[order]), divergence(model, target), **close)
    moved = gradient_of(divergence, model[order], target[order])
    scale = 1.0 + divergence(model, target).item()  # powers of large ratios lose digits in proportion
    torch.testing.assert_close(moved / scale, gradient_of(divergence, model, target)[order] / scale, **close)


@each
@few
@given(rows=pairs(), left=st.floats(-50, 50), right=st.floats(-50, 50))
def test_a_constant_added_to_logits_changes_nothing(
    divergence: Divergence, rows: tuple[Tensor, Tensor], left: float, right: float
) -> None:
    model, target = rows
    torch.testing.assert_close(
        divergence(model + left, target + right), divergence(model, target), rtol=1e-9, atol=1e-11
    )


@each
@few
@given(rows=pairs())
def test_logit_gradients_sum_to_zero(divergence: Divergence, rows: tuple[Tensor, Tensor]) -> None:
    gradient = gradient_of(divergence, *rows)
    assert gradient.sum().abs() <= 1e-10 * (1.0 + gradient.abs().sum())


@pytest.mark.parametrize(
    "divergence", [Jeffreys(), JensenShannon(), Hellinger(), TotalVariation(), CauchySchwarz(), Alpha(0.5), Renyi(0.5)]
)
@few
@given(rows=pairs())
def test_symmetry(divergence: Divergence, rows: tuple[Tensor, Tensor]) -> None:
    model, target = rows
    torch.testing.assert_close(divergence(model, target), divergence(target, model), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), SkewForwardKL(), JensenShannon(0.1), ChiSquared()])
def test_the_others_are_not_symmetric(divergence: Divergence) -> None:
    model, target = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([1.0, 1.0, 0.0])
    assert abs(divergence(model, target).item() / divergence(target, model).item() - 1.0) > 0.01


@pytest.mark.parametrize("divergence", [*F_DIVERGENCES, Renyi(0.5), Renyi(2.0)], ids=str)
@few
@given(rows=pairs(smallest=3))
def test_merging_entries_loses_information(divergence: Divergence, rows: tuple[Tensor, Tensor]) -> None:
    model, target = (row.log_softmax(-1) for row in rows)
    merged = [torch.cat([row[:2].logsumexp(-1, keepdim=True), row[2:]]) for row in (model, target)]
    assert divergence(*merged).item() <= divergence(model, target).item() * (1 + 1e-9) + 1e-11


@few
@given(rows=pairs())
def test_inequalities(rows: tuple[Tensor, Tensor]) -> None:
    model, target = rows
    slack = 1e-9
    forward, reverse = ForwardKL()(model, target).item(), ReverseKL()(model, target).item()
    variation, hellinger = TotalVariation()(model, target).item(), Hellinger()(model, target).item()
    assert variation <= math.sqrt(min(forward, reverse) / 2) + slack  # Pinsker
    assert hellinger / 2 <= variation + slack
    assert variation <= math.sqrt(hellinger * (1 - hellinger / 4)) + slack  # Le Cam
    assert hellinger <= min(forward, reverse) + slack
    assert reverse <= Renyi(2.0)(model, target).item() + slack  # Renyi grows with its order
    assert Renyi(0.5)(model, target).item() <= reverse + slack
    assert reverse <= math.log1p(ChiSquared()(model, target).item()) + slack
    assert variation <= 1.0
    assert hellinger <= 2.0


@few
@given(rows=pairs(), beta=st.floats(0.01, 0.99), lam=st.floats(0.01, 0.99))
def test_mixtures_are_bounded(rows: tuple[Tensor, Tensor], beta: float, lam: float) -> None:
    model, target = rows
    assert JensenShannon()(model, target).item() <= math.log(2.0) + 1e-12
    bound = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    assert JensenShannon(beta)(model, target).item() <= bound + 1e-12
    for divergence in (SkewForwardKL(lam), SkewReverseKL(lam)):
        assert divergence(model, target).item() <= -math.log(lam) + 1e-12


@few
@given(rows=pairs(), step=st.sampled_from([1e-2, 1e-3, 1e-4, 1e-5, 1e-7, -1e-3]))
def test_orders_near_0_and_1_tend_to_the_kl(rows: tuple[Tensor, Tensor], step: float) -> None:
    model, target = (row / 4 for row in rows)
    forward, reverse = ForwardKL()(model, target).item(), ReverseKL()(model, target).item()
    for divergence, limit in [
        (Alpha(1 + step), reverse),
        (Alpha(step), forward),
        (Tsallis(1 + step), reverse),
        (Renyi(1 + step), reverse),
    ]:
        # The distance to the limit is of the order of step: no jump where the formula changes.
        assert divergence(model, target).item() == pytest.approx(limit, rel=20 * abs(step), abs=1e-12)


@few
@given(rows=pairs())
def test_members_of_one_family_agree(rows: tuple[Tensor, Tensor]) -> None:
    model, target = rows
    for one, factor, other in [
        (ChiSquared(), 2.0, Alpha(2.0)),
        (ReverseChiSquared(), 2.0, Alpha(-1.0)),
        (Hellinger(), 0.5, Alpha(0.5)),
        (Tsallis(1.7), 1.7, Alpha(1.7)),
        (Tsallis(2.0), 1.0, ChiSquared()),
    ]:
        torch.testing.assert_close(one(model, target), factor * other(model, target), rtol=1e-10, atol=1e-12)
    chi = ChiSquared()(model, target)
    torch.testing.assert_close(Renyi(2.0)(model, target), chi.log1p(), rtol=1e-9, atol=1e-12)


@few
@given(rows=pairs())
def test_entropy_lies_between_0_and_log_of_the_vocabulary(rows: tuple[Tensor, Tensor]) -> None:
    value = Entropy().value(to_row(torch.stack(rows)))[0]
    assert (value >= 0.0).all()
    assert (value <= math.log(len(rows[0])) + 1e-12).all()
    flat = torch.zeros_like(rows[0])
    gap = math.log(len(flat)) - Entropy().value(to_row(rows[0][None]))[0].item()
    assert ReverseKL()(rows[0], flat).item() == pytest.approx(gap, abs=1e-10)
