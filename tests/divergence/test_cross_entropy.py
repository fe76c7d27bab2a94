"""Cross-entropy relative to scores that need not be a law: value, gradient, the normaliser, hostile rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leibler.divergence import Entropy, ReverseCrossEntropy, ReverseKL, to_row
from leibler.errors import RecipeError
from leibler.fused import linear_divergence


def made(seed: int, vocab: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z, y = (3 * torch.randn(4, vocab, generator=generator, dtype=torch.float64) for _ in range(2))
    return z.requires_grad_(), y


@given(st.integers(0, 10_000))
def test_value_and_gradient_are_those_of_the_formula(seed):
    z, y = made(seed)
    found = ReverseCrossEntropy()(z, y)
    expected = -(z.softmax(-1) * y.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    one, two = (torch.autograd.grad(x.sum(), z)[0] for x in (found, expected))
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)


def test_scores_that_are_no_law_shift_the_value_by_their_normaliser_and_the_gradient_by_nothing():
    z, y = made(1)
    scores = y + torch.tensor([[5.0], [-300.0], [0.0], [1e4]], dtype=torch.float64)
    one, two = (torch.autograd.grad(ReverseCrossEntropy()(z, x).sum(), z)[0] for x in (y, scores))
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
    mean = (z.softmax(-1) * scores).sum(-1)
    torch.testing.assert_close(ReverseCrossEntropy()(z, scores), scores.logsumexp(-1) - mean, rtol=1e-9, atol=1e-8)


def test_it_is_the_reverse_kl_and_the_entropy():
    z, y = made(2)
    entropy, _ = Entropy().value(to_row(z.detach()))
    torch.testing.assert_close(ReverseCrossEntropy()(z, y), ReverseKL()(z, y) + entropy, rtol=1e-10, atol=1e-10)


def test_it_is_the_difference_of_two_reverse_divergences():
    z, a = made(3)
    _, b = made(4)
    a, b = a.log_softmax(-1), b.log_softmax(-1)
    found = ReverseCrossEntropy()(z, a - b)
    expected = ReverseKL()(z, a) - ReverseKL()(z, b) + (a - b).logsumexp(-1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-9)


def test_supports_and_extremes():
    """The asymmetric pair: mass outside the target's support is infinite, the target's outside the model's is not."""
    inf = math.inf
    z = torch.tensor([[0.0, 0.0], [0.0, -inf], [0.0, -inf], [1e4, -1e4]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[0.0, -inf], [0.0, 0.0], [0.0, -inf], [-1e4, 1e4]], dtype=torch.float64)
    value = ReverseCrossEntropy()(z, y)
    value.sum().backward()
    assert value[0] == inf
    assert value[1].item() == pytest.approx(math.log(2))
    assert value[2].item() == 0
    assert value[3].item() == pytest.approx(2e4)
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert (z.grad[0] == 0).all()
    tiny = torch.tensor([[0.0, -60.0]], dtype=torch.float64)  # a probability of 1e-26 outside the support
    assert ReverseCrossEntropy()(tiny, torch.tensor([[0.0, -inf]], dtype=torch.float64)).item() == inf


def test_masked_rows_give_nothing():
    z, y = made(5)
    y = y.clone()
    y[1] = math.nan
    mask = torch.tensor([True, False, True, True])
    value = ReverseCrossEntropy()(z, y, mask=mask)
    value.sum().backward()
    assert value[1] == 0
    assert z.grad is not None
    assert (z.grad[1] == 0).all()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_the_fused_head_it_is_the_same(dtype):
    generator = torch.Generator().manual_seed(6)
    h, w, g, v = (torch.randn(n, 8, generator=generator).to(dtype) for n in (5, 33, 5, 33))
    h.requires_grad_()
    found = linear_divergence(h, w, g, v, ReverseCrossEntropy(), reduction="none")
    expected = ReverseCrossEntropy()((h @ w.T).float().double(), (g @ v.T).float().double())
    scale = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found.double(), expected, rtol=scale, atol=scale)
    (one,) = torch.autograd.grad(found.sum(), h)
    wide = h.detach().double().requires_grad_()
    (two,) = torch.autograd.grad(ReverseCrossEntropy()(wide @ w.double().T, g.double() @ v.double().T).sum(), wide)
    torch.testing.assert_close(one.double(), two, rtol=10 * scale, atol=10 * scale)


def test_it_has_no_generator():
    with pytest.raises(RecipeError, match="ReverseCrossEntropy is not an f-divergence"):
        ReverseCrossEntropy().f(torch.zeros(1))
