"""A divergence at a temperature: any divergence of the divided logits, its gradient, hostile rows, the fused pass."""

from __future__ import annotations

import gc

import pytest
import torch

from divergence.brute import EVERY
from divergence.test_hostile import ROWS
from leibler.divergence import BandKL, Divergence, ForwardKL, Heated, ReverseKL, Swapped
from leibler.errors import RecipeError
from leibler.fused import Linear, TargetRows, Want, functionals


@pytest.mark.parametrize("divergence", [*EVERY, BandKL(0.5, 1.0, 0.4)], ids=str)
def test_value_and_gradient_are_those_at_divided_logits(divergence: Divergence):
    g = torch.Generator().manual_seed(0)
    model, target = torch.randn(2, 5, 30, generator=g, dtype=torch.float64)
    model.requires_grad_()
    found, expected = Heated(divergence, 2.5)(model, target), divergence(model / 2.5, target / 2.5)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    (one,), (two,) = (torch.autograd.grad(x.sum(), model) for x in (found, expected))
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), BandKL(tail="bucket")], ids=str)
def test_hostile_rows(divergence: Divergence):
    for name, (model, target) in ROWS.items():
        leaf, hot = model.float().requires_grad_(), model.float().requires_grad_()
        found, expected = Heated(divergence, 2.0)(hot, target.float()), divergence(leaf / 2, target.float() / 2)
        # Logits of size L are known to eps L.
        slack = 1e-6 * max(float(row[row > -torch.inf].abs().max()) for row in (model, target)) + 1e-6
        assert found.item() == pytest.approx(expected.item(), rel=1e-5, abs=slack), name
        (one,), (two,) = (torch.autograd.grad(x, y) for x, y in ((found, hot), (expected, leaf)))
        assert one.isfinite().all(), name
        torch.testing.assert_close(one, two, rtol=1e-4, atol=slack)


def test_in_the_fused_pass_beside_its_cold_self_and_without_keeping_blocks():
    g = torch.Generator().manual_seed(1)
    hidden, weight, other = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((7, 4), (20, 4), (7, 4)))
    hidden.requires_grad_()
    wants = [Want(ForwardKL(), 0), Want(Heated(ForwardKL(), 3.0), 0), Want(Heated(BandKL(1.0, 1.0, 0.1), 2.0), 0)]
    token = torch.arange(7)
    gc.collect()
    gc.disable()
    try:
        values = functionals(Linear(hidden, weight), wants, [TargetRows((Linear(other, weight),))], token=token)
        (found,) = torch.autograd.grad(values.sum(), hidden)
        from leibler.divergence import Row

        assert not [x for x in gc.get_objects() if isinstance(x, Row)]
    finally:
        gc.enable()
    z, y = hidden @ weight.T, other @ weight.T
    cut = BandKL(1.0, 1.0, 0.1)
    band = functionals(
        Linear(z, torch.eye(20, dtype=torch.float64), temperature=2.0),
        [Want(cut, 0)],
        [TargetRows((Linear(y, torch.eye(20, dtype=torch.float64), temperature=2.0),))],
        token=token,
    )
    judge = ForwardKL()(z, y) + ForwardKL()(z / 3, y / 3) + band[0]
    torch.testing.assert_close(values.sum(0), judge)
    torch.testing.assert_close(found, torch.autograd.grad(judge.sum(), hidden)[0])


def test_exchanged_and_mistaken():
    model, target = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([2.0, 0.0, 1.0])
    assert Swapped(Heated(ForwardKL(), 2.0))(model, target) == Heated(ReverseKL(), 2.0)(model, target)
    assert Heated(ForwardKL(), 2.0) == Heated(ForwardKL(), 2.0) != Heated(ForwardKL(), 3.0)
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(RecipeError, match="positive"):
            Heated(ForwardKL(), temperature)
