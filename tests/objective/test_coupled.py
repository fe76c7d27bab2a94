"""Transport against POT and by hand, products of neighbours, the units of a batch."""

from __future__ import annotations

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leibler.errors import RecipeError
from leibler.objective import Rows, Sinkhorn, SpanProduct, Teacher, Transport

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10_000)


def laws(seed: int, n: int, vocab: int = 7, spread: float = 2.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(n, 1, vocab, generator=g, dtype=torch.float64)).log_softmax(-1)


def scaled(cost: Tensor, eps: float, iterations: int) -> Tensor:
    """Rows, then columns of the kernel divided by their sums; mass 1."""
    plan = torch.exp(-cost / eps)
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return plan / len(cost)


@few
@given(seeds, st.integers(1, 9), st.sampled_from([0.05, 0.1, 1.0]), st.integers(1, 25), st.booleans())
def test_value_and_gradient_are_those_of_the_scaled_kernel(
    seed: int, n: int, eps: float, iterations: int, debiased: bool
):
    p, q = laws(seed, n).requires_grad_(), laws(seed + 1, n)
    found = Transport(Sinkhorn(eps, iterations), Teacher(), debiased).value(p, q).mean()

    def cost(a: Tensor, b: Tensor) -> Tensor:
        c = (a[:, None] - b[None]).abs().sum(-1)
        return (scaled(c, eps, iterations) * c).sum()

    a, b = p[:, 0].exp(), q[:, 0].exp()
    expected = cost(a, b) - (cost(a, a) + cost(b, b)) / 2 if debiased else cost(a, b)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
    (one,), (two,) = (torch.autograd.grad(x, p) for x in (found, expected))
    torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-10)


@few
@given(seeds, st.integers(2, 9))
def test_the_limits_are_pots_assignment_and_the_mean(seed: int, n: int):
    p, q = laws(seed, n, spread=4.0), laws(seed + 1, n, spread=4.0)
    cost = (p[:, 0].exp()[:, None] - q[:, 0].exp()[None]).abs().sum(-1)
    even = [1 / n] * n
    exact = float(ot.emd2(even, even, cost.numpy()))
    cold = Transport(Sinkhorn(1e-3, 4000), Teacher()).value(p, q).mean().item()
    assert -1e-3 < cold - exact < 0.02  # near ties converge slowly; never below, but for the marginals' own error
    hot = Transport(Sinkhorn(1e4, 5), Teacher()).value(p, q).mean().item()
    assert hot == pytest.approx(cost.mean().item(), rel=1e-3)


@few
@given(seeds, st.integers(1, 8))
def test_bounds_and_one_row(seed: int, n: int):
    p, q = laws(seed, n), laws(seed + 1, n)
    plan = Sinkhorn(0.1, 50)
    value = Transport(plan, Teacher()).value(p, q)
    assert (value >= 0).all()
    assert value.mean().item() <= 2
    assert abs(Transport(plan, Teacher(), debiased=True).value(p, p).sum().item()) < 1e-12
    alone = Transport(plan, Teacher()).value(p[:1], q[:1])
    assert alone.item() == pytest.approx((p[0].exp() - q[0].exp()).abs().sum().item(), rel=1e-12)


def test_hostile_rows_and_low_precision():
    hard = torch.full((4, 1, 9), -torch.inf)
    hard[torch.arange(4), 0, torch.tensor([0, 1, 2, 3])] = 0.0
    soft = (1e4 * torch.randn(4, 1, 9, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    for p, q in ((hard, soft), (soft, hard), (hard, hard.roll(1, 0))):
        for eps in (1e-4, 0.1):
            logits = p.clone().requires_grad_()
            value = Transport(Sinkhorn(eps), Teacher(), debiased=True).value(logits.log_softmax(-1), q).mean()
            (gradient,) = torch.autograd.grad(value, logits)
            assert value.isfinite()
            assert gradient.isfinite().all()
            pairs = [torch.stack([x[:2, 0], x[2:, 0]], 1) for x in (logits.log_softmax(-1), q)]
            for normalised in (False, True) if not p.isinf().any() and not q.isinf().any() else (False,):
                out = SpanProduct(Teacher(), normalised=normalised).value(*pairs)
                assert out.isfinite().all()
    assert Transport(Sinkhorn(), Teacher()).value(hard[:0], hard[:0]).shape == (0,)


@few
@given(seeds, st.sampled_from([1, 2]), st.booleans())
def test_products_of_neighbours_by_hand(seed: int, norm: int, normalised: bool):
    p, q = (laws(seed + i, 10).reshape(5, 2, 7) for i in (0, 1))
    p.requires_grad_()
    found = SpanProduct(Teacher(), norm=norm, normalised=normalised).value(p, q)
    products = [x[:, 0].exp() * x[:, 1].exp() for x in (p, q)]
    if normalised:
        products = [x / x.sum(-1, keepdim=True) for x in products]
    gap = products[0] - products[1]
    expected = gap.abs().sum(-1) if norm == 1 else gap.square().sum(-1).sqrt()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    (one,), (two,) = (torch.autograd.grad(x.sum(), p) for x in (found, expected))
    torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-10)
    at_target = SpanProduct(Teacher(), norm=norm, normalised=normalised).value(p, p.detach())
    assert at_target.abs().max() == 0
    assert torch.autograd.grad(at_target.sum(), p)[0].isfinite().all()


def batch() -> Rows:
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    span = torch.tensor([[9, 1, 1, 2, -1, -1], [3, 3, 3, 3, 4, 0], [0, 0, 0, 0, 0, 0]])
    tokens = torch.zeros(3, 7, dtype=torch.long)
    return Rows(
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        mask,
        torch.arange(3),
        torch.tensor([1, 2, 0]),
        {"span": span, "some": mask.float() * torch.tensor([1, 1, 1, 0, 1, 1])},
    )


def test_units_of_a_batch():
    rows = batch()  # events: 0-4 in row 0, 5-8 in row 1, 9 in row 2
    assert Transport(Sinkhorn(), Teacher()).units(rows).tolist() == [[i] for i in range(10)]
    assert Transport(Sinkhorn(), Teacher(), where="rejected").units(rows).tolist() == [[i] for i in range(5, 9)]
    # Pieces of three events of each row; events 6 and 7 are no neighbours: a position lies between.
    assert SpanProduct(Teacher(), 3).units(rows).tolist() == [[0, 1], [1, 2], [3, 4], [5, 6]]
    assert SpanProduct(Teacher(), 100).units(rows).tolist() == [[0, 1], [1, 2], [2, 3], [3, 4], [5, 6], [7, 8]]
    # By column: negative numbers are in no span.
    assert SpanProduct(Teacher(), "span").units(rows).tolist() == [[0, 1], [5, 6]]
    assert SpanProduct(Teacher(), 100, where="some").units(rows).tolist() == [[0, 1], [3, 4], [5, 6]]
    with pytest.raises(RecipeError, match="no column 'words'"):
        SpanProduct(Teacher(), "words").units(rows)


def test_counts_know_the_cap():
    rows = batch()
    for term, count in (
        (Transport(Sinkhorn(), Teacher()), 10), (Transport(Sinkhorn(), Teacher(), sites=4), 4),
        (SpanProduct(Teacher(), 100), 6), (SpanProduct(Teacher(), 100, sites=5), 2),
    ):  # fmt: skip
        assert term.count(rows) == count
        assert len(term.chosen(rows, torch.Generator().manual_seed(0))) == count
