"""Errata, transport and cut-out classes: what batch-wise Sinkhorn losses, clipped KLs and span products do not see."""

from __future__ import annotations

import math

import ot
import pytest
import torch
from torch import Tensor

from leibler.divergence import BandKL, ForwardKL, JensenShannon
from leibler.objective import Sinkhorn, SpanProduct, Teacher, Transport


def rows(seed: int, n: int = 6, vocab: int = 4, spread: float = 1.5) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return spread * torch.randn(n, vocab, generator=g, dtype=torch.float64)


def cost(p: Tensor, q: Tensor, plan: Sinkhorn = Sinkhorn(), debiased: bool = False) -> Tensor:
    """Of logits."""
    return Transport(plan, Teacher(), debiased).value(*(x.log_softmax(-1)[:, None] for x in (p, q))).mean()


def kernel(c: Tensor, eps: float, iterations: int) -> Tensor:
    """The released iterations: divide by row sums, then by column sums; the plan has mass n."""
    plan = torch.exp(-c / eps)
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return plan


def l1(p: Tensor, q: Tensor) -> Tensor:
    return (p[:, None] - q[None]).abs().sum(-1)


def test_transport_between_batches_does_not_see_which_row_is_whose():
    p, q = rows(0), rows(1)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    assert cost(p[order], q).item() == pytest.approx(cost(p, q).item(), rel=1e-14)
    # Every row on another's law: the debiased cost is nearly 0, the divergence of the rows is not.
    assert abs(cost(q[order], q, debiased=True).item()) < 1e-12
    assert ForwardKL()(q[order], q).mean() > 0.5


def test_the_entropic_cost_is_not_zero_at_the_target():
    q = rows(1)
    assert cost(q, q).item() > 5e-3
    leaf = q.clone().requires_grad_()
    (pull,) = torch.autograd.grad(cost(leaf, q), leaf)
    assert pull.abs().max() > 1e-3  # so the target is no minimum
    assert abs(cost(q, q, debiased=True).item()) < 1e-14


def test_disjoint_rows_cost_the_same_whatever_they_are():
    def one_hot(*at: int) -> Tensor:
        return torch.full((len(at), 6), -60.0, dtype=torch.float64).scatter(1, torch.tensor(at)[:, None], 0.0)

    for p, q in ((one_hot(0, 1), one_hot(2, 3)), (one_hot(0, 0), one_hot(4, 5))):
        leaf = p.clone().requires_grad_()
        value = cost(leaf, q)
        assert value.item() == pytest.approx(2.0, abs=1e-9)
        assert torch.autograd.grad(value, leaf)[0].abs().max() < 1e-9
        assert JensenShannon()(p, q).mean().item() == pytest.approx(math.log(2), abs=1e-9)
    assert cost(one_hot(0, 1), one_hot(1, 2)).item() < 1.5  # one row of the batch in reach


def test_the_kernel_underflows_where_log_space_does_not():
    p, q = (torch.randn(6, 50, generator=torch.Generator().manual_seed(s)).mul(6).softmax(-1) for s in (0, 1))
    c = l1(p, q)
    assert not kernel(c, 0.005, 20).isfinite().all()
    plan = Sinkhorn(0.005, 20)(c)
    assert plan.isfinite().all()
    exact = torch.from_numpy(
        ot.bregman.sinkhorn_log([1 / 6] * 6, [1 / 6] * 6, c.double().T.numpy(), 0.005, 20, 0.0, warn=False)
    ).T
    torch.testing.assert_close(plan.double(), exact, rtol=1e-3, atol=1e-6)


def test_the_released_plan_has_mass_n_so_the_loss_grows_with_the_batch():
    small, large = l1(rows(0).softmax(-1), rows(1).softmax(-1)), None
    large = small.repeat(4, 4)  # the same rows four times
    one, four = ((kernel(c, 0.1, 20) * c).sum() for c in (small, large))
    assert four.item() == pytest.approx(4 * one.item(), rel=1e-9)
    ours = [(Sinkhorn()(c) * c).sum().item() for c in (small, large)]
    assert ours[0] == pytest.approx(ours[1], rel=1e-9)
    assert one.item() == pytest.approx(6 * ours[0], rel=1e-9)


def test_the_number_of_iterations_is_part_of_the_gradient():
    p, q = rows(0, spread=3.0), rows(1, spread=3.0)

    def pull(iterations: int, held: bool = False) -> Tensor:
        leaf = p.clone().requires_grad_()
        c = l1(leaf.softmax(-1), q.softmax(-1))
        plan = Sinkhorn(0.1, iterations)(c)
        return torch.autograd.grad(((plan.detach() if held else plan) * c).sum(), leaf)[0]

    settled = pull(2000)
    assert (pull(5) - settled).norm() > 0.05 * settled.norm()
    assert (pull(1000) - settled).norm() < 1e-3 * settled.norm()
    # Nor may the plan be held: that is the gradient of the cost with its entropy, and the entropy is not in the loss.
    assert (pull(2000, held=True) - settled).norm() > 0.05 * settled.norm()


def test_a_band_that_is_learned_to_lower_the_loss_ends_at_one_class():
    p, q = rows(0, n=20, vocab=30), rows(1, n=20, vocab=30)
    free = [BandKL(lower, 1.0, least_mass=1e-9)(p, q).mean().item() for lower in (0.0, 0.5, 0.8, 0.95, 1.0)]
    assert free == sorted(free, reverse=True)
    assert free[0] > 0.5
    assert free[-1] < 1e-15  # the least loss says nothing at all
    held = [BandKL(lower, 1.0, least_mass=0.9)(p, q).mean().item() for lower in (0.0, 0.5, 0.8, 0.95, 1.0)]
    assert held[-1] > 0.2 * held[0]


def test_renormalising_on_the_kept_classes_frees_the_tail():
    p, q = rows(0, n=1, vocab=30), rows(1, n=1, vocab=30)
    tail = q < q.sort(-1).values[:, 14:15]
    leaf = (p + 8.0 * tail).requires_grad_()  # nearly all of the student's mass where the teacher has little
    assert leaf.softmax(-1)[tail].sum() > 0.95
    for kind, seen in (("renormalise", False), ("bucket", True)):
        divergence = BandKL(0.5, 1.0, least_mass=0.5, tail=kind)  # type: ignore[arg-type]
        (pull,) = torch.autograd.grad(divergence(leaf, q).sum(), leaf)
        assert bool((pull[tail] > 1e-3).any()) == seen
        assert (divergence(leaf, q) > divergence(p, q) + 1).item() == seen


def test_products_of_sharp_neighbours_vanish_where_they_differ_most():
    def pair(first: int, second: int) -> Tensor:
        logits = torch.zeros(2, 5, dtype=torch.float64)
        logits[0, first] = logits[1, second] = 20.0
        return logits.log_softmax(-1)[None]

    for right, wrong in ((pair(0, 1), pair(2, 3)), (pair(0, 1), pair(3, 4))):
        assert SpanProduct(Teacher()).value(wrong, right).item() < 1e-7  # all four tokens differ
        assert SpanProduct(Teacher(), norm=2).value(wrong, right).item() < 1e-7
        assert SpanProduct(Teacher(), normalised=True).value(wrong, right).item() > 1.9
    # And equal products are not equal laws.
    assert SpanProduct(Teacher()).value(pair(0, 1), pair(1, 0)).item() == 0
