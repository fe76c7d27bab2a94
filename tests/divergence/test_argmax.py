"""The preference between two first choices: value and gradient by brute force, agreement, hostile rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leibler.divergence import ArgmaxMargin
from leibler.errors import RecipeError


def brute(z: torch.Tensor, y: torch.Tensor, beta: float) -> torch.Tensor:
    p, q = z.log_softmax(-1), y.log_softmax(-1)
    a, b = int(q.argmax()), int(p.argmax())
    return -torch.log(torch.sigmoid(beta * ((p[a] - p[b]) - (q[a] - q[b]))))


@given(st.integers(0, 10_000), st.floats(0.1, 5.0))
def test_value_and_gradient_are_those_of_the_formula(seed, beta):
    g = torch.Generator().manual_seed(seed)
    z, y = (torch.randn(7, generator=g, dtype=torch.float64) for _ in range(2))
    z.requires_grad_()
    found, expected = ArgmaxMargin(beta)(z, y), brute(z, y, beta)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    (one,), (two,) = torch.autograd.grad(found, z), torch.autograd.grad(expected, z)
    assert torch.allclose(one, two, atol=1e-9)


def test_rows_that_agree_are_constant():
    z = torch.tensor([0.0, 3.0, 1.0], dtype=torch.float64, requires_grad=True)
    value = ArgmaxMargin(2.0)(z, torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64))
    value.backward()
    assert value.item() == pytest.approx(math.log(2))
    assert (z.grad == 0).all()


def test_extreme_rows_keep_their_meaning():
    z = torch.tensor([[1e4, -1e4], [1e4, -1e4], [0.0, -torch.inf], [2.0, 1.0]], requires_grad=True)
    y = torch.tensor([[-1e4, 1e4], [1e4, -1e4], [0.0, 1.0], [-torch.inf, 0.0]])
    value = ArgmaxMargin()(z, y)
    value.sum().backward()
    assert value[0].item() == pytest.approx(4e4)
    assert value[1].item() == pytest.approx(math.log(2))
    assert value[2:].tolist() == [math.inf, math.inf]  # the other's choice has no probability at all
    assert z.grad.tolist() == [[1.0, -1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


def test_beta_must_be_positive():
    with pytest.raises(RecipeError, match="positive beta"):
        ArgmaxMargin(0.0)
