"""Errata, second part: divergences on rows, their numerics, and preference losses built on a generator."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from leibler.divergence import (
    AdaptiveKL,
    Alpha,
    ChiSquared,
    ForwardKL,
    Hellinger,
    JensenShannon,
    Renyi,
    ReverseKL,
    SkewForwardKL,
    TotalVariation,
    Tsallis,
)


def rows(seed: int, n: int = 1, vocab: int = 7, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    model, target = (spread * torch.randn(n, vocab, generator=g, dtype=torch.float64) for _ in range(2))
    return model.requires_grad_(), target


# --- divergences ------------------------------------------------------------------------------------------------------


def adaptive_literally(model: Tensor, target: Tensor, held: bool) -> Tensor:
    """The adaptive mixture written out, its weights held or differentiated."""
    p, q = model.softmax(-1), target.softmax(-1)
    order = q.argsort(-1, descending=True)
    mass = q.gather(-1, order).cumsum(-1) <= 0.5
    mass[..., 0] = True
    head = torch.zeros_like(mass).scatter(-1, order, mass)
    gap = (p - q).abs()
    w = (gap * head).sum(-1) / gap.sum(-1)
    w = w.detach() if held else w
    forward, reverse = (q * (q.log() - p.log())).sum(-1), (p * (p.log() - q.log())).sum(-1)
    return w * forward + (1 - w) * reverse


def test_the_weights_of_the_adaptive_kl_must_not_be_differentiated():
    model, target = rows(0, n=200, vocab=20, spread=2.0)
    (held,) = torch.autograd.grad(adaptive_literally(model, target, True).sum(), model)
    (free,) = torch.autograd.grad(adaptive_literally(model, target, False).sum(), model)
    (ours,) = torch.autograd.grad(AdaptiveKL(head_mass=0.5)(model, target).sum(), model)
    assert torch.allclose(ours, held, atol=1e-9)
    off = (free - held).norm(dim=-1) / held.norm(dim=-1)
    assert off.median() > 0.01
    assert off.max() > 0.15


def test_filling_infinite_logits_with_zero_gives_padding_real_mass():
    """A vocabulary of 8 padded to 12: the model has -inf there, "masked_fill(isinf, 0)" makes it e^0."""
    model, target = rows(1, vocab=8)
    pad = torch.full((1, 4), -math.inf, dtype=torch.float64)
    full_model, full_target = torch.cat([model.detach() - 3, pad], -1), torch.cat([target - 3, pad], -1)
    filled = full_model.masked_fill(full_model.isinf(), 0.0)
    assert filled.softmax(-1)[0, 8:].sum() > 0.5
    want = ForwardKL()(model.detach(), target)
    assert torch.allclose(ForwardKL()(full_model, full_target), want, atol=1e-9)
    wrong = ForwardKL()(filled, full_target.masked_fill(full_target.isinf(), 0.0))
    assert not torch.allclose(wrong, want, rtol=0.2)


def test_masking_a_nan_afterwards_does_not_remove_it_from_the_gradient():
    model = torch.tensor([[0.3, -0.2, -math.inf]], requires_grad=True)
    target = torch.tensor([[0.1, 0.4, -math.inf]])
    p, q = model.log_softmax(-1), target.log_softmax(-1)
    each = p.exp() * (p - q)
    repaired = torch.where(each.isnan(), 0.0, each).sum()
    assert repaired.isfinite()
    assert torch.autograd.grad(repaired, model)[0].isnan().any()
    right = ReverseKL()(model, target)
    assert right.item() == pytest.approx(repaired.item(), abs=1e-6)
    assert torch.autograd.grad(right.sum(), model)[0].isfinite().all()


def test_a_skewed_kl_saturates_and_lets_go_of_a_confidently_wrong_student():
    target = torch.tensor([[12.0, 0.0]], dtype=torch.float64)
    gradient, values = {}, {}
    for gap in (10.0, 30.0):
        model = torch.tensor([[-gap, 0.0]], dtype=torch.float64, requires_grad=True)
        for divergence in (ForwardKL(), SkewForwardKL(lam=0.1)):
            loss = divergence(model, target)
            gradient[type(divergence), gap] = torch.autograd.grad(loss.sum(), model)[0].norm().item()
            values[type(divergence), gap] = loss.item()
    assert values[SkewForwardKL, 30.0] == pytest.approx(-math.log(0.1), abs=1e-3)  # the most it can be
    assert gradient[SkewForwardKL, 10.0] < 1e-3
    assert gradient[SkewForwardKL, 30.0] < 1e-10
    assert gradient[ForwardKL, 30.0] > 1.0


def test_a_small_kl_in_float32_is_lost_in_cancellation():
    errors = []
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        model = 3 * torch.randn(1, 4096, generator=g)
        target = model + 1e-3 * torch.randn(1, 4096, generator=g)
        lp, lq = model.double().log_softmax(-1), target.double().log_softmax(-1)
        exact = (lp.exp() * (lp - lq)).sum().item()
        p, q = model.log_softmax(-1), target.log_softmax(-1)
        errors.append(abs((p.exp() * (p - q)).sum().item() - exact) / exact)
        assert ReverseKL()(model, target).item() == pytest.approx(exact, rel=1e-3)
    assert max(errors) > 0.1


def test_a_kl_computed_in_bfloat16_is_another_number():
    """The sums lose the quantity altogether; the rounding of the logits alone is already off by a percent or more."""
    negative, off, rounding = 0, [], []
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        model = 2 * torch.randn(1, 4096, generator=g)
        target = model + 0.05 * torch.randn(1, 4096, generator=g)
        exact = ReverseKL()(model.double(), target.double()).item()
        p, q = model.bfloat16().log_softmax(-1), target.bfloat16().log_softmax(-1)
        low = (p.exp() * (p - q)).sum().item()
        negative += low < 0
        off.append(abs(low - exact) / exact)
        rounding.append(abs(ReverseKL()(model.bfloat16(), target.bfloat16()).item() - exact) / exact)
    assert negative > 0 or max(off) > 0.5
    assert sorted(rounding)[10] > 0.01


def test_the_argument_order_of_the_framework_kl_is_target_second_and_first():
    """kl_div(input=log a, target=b) is KL(b || a); ``batchmean`` divides by the first dimension only."""
    model, target = rows(2, n=6)
    p, q = model.detach().log_softmax(-1), target.log_softmax(-1)
    library = F.kl_div(p, q.exp(), reduction="batchmean").item()
    assert library == pytest.approx(ForwardKL()(model, target).mean().item(), abs=1e-9)
    assert abs(library - ReverseKL()(model, target).mean().item()) > 0.01
    tokens = F.kl_div(p.view(2, 3, 7), q.exp().view(2, 3, 7), reduction="batchmean").item()
    assert tokens == pytest.approx(3 * library)  # a sum over time, whatever the name says


def test_flooring_probabilities_stops_their_gradient():
    """``p[p < 1e-7] = 1e-7`` before the logarithm: the tokens that most need a push get none."""
    model = torch.tensor([[-20.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    floored = model.softmax(-1).clamp(min=1e-7)
    (gradient,) = torch.autograd.grad(-(target.softmax(-1) * floored.log()).sum(), model)
    (right,) = torch.autograd.grad(ForwardKL()(model, target).sum(), model)
    assert gradient[0, 0] > -1e-8
    assert right[0, 0] < -0.4


def test_the_sign_of_the_tsallis_divergence():
    """(1 - sum p^r q^(1-r)) / (r - 1), as it is often printed, is negative for r > 1."""
    model, target = rows(3)
    p, q = model.softmax(-1), target.softmax(-1)
    for r in (1.5, 2.0, 3.0):
        printed = (1 - (p**r * q ** (1 - r)).sum()) / (r - 1)
        assert printed < 0
        assert Tsallis(q=r)(model, target).item() == pytest.approx(-printed.item())


def test_an_entropic_risk_is_a_renyi_divergence_with_swapped_arguments():
    """(1/g) log E_q[(q/p)^g] is D_{1+g}(q || p): of Renyi(-g) it is -(1+g)/g times, a negative multiple."""
    model, target = rows(4)
    p, q = model.log_softmax(-1), target.log_softmax(-1)
    g = 0.5
    risk = torch.log((q.exp() * (g * (q - p)).exp()).sum()) / g
    assert Renyi(1 + g)(target, model).item() == pytest.approx(risk.item())
    assert abs(Renyi(1 + g)(model, target).item() - risk.item()) > 0.05
    plain = torch.log((p.exp() ** -g * q.exp() ** (1 + g)).sum()) / (-g - 1)
    assert risk.item() == pytest.approx(-(1 + g) / g * plain.item())


def test_a_tail_risk_by_an_unweighted_quantile_is_nearly_the_mean():
    """The released "CVaR" of Ra-DPO keeps what exceeds the (1 - c) quantile over the vocabulary, undivided."""
    model, target = rows(5, vocab=200, spread=2.0)
    p, q = model.detach().log_softmax(-1)[0], target.log_softmax(-1)[0]
    x, c = q - p, 0.95
    released = (q.exp() * x * (x > torch.quantile(x, 1 - c))).sum()
    order = x.argsort(descending=True)
    mass = q.exp()[order]
    kept = (mass.cumsum(0) - mass).clamp(max=1 - c)
    kept = torch.minimum(mass.cumsum(0), torch.tensor(1 - c, dtype=x.dtype)) - kept
    risk = (kept * x[order]).sum() / (1 - c)
    t = torch.linspace(x.min(), x.max(), 20001, dtype=x.dtype)
    rockafellar = (t + (q.exp() * (x - t[:, None]).clamp(min=0)).sum(-1) / (1 - c)).min()
    assert risk.item() == pytest.approx(rockafellar.item(), abs=1e-3)
    mean = (q.exp() * x).sum()
    assert abs(released - mean) < 0.1 * mean
    assert risk > 2 * mean


# --- preference losses from a generator -------------------------------------------------------------------------------


def optimum(divergence, reward: Tensor, q: Tensor, beta: float) -> Tensor:
    """argmax_p E_p[r] - beta E_q[f(p/q)] on the simplex, by mirror ascent on a fine schedule (no formula for f'^-1)."""
    p = q.clone()
    for step in range(3000):
        slope = reward - beta * divergence.f_prime((p / q).log())
        p = p * (1.0 / (1 + step / 300) * slope).exp()
        p = p / p.sum()
    return p


def test_the_jensen_shannon_of_f_dpo_is_twice_the_textbook_one():
    """f(u) = u log u - (u+1) log((u+1)/2) is 2 JSD, so its beta is half of ours."""
    model, target = rows(6)
    p, q = model.softmax(-1), target.softmax(-1)
    u = p / q
    published = (q * (u * u.log() - (u + 1) * ((u + 1) / 2).log())).sum().item()
    assert published == pytest.approx(2 * JensenShannon(0.5)(model, target).item())
    log_u = torch.linspace(-3, 3, 7, dtype=torch.float64)
    slope = math.log(2) + log_u - F.softplus(log_u)  # f' = log(2u / (1 + u))
    ours = JensenShannon(0.5).f_prime(log_u)
    assert torch.allclose(2 * (ours - ours[3]), slope - slope[3], atol=1e-12)


def test_chi_squared_and_total_variation_cannot_be_implicit_rewards():
    """Where f'(0) is finite the best policy drops answers altogether, and beta f'(u) no longer recovers the reward."""
    q = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    reward = torch.tensor([1.0, 0.5, 0.0, -2.0], dtype=torch.float64)
    beta = 0.5
    for divergence in (ReverseKL(), JensenShannon(0.5)):
        p = optimum(divergence, reward, q, beta)
        implied = beta * divergence.f_prime((p / q).log())
        assert torch.allclose(implied - implied[0], reward - reward[0], atol=1e-3)
        assert divergence.inadmissible is None
    p = optimum(ChiSquared(), reward, q, beta)
    assert p[3] < 1e-8
    implied = beta * ChiSquared().f_prime((p / q).log())
    assert abs(float(implied[3] - implied[0] - (reward[3] - reward[0]))) > 0.5
    assert "f'(0)" in (ChiSquared().inadmissible or "")
    assert "f'(0)" in (TotalVariation().inadmissible or "")


def test_the_default_alpha_of_a_common_f_dpo_is_the_forward_kl():
    """Its r = (1 - u^-a)/a at the default a = 1 is 1 - 1/u: a rejected answer already pushed down pulls harder."""
    log_u = torch.tensor([-7.0, -1.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    published = 1 - (-log_u).exp()
    forward = ForwardKL().f_prime(log_u.detach())
    assert torch.allclose(published.detach() - published[2].detach(), forward - forward[2])
    (weight,) = torch.autograd.grad(published.sum(), log_u)
    assert weight[0] > 1000  # u^-1 at u = e^-7, where DPO has 1
    for a in (0.25, 0.5, 0.75):  # its alpha a is our Alpha(1 - a)
        ours = Alpha(1 - a).f_prime(log_u.detach())
        theirs = (1 - (-a * log_u.detach()).exp()) / a
        assert torch.allclose(ours - ours[2], theirs - theirs[2], atol=1e-9)


def test_dividing_by_length_changes_the_margin_that_ipo_asks_for():
    """At the optimum of the loss on length-averaged log-ratios the summed margin is length times too large."""
    tau, length = 0.1, 20
    for averaged in (False, True):
        x = torch.zeros((), dtype=torch.float64, requires_grad=True)  # summed log-ratio margin of a pair
        for _ in range(60):
            loss = ((x / length if averaged else x) - 1 / (2 * tau)) ** 2
            (g,) = torch.autograd.grad(loss, x)
            x = (x - 0.4 * (length**2 if averaged else 1) * g).detach().requires_grad_()
        assert x.item() == pytest.approx((length if averaged else 1) / (2 * tau), rel=1e-3)


def test_the_mean_of_pairwise_losses_is_not_the_loss_of_the_mean():
    """D2O averages the winners inside the link; K separate pairs weigh weak winners differently."""
    g = torch.Generator().manual_seed(0)
    winners = (3 * torch.randn(11, generator=g, dtype=torch.float64)).requires_grad_()
    inside = -F.logsigmoid(winners.mean())
    outside = -F.logsigmoid(winners).mean()
    assert inside < outside
    a, b = (torch.autograd.grad(x, winners)[0] for x in (inside, outside))
    assert torch.allclose(a, a[0].expand(11))
    assert (a - b).norm() > 0.2 * b.norm()


def test_a_squared_margin_on_offline_pairs_does_not_bound_the_kl():
    """E over the model's own pairs of rho^2/2 has twice the gradient of the KL; over a fixed set it can be 0."""
    model, target = rows(7)
    p, q = model.log_softmax(-1)[0], target.log_softmax(-1)[0]
    law = (p.detach()[:, None] + p.detach()[None]).exp()
    rho = (p - q)[:, None] - (p - q)[None]
    (own,) = torch.autograd.grad((law * rho**2 / 2).sum(), model, retain_graph=True)
    (kl,) = torch.autograd.grad(ReverseKL()(model, target).sum(), model)
    assert torch.allclose(own, 2 * kl, atol=1e-9)
    drifted = q.clone()
    drifted[0] += 4.0  # an answer that no pair contains
    drifted = drifted.log_softmax(0)
    offline = [(i, j) for i, j in itertools.product(range(1, 7), repeat=2)]
    assert max(abs(float((drifted - q)[i] - (drifted - q)[j])) for i, j in offline) < 1e-12
    assert float((drifted.exp() * (drifted - q)).sum()) > 0.5


def test_weighting_the_likelihood_by_the_teacher_probability_squares_the_teacher():
    """With labels drawn from the teacher, -q(a) log p(a) is minimised by q^2 / sum q^2."""
    q = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    z = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for _ in range(4000):
        loss = -(q * q * z.log_softmax(0)).sum()
        (g,) = torch.autograd.grad(loss, z)
        z = (z - g).detach().requires_grad_()
    assert torch.allclose(z.detach().softmax(0), q**2 / (q**2).sum(), atol=1e-6)


def test_a_reverse_contraction_at_rate_one_minus_l_is_false_for_geometric_anchors():
    p, q, rate = (torch.tensor(x, dtype=torch.float64) for x in ([0.99, 0.01], [1e-20, 1.0], 0.8))
    m = (1 - rate) * q.log() + rate * p.log()
    m = m.log_softmax(0)
    after, before = (m.exp() * (m - p.log())).sum(), (q * (q.log() - p.log())).sum()
    assert after.item() == pytest.approx(4.56, abs=0.01)
    assert after > 4 * (1 - rate) * before
    assert after <= before
    forward = [(p * (p.log() - x)).sum() for x in (m, q.log())]
    assert forward[0] <= (1 - rate) * forward[1]


def test_the_hellinger_gradient_through_square_roots_is_nan_where_p_underflows():
    model = torch.tensor([[0.0, -300.0]], requires_grad=True)
    target = torch.tensor([[0.0, -1.0]])
    naive = (model.softmax(-1).sqrt() - target.softmax(-1).sqrt()).square().sum()
    assert not torch.autograd.grad(naive, model)[0].isfinite().all()
    safe = Hellinger()(model, target)
    assert safe.item() == pytest.approx(naive.item(), rel=1e-5)
    assert torch.autograd.grad(safe.sum(), model)[0].isfinite().all()
