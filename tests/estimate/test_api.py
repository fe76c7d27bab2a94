"""estimate.value and estimate.loss: unbiased by default, for every divergence and law; masks; refusals."""

from __future__ import annotations

import math

import pytest
import torch

from estimate.enumerated import World
from leibler import estimate
from leibler.divergence import ChiSquared, ForwardKL, Hellinger, JensenShannon, ReverseKL, SkewForwardKL, TotalVariation
from leibler.errors import RecipeError

DIVERGENCES = (
    ReverseKL(), ForwardKL(), JensenShannon(beta=0.1), JensenShannon(), ChiSquared(), Hellinger(), TotalVariation(),
    SkewForwardKL(lam=0.1),
)  # fmt: skip
LAWS = ("model", "target", "behaviour")


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_value_and_loss_are_unbiased_when_no_estimator_is_given(divergence, law):
    for seed in range(3):
        w = World(seed)
        exact = w.exact(divergence)
        mean = (w.law(law) * estimate.value(w.p, w.q, divergence, None, law, w.s, reduction="none")).sum()
        assert mean.item() == pytest.approx(exact.item(), abs=1e-8)
        loss = (w.law(law) * estimate.loss(w.p, w.q, divergence, None, law, w.s, reduction="none")).sum()
        assert loss.item() == pytest.approx(exact.item(), abs=1e-8)
        assert torch.allclose(w.gradient(loss), w.gradient(exact), atol=1e-8)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("divergence", [ReverseKL(), ForwardKL()], ids=repr)
@pytest.mark.parametrize("name", ["k1", "k3", "pathwise", "score_function"])
def test_named_values_are_unbiased_for_both_kls_on_every_law(name, divergence, law):
    w = World(7)
    mean = (w.law(law) * estimate.value(w.p, w.q, divergence, name, law, w.s, reduction="none")).sum()
    assert mean.item() == pytest.approx(w.exact(divergence).item(), abs=1e-8)


def test_k2_is_biased_by_a_second_order_only():
    w = World(7)
    gap = {}
    for step in (0.1, 0.05):
        w.y = w.z.detach() + step * torch.linspace(-1, 1, 7, dtype=torch.float64).square()
        mean = (w.law("model") * estimate.value(w.p, w.q, ReverseKL(), "k2", reduction="none")).sum()
        gap[step] = abs(mean.item() - w.exact(ReverseKL()).item())
    assert gap[0.1] > 1e-6
    assert gap[0.1] / gap[0.05] == pytest.approx(8, rel=0.3)  # third order: the value itself is second


def test_the_published_control_variate_of_forward_kl_is_the_k3_of_model_samples():
    w = World(2)
    rho = (w.q - w.p).exp()
    got = estimate.value(w.p, w.q, ForwardKL(), "k3", reduction="none")
    assert torch.allclose(got, (rho * rho.log() - rho + 1).detach(), atol=1e-12)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_positions_may_hold_anything(garbage):
    p = torch.tensor([-1.0, garbage, -2.0], requires_grad=True)
    q = torch.tensor([-1.5, garbage, -1.0])
    mask = torch.tensor([True, False, True])
    for law in LAWS:
        loss = estimate.loss(p, q, ReverseKL(), None, law, p.detach(), mask=mask)
        (grad,) = torch.autograd.grad(loss, p)
        assert loss.isfinite()
        assert grad[1] == 0.0
        assert grad.isfinite().all()
        kept = estimate.loss(p[[0, 2]], q[[0, 2]], ReverseKL(), None, law, p[[0, 2]].detach())
        assert loss.item() == pytest.approx(kept.item())
        assert estimate.value(p, q, mask=mask, reduction="none")[1] == 0.0


def test_a_mask_without_any_token_gives_zero():
    p = torch.tensor([-1.0], requires_grad=True)
    loss = estimate.loss(p, p.detach() - 1, ReverseKL(), mask=torch.tensor([False]))
    loss.backward()
    assert loss.item() == 0.0
    assert p.grad.item() == 0.0


def test_loss_refuses_what_descends_another_divergence():
    p, q = torch.tensor([-1.0]), torch.tensor([-2.0])
    with pytest.raises(RecipeError, match=r"descends ForwardKL, not ReverseKL; use K2\(\)"):
        estimate.loss(p, q, ReverseKL(), "k3")
    with pytest.raises(RecipeError, match="descends nothing"):
        estimate.loss(p, q, ReverseKL(), "k1")
    assert estimate.value(p, q, ReverseKL(), "k1").item() == pytest.approx(1.0)


def test_exact_takes_rows_and_masks_them():
    w = World(0)
    rows, target = torch.stack([w.z, w.z]), torch.stack([w.y, torch.full_like(w.y, math.nan)])
    loss = estimate.loss(rows, target, JensenShannon(), estimate.Exact(), mask=torch.tensor([True, False]))
    assert loss.item() == pytest.approx(w.exact(JensenShannon()).item())
    assert torch.allclose(w.gradient(loss), w.gradient(w.exact(JensenShannon())))


def test_names_and_mistakes():
    assert estimate.get("k3", weight="differentiable") == estimate.K3(weight="differentiable")
    assert all(isinstance(estimate.get(name), estimate.Estimator) for name in estimate.names())
    p = torch.tensor([-1.0])
    with pytest.raises(RecipeError, match=r"no estimator 'k4'; the names are exact, k1"):
        estimate.value(p, p, estimator="k4")
    with pytest.raises(RecipeError, match="same shape"):
        estimate.value(p, p.expand(2))
    with pytest.raises(RecipeError, match="reduction must be"):
        estimate.value(p, p, reduction="sum")  # type: ignore[arg-type]


def test_a_masked_token_is_zero_whatever_the_estimator_makes_of_it():
    class Constant(estimate.Estimator):
        def _value(self, divergence, sample):
            return torch.ones_like(sample.log_u)

    p = torch.tensor([-1.0, -2.0])
    got = estimate.value(p, p, ReverseKL(), Constant(), mask=torch.tensor([True, False]), reduction="none")
    assert got.tolist() == [1.0, 0.0]
