"""Every row of the exactness table, by enumeration; what the check accepts, refuses and says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from estimate.enumerated import World, functional, generated
from leibler.divergence import (
    Alpha,
    ChiSquared,
    ForwardKL,
    JensenShannon,
    Renyi,
    ReverseKL,
    Swapped,
    TotalVariation,
    Tsallis,
)
from leibler.errors import RecipeError
from leibler.estimate import (
    FACTS,
    K1,
    K2,
    K3,
    AbsLogRatio,
    AsReward,
    Exact,
    Fact,
    LogSquared,
    LowVarKL,
    Pathwise,
    ScoreFunction,
    alternatives,
    check,
    exactness,
    spelt,
)

F_DIVERGENCES = (ReverseKL(), ForwardKL(), JensenShannon(), ChiSquared(), TotalVariation())
KLS = (ReverseKL(), ForwardKL())
SEEDS = (0, 1, 2)


def unclamped(estimator):
    """The table speaks of where no clamp acts."""
    return replace(estimator, clamp=1e9) if isinstance(estimator, LowVarKL) else estimator


def by_generator(fact: Fact) -> bool:
    return isinstance(fact.estimator, Pathwise | ScoreFunction)


CASES = [
    pytest.param(fact, divergence, id=f"{spelt(fact.estimator)}-{fact.sampled_from}-{type(divergence).__name__}")
    for fact in FACTS
    for divergence in (F_DIVERGENCES if by_generator(fact) else KLS)
]


def judged(fact: Fact, divergence, w: World) -> tuple[torch.Tensor, torch.Tensor]:
    """The value and the gradient that the table claims."""
    if fact.descends == "itself":
        exact = functional(repr(divergence)[:-2], w) if divergence in KLS else w.exact(divergence)
        return exact.detach(), w.gradient(exact)
    if by_generator(fact):
        return generated(fact.descends, divergence, w)
    return functional(fact.averages_to, w).detach(), w.gradient(functional(fact.descends, w))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("fact", "divergence"), CASES)
def test_a_row_of_the_table_is_an_identity(fact: Fact, divergence, seed: int):
    w = World(seed)
    per_token = unclamped(fact.estimator).loss(divergence, w.p, w.q, fact.sampled_from, w.s)
    total = (w.law(fact.sampled_from) * per_token).sum()
    value, gradient = judged(fact, divergence, w)
    assert total.item() == pytest.approx(value.item(), abs=1e-8)
    assert torch.allclose(w.gradient(total), gradient, atol=1e-8, rtol=0)


@pytest.mark.parametrize(("fact", "divergence"), CASES)
def test_what_the_table_calls_biased_is_biased(fact: Fact, divergence):
    """Otherwise a row could claim too little: a gradient that is not the divergence's must differ from it."""
    w = World(3)
    per_token = unclamped(fact.estimator).loss(divergence, w.p, w.q, fact.sampled_from, w.s)
    got = w.gradient((w.law(fact.sampled_from) * per_token).sum())
    want = w.gradient(w.exact(divergence))
    said = exactness(divergence, fact.estimator, fact.sampled_from)
    same = torch.allclose(got, want, atol=1e-6, rtol=0)
    assert same == (said.descends == spelt_name(divergence))


def spelt_name(divergence) -> str:
    return type(divergence).__name__ if divergence in KLS else repr(divergence)


@pytest.mark.parametrize("law", ["model", "target", "behaviour"])
@pytest.mark.parametrize("divergence", F_DIVERGENCES, ids=lambda d: type(d).__name__)
def test_every_alternative_named_is_exact(divergence, law: str):
    w = World(4)
    want = w.gradient(w.exact(divergence))
    found = alternatives(divergence, law)
    assert len(found) >= 3
    assert found[-1] == Exact()
    for estimator in found[:-1]:
        got = w.gradient((w.law(law) * estimator.loss(divergence, w.p, w.q, law, w.s)).sum())
        assert torch.allclose(got, want, atol=1e-8, rtol=0), spelt(estimator)


@pytest.mark.parametrize("law", ["model", "target", "behaviour"])
@pytest.mark.parametrize("divergence", F_DIVERGENCES, ids=lambda d: type(d).__name__)
def test_alternatives_to_an_unnormalised_target_do_not_see_the_missing_constant(divergence, law: str):
    w = World(5)
    want = w.gradient(w.exact(divergence))
    for estimator in alternatives(divergence, law, target_normalised=False):
        if isinstance(estimator, Exact):
            continue
        got = w.gradient((w.law(law) * estimator.loss(divergence, w.p, w.q + 0.7, law, w.s)).sum())
        assert torch.allclose(got, want, atol=1e-8, rtol=0), spelt(estimator)


@pytest.mark.parametrize("law", ["model", "target", "behaviour"])
@pytest.mark.parametrize("divergence", F_DIVERGENCES, ids=lambda d: type(d).__name__)
def test_no_usable_estimator_of_an_unnormalised_target_is_left_out(divergence, law: str):
    kept = alternatives(divergence, law, target_normalised=False)
    for estimator in alternatives(divergence, law):
        if isinstance(estimator, Exact):
            continue
        unharmed = True
        for w in map(World, range(6)):
            want = w.gradient(w.exact(divergence))
            got = w.gradient((w.law(law) * estimator.loss(divergence, w.p, w.q + 1.5, law, w.s)).sum())
            unharmed &= torch.allclose(got, want, atol=1e-8, rtol=0)
        assert unharmed == (estimator in kept), spelt(estimator)


@pytest.mark.parametrize(
    ("divergence", "estimator", "law"),
    [
        (ReverseKL(), K2(), "model"),
        (ReverseKL(), K2(clamp=10.0), "model"),
        (ForwardKL(), K3(), "model"),
        (ReverseKL(), K3(weight="differentiable"), "model"),
        (ForwardKL(), K1(), "target"),
        (ForwardKL(), K3(), "target"),
        (ReverseKL(), K2(), "behaviour"),
        (ReverseKL(), K2(weight=None), "behaviour"),
        (ForwardKL(), K3(weight=None), "behaviour"),
        (ForwardKL(), LowVarKL(), "model"),
        (ForwardKL(), LowVarKL(), "behaviour"),
        (ReverseKL(), AbsLogRatio(), "target"),
        (ReverseKL(), AsReward("k1"), "model"),
        (ReverseKL(), AsReward("k3"), "model"),
        (ForwardKL(), LogSquared(), "target"),
        (JensenShannon(), ScoreFunction(clamp=20.0), "model"),
        (ChiSquared(), Pathwise(), "target"),
        (Renyi(0.5), Exact(), "model"),
    ],
    ids=str,
)
def test_accepted(divergence, estimator, law):
    check(divergence, estimator, law)


@pytest.mark.parametrize(
    ("divergence", "estimator", "law", "says"),
    [
        (ReverseKL(), K3(), "model", r"descends ForwardKL, not ReverseKL; use K2\(\), K1\(weight='differentiable'\)"),
        (ReverseKL(), K1(), "model", r"K1\(\) descends nothing, not ReverseKL"),
        (ForwardKL(), K1(), "model", r"descends nothing, not ForwardKL; use K3\(\)"),
        (ForwardKL(), K2(), "model", r"descends ReverseKL, not ForwardKL; use K3\(\)"),
        (ReverseKL(), K2(weight="differentiable"), "model", "not ReverseKL"),
        (ReverseKL(), K1(), "target", r"descends ForwardKL, not ReverseKL; use Pathwise\(\)"),
        (ReverseKL(), K2(), "target", "not ReverseKL"),
        (ReverseKL(), LowVarKL(), "model", r"LowVarKL\(\) descends ForwardKL"),
        (ReverseKL(), K1(weight=None), "behaviour", "not ReverseKL"),
        (ReverseKL(), K3(weight=None), "behaviour", "not ReverseKL"),
        (JensenShannon(), K2(), "model", r"use Pathwise\(\), ScoreFunction\(\) or Exact\(\)"),
        (ReverseKL(), AsReward(), "target", "not defined on samples of the target"),
        (ReverseKL(), LogSquared(), "model", "not defined on samples of the model"),
        (Renyi(0.5), ScoreFunction(), "model", r"no scalar generator .* use Exact\(\)"),
        (Renyi(0.5), K2(), "model", r"use Exact\(\)\."),
        (ReverseKL(), K2(), "student", "sampled_from must be one of model, target, behaviour, not 'student'"),
    ],
    ids=str,
)
def test_refused_in_one_sentence_that_names_the_remedy(divergence, estimator, law, says):
    with pytest.raises(RecipeError, match=says) as caught:
        check(divergence, estimator, law)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (Alpha(1.0), "ReverseKL"),
        (Alpha(0.0), "ForwardKL"),
        (Swapped(ForwardKL()), "ReverseKL"),
        (Tsallis(1.0), "ReverseKL"),
    ],
    ids=repr,
)
def test_a_kl_is_recognised_under_another_name(other, name):
    assert exactness(other, K2(), "model").descends == "ReverseKL"
    assert exactness(other, K2(), "model").gradient == (name == "ReverseKL")
    assert not exactness(Alpha(1.001), K2(), "model").gradient


def test_a_stale_sample_of_the_model_is_a_behaviour():
    assert exactness(ReverseKL(), K2(weight=None), "model").gradient
    stale = exactness(ReverseKL(), K2(weight=None), "model", stale=True)
    assert not stale.gradient
    assert stale.descends == "E_behaviour[(log u)^2]/2"
    assert exactness(ReverseKL(), K2(), "model", stale=True).gradient
    assert exactness(ForwardKL(), K1(), "target", stale=True).gradient


def test_an_unnormalised_target_is_refused_where_it_matters():
    check(ReverseKL(), K2(), "model", target_normalised=False)
    with pytest.raises(RecipeError, match=r"K3\(\) needs a normalised target.*use a normalised target"):
        check(ForwardKL(), K3(), "model", target_normalised=False)
    check(ForwardKL(), K3(), "target", target_normalised=False)
    with pytest.raises(RecipeError, match="known only up to a constant"):
        check(JensenShannon(), ScoreFunction(), "model", target_normalised=False)


def test_value_and_gradient_are_told_apart():
    k3 = exactness(ForwardKL(), K3(), "model")
    assert (k3.value, k3.gradient, k3.averages_to) == (False, True, "ReverseKL")
    assert "ForwardKL's" in k3.note
    k2 = exactness(ReverseKL(), K2(), "model")
    assert (k2.value, k2.gradient) == (False, True)
    clamped = exactness(ReverseKL(), ScoreFunction(clamp=20.0), "model")
    assert (clamped.value, clamped.gradient, clamped.descends) == (False, False, "ReverseKL")
    assert "clamp of 20" in clamped.note


def test_the_clamp_of_low_var_kl_descends_the_uncut_tokens_only():
    """E_model[min(k3, clamp)] with the sampler held: tokens beyond the clamp pull no more, wherever they are."""
    w = World(2)
    log_u = w.p - w.q
    k3 = (-log_u).exp() - 1 + log_u
    assert (k3 > 1.0).any()
    loss = (w.law("model") * LowVarKL(clamp=1.0).loss(ForwardKL(), w.p, w.q, "model")).sum()
    cut = (w.law("model") * k3.clamp(max=1.0)).sum()
    assert loss.item() == pytest.approx(cut.item())
    assert torch.allclose(w.gradient(loss), w.gradient(cut), atol=1e-12)
    assert not torch.allclose(w.gradient(loss), w.gradient(w.exact(ForwardKL())), atol=1e-3)


def test_the_table_has_no_row_twice():
    keys = [(fact.estimator, fact.sampled_from) for fact in FACTS]
    assert len(keys) == len(set(keys))
