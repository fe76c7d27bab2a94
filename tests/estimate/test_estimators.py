"""The estimators token by token: published formulas, variance, extremes, clamps, what carries no gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from estimate.enumerated import World
from leibler.divergence import ChiSquared, ForwardKL, JensenShannon, ReverseKL, TotalVariation
from leibler.errors import RecipeError
from leibler.estimate import K1, K2, K3, AbsLogRatio, AsReward, Exact, LowVarKL, Pathwise, ScoreFunction

ALL = (
    K1(), K2(), K3(), K1(weight="differentiable"), K2(weight="differentiable"), K3(weight="differentiable"),
    K3(weight=None), Pathwise(), Pathwise(weight=None), Pathwise(centred=False), ScoreFunction(),
    ScoreFunction(baseline=0.5), LowVarKL(), AbsLogRatio(), AsReward("k1"), AsReward("k3"), K3(clamp=2.0),
)  # fmt: skip
LAWS = ("model", "target", "behaviour")


def offered(estimator, law: str) -> bool:
    return not (law == "target" and (isinstance(estimator, AsReward) or getattr(estimator, "weight", "") == "differentiable"))  # fmt: skip  # noqa: E501


def draw(seed: int, n: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(-3 * torch.rand(n, generator=g, dtype=torch.float64) for _ in range(3))  # type: ignore[return-value]


def literally(name: str, p: torch.Tensor, q: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """The formulas as papers print and code writes them, differentiated by autograd."""
    log_u, w = p - q, (p - s).exp()
    k3 = (-log_u).exp() - 1 + log_u
    return {
        "k1": log_u,
        "k2": log_u**2 / 2,
        "k3": k3,
        "k3 target": log_u.exp() - 1 - log_u,
        "detached w k2": w.detach() * log_u**2 / 2,
        "w k1": w * log_u,
        "w k2": w * log_u**2 / 2,
        "w k3": w * k3,
        "fresh w k3": (p - p.detach()).exp() * k3,
        "k3+": k3.detach() + log_u**2 / 2 - (log_u**2 / 2).detach(),
        "abs": log_u.abs(),
    }[name]


@pytest.mark.parametrize(
    ("name", "estimator", "law"),
    [
        ("k1", K1(), "model"),
        ("k2", K2(), "model"),
        ("k3", K3(), "model"),
        ("k3", K3(weight=None), "behaviour"),
        ("k3 target", K3(), "target"),
        ("k3 target", Pathwise(), "target"),
        ("detached w k2", K2(), "behaviour"),
        ("w k1", K1(weight="differentiable"), "behaviour"),
        ("w k2", K2(weight="differentiable"), "behaviour"),
        ("w k3", K3(weight="differentiable"), "behaviour"),
        ("fresh w k3", K3(weight="differentiable"), "model"),
        ("k3+", K3(weight="differentiable"), "model"),
        ("k3", LowVarKL(), "behaviour"),
        ("abs", AbsLogRatio(), "behaviour"),
    ],
)
def test_equals_the_published_formula_token_by_token(name, estimator, law):
    p, q, s = draw(0)
    divergence = ForwardKL() if "target" in name else ReverseKL()
    p.requires_grad_()
    want = literally(name, p, q, s)
    got = estimator.loss(divergence, p, q, law, s)
    assert torch.allclose(got, want, atol=1e-13)
    slope = [torch.autograd.grad(x.sum(), p)[0] for x in (got, want)]
    assert torch.allclose(*slope, atol=1e-13)


def test_pathwise_and_score_function_have_the_same_coefficients_on_model_samples():
    """With the weight q/p, u f'(u) q/p = f'(u): one gradient, two derivations."""
    p, q, s = draw(1)
    for divergence in (ReverseKL(), ForwardKL(), JensenShannon(), ChiSquared(), TotalVariation()):
        for law in ("model", "behaviour"):
            gradients = []
            for estimator in (Pathwise(), ScoreFunction()):
                leaf = p.clone().requires_grad_()
                estimator.loss(divergence, leaf, q, law, s).sum().backward()
                gradients.append(leaf.grad)
            assert torch.allclose(*gradients, atol=1e-12)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("estimator", ALL, ids=str)
def test_extreme_log_ratios_stay_numbers(estimator, law):
    if not offered(estimator, law):
        return
    far = [0.0, -1e-9, -90.0, -800.0, -1e4]
    p, q, s = (x.flatten().float() for x in torch.meshgrid(*[torch.tensor(far)] * 3, indexing="ij"))
    p.requires_grad_()
    for divergence in (ReverseKL(), ForwardKL(), JensenShannon(), ChiSquared()):
        loss = estimator.loss(divergence, p, q, law, s)
        assert not loss.isnan().any()
        (grad,) = torch.autograd.grad(loss.sum(), p)
        assert grad.isfinite().all()
        assert grad.square().sum().isfinite(), "a squared gradient norm must not overflow"
        assert not estimator.value(ReverseKL(), p, q, law, s).isnan().any() or isinstance(estimator, LowVarKL)


@pytest.mark.parametrize("nothing", [-math.inf, -7e29], ids=["-inf", "floor"])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("estimator", ALL, ids=str)
def test_a_token_impossible_under_both_contributes_exactly_nothing(estimator, law, nothing):
    if not offered(estimator, law):
        return
    p = torch.full((2,), nothing, requires_grad=True)
    loss = estimator.loss(ReverseKL(), p, torch.full((2,), nothing), law, torch.full((2,), -1.0))
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0]
    assert p.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("estimator", ALL, ids=str)
def test_a_token_impossible_under_its_own_law_contributes_exactly_nothing(estimator, law):
    """It cannot have been drawn; in an enumeration its weight is 0, and 0 times anything must stay 0."""
    if not offered(estimator, law):
        return
    logp = {name: torch.tensor([-1.0]) for name in LAWS} | {law: torch.tensor([-math.inf])}
    p = logp["model"].requires_grad_()
    loss = estimator.loss(ReverseKL(), p, logp["target"], law, logp["behaviour"])
    loss.sum().backward()
    assert loss.item() == 0.0
    assert p.grad.item() == 0.0


@pytest.mark.parametrize("nothing", [-math.inf, -7e29], ids=["-inf", "floor"])
@pytest.mark.parametrize("estimator", [K1(), K2(), K3(), ScoreFunction(), Pathwise(), K3(weight="differentiable")])
def test_a_target_that_forbids_the_sample_is_infinitely_far_without_a_gradient(estimator, nothing):
    p = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss = estimator.loss(ReverseKL(), p, torch.tensor([nothing, -2.5]), "model")
    loss.sum().backward()
    assert loss[0] == math.inf
    assert loss[1].isfinite()
    assert p.grad[0] == 0.0
    assert p.grad[1] != 0.0


def test_a_bounded_divergence_stays_finite_and_keeps_its_gradient_where_the_target_is_zero():
    p = torch.tensor([-1.0], requires_grad=True)
    q = torch.tensor([-math.inf])
    loss = ScoreFunction().loss(JensenShannon(), p, q, "model")
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(2.0) / 2 + 0.0, abs=0.4)
    assert 0.3 < p.grad.item() < 1.0


def test_a_model_that_forbids_a_target_sample_is_infinitely_far_in_forward_kl_only():
    p, q = torch.tensor([-math.inf], requires_grad=True), torch.tensor([-1.0])
    forward = Pathwise().loss(ForwardKL(), p, q, "target")
    forward.sum().backward()
    assert forward.item() == math.inf
    assert p.grad.item() == 0.0
    assert Pathwise().value(ReverseKL(), p.detach(), q, "target").item() == pytest.approx(1.0)  # f(0) - f'(1)(0 - 1)


@given(st.floats(-30, 30), st.sampled_from(LAWS))
def test_tangent_corrected_values_are_never_negative(log_u: float, law: str):
    p, q, s = (torch.tensor([x], dtype=torch.float64) for x in (-1.0, -1.0 - log_u, -1.5))
    for divergence in (ReverseKL(), ForwardKL(), JensenShannon(), ChiSquared(), TotalVariation()):
        for estimator in (Pathwise(), ScoreFunction()):
            assert estimator.value(divergence, p, q, law, s).item() >= -1e-12
    assert K3().value(ReverseKL(), p, q, law, s).item() >= 0.0


def test_a_clamp_stops_the_gradient_and_bounds_the_value():
    p = torch.tensor([-5.0, -1.0], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([-1.0, -1.1], dtype=torch.float64)
    loss = K3(clamp=2.0).loss(ForwardKL(), p, q, "model")
    loss.sum().backward()
    assert loss[0].item() == 2.0
    assert p.grad[0].item() == 0.0
    assert p.grad[1].item() == pytest.approx(1 - math.exp(-0.1))
    low = LowVarKL().loss(ForwardKL(), p, q, "model")
    assert low[0].item() == 10.0  # e^4 - 1 - 4 is beyond it


def test_a_baseline_changes_coefficients_by_a_constant_only():
    w = World(9)
    with_b, without = (
        w.gradient((w.law("model") * ScoreFunction(baseline=b).loss(JensenShannon(), w.p, w.q, "model")).sum())
        for b in (0.3, None)
    )
    assert torch.allclose(with_b, without, atol=1e-12)


def test_near_the_target_the_default_baseline_has_the_least_variance():
    w = World(9)
    w.y = w.z.detach() + 0.01
    spread = {}
    for b in (None, 0.0):
        leaf = w.p.detach().requires_grad_()
        ScoreFunction(baseline=b).loss(ReverseKL(), leaf, w.q, "model").sum().backward()
        spread[b] = float((w.law("model") * leaf.grad.square()).sum())
    assert spread[None] < 1e-3 * spread[0.0]


def test_only_the_model_receives_gradient():
    p, q, s = (x.requires_grad_() for x in draw(2))
    for estimator in ALL:
        loss = estimator.loss(ReverseKL(), p, q, "behaviour", s)
        assert torch.autograd.grad(loss.sum(), (q, s), allow_unused=True) == (None, None)
        assert not estimator.value(ReverseKL(), p, q, "behaviour", s).requires_grad


def test_small_log_ratios_in_float32_are_not_noise():
    """exp(x) - 1 - x at x = 1e-4 in float32 is off by more than its value; the estimators work in float64."""
    p, q = torch.tensor([-1.0]), torch.tensor([-1.0 - 1e-4])
    exact = float(p.double() - q.double()) ** 2 / 2
    assert K3().value(ReverseKL(), p, q, "model").item() == pytest.approx(exact, rel=1e-3)


def test_losses_keep_dtype_and_shape():
    p = torch.full((2, 3), -1.0, dtype=torch.bfloat16, requires_grad=True)
    loss = ScoreFunction().loss(ReverseKL(), p, torch.full((2, 3), -1.5), "model")
    assert (loss.dtype, loss.shape) == (torch.bfloat16, p.shape)
    loss.sum().backward()
    assert p.grad.dtype == torch.bfloat16


def test_exact_takes_rows():
    w = World(1)
    loss = Exact().loss(ReverseKL(), w.z[None], w.y[None])
    assert loss.shape == (1,)
    assert torch.allclose(w.gradient(loss.sum()), w.gradient((w.p.exp() * (w.p - w.q)).sum()), atol=1e-12)


def test_mistakes_are_explained():
    p, q, _ = draw(0)
    with pytest.raises(RecipeError, match="needs behaviour_logp"):
        K2().loss(ReverseKL(), p, q, "behaviour")
    with pytest.raises(RecipeError, match="must be one of model, target, behaviour"):
        K2().loss(ReverseKL(), p, q, "teacher")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="leave the weight out"):
        K3(weight="differentiable").loss(ForwardKL(), p, q, "target")
    with pytest.raises(RecipeError, match=r"estimates ReverseKL or ForwardKL"):
        K1().value(JensenShannon(), p, q, "model")
