"""Scores, contrasts and links against plain loops."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leibler.divergence import Alpha, CauchySchwarz, ChiSquared, ForwardKL, JensenShannon, ReverseKL, TotalVariation
from leibler.errors import RecipeError
from leibler.objective import (
    CHOSEN,
    REJECTED,
    AgainstHardest,
    Geometric,
    Identity,
    ImplicitReward,
    Logistic,
    LogProb,
    MeanLogProb,
    Pairs,
    Policy,
    Preference,
    Reference,
    SequenceMean,
    Squared,
    Teacher,
)
from objective.made import nested, rows, view


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from([0, CHOSEN, REJECTED]), st.booleans()), min_size=1, max_size=9
    )
)
def test_pairs_against_a_loop(items):
    made = rows(
        [1] * len(items), [g for g, _, _ in items], role=[r for _, r, _ in items], muted=[m for _, _, m in items]
    )
    score = torch.randn(len(items), dtype=torch.float64)
    z, weight = Pairs()(score, made)
    expected = [
        [float(score[i] - score[j]), 0.0 if items[i][2] or items[j][2] else 1.0]
        for i, j in product(range(len(items)), repeat=2)
        if items[i][0] == items[j][0] and items[i][1] == CHOSEN and items[j][1] == REJECTED
    ]
    assert sorted([a, b] for a, b in zip(z.tolist(), weight.tolist(), strict=True)) == sorted(expected)
    assert Pairs().count(made) == len(expected)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0.0, 1.0]), st.booleans()), min_size=1, max_size=9),
    st.sampled_from([0.05, 0.5, 10.0, 1e6]),
)
def test_against_hardest_against_a_loop(items, tau):
    made = rows(
        [1] * len(items), [g for g, _, _ in items], reward=[r for _, r, _ in items], muted=[m for _, _, m in items]
    )
    score = torch.randn(len(items), dtype=torch.float64)
    z, weight = AgainstHardest(tau)(score, made)
    total = 0.0
    for group in {g for g, _, _ in items}:
        right = [i for i, (g, r, _) in enumerate(items) if g == group and r > 0.5]
        wrong = [float(score[i]) for i, (g, r, _) in enumerate(items) if g == group and r <= 0.5]
        if right and wrong:
            top = max(wrong)
            hardest = top + tau * math.log1p(sum(math.expm1((s - top) / tau) for s in wrong) / len(wrong))
            total += sum((float(score[i]) - hardest) * (not items[i][2]) for i in right) / len(right)
    assert float((z * weight).sum()) == pytest.approx(total, rel=1e-9, abs=1e-9)
    assert AgainstHardest(tau).count(made) == made.groups


def hardest_at(tau: float, dtype: torch.dtype) -> tuple[float, list[float]]:
    score = torch.tensor([0.3, -1.0, 0.5, 0.4], dtype=dtype, requires_grad=True)
    z, _ = AgainstHardest(tau)(score, rows([1] * 4, [0] * 4, reward=[1.0, 0.0, 0.0, 0.0]))
    z.sum().backward()
    return float(z.detach()), score.grad.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_limits_of_the_temperature(dtype):
    """Large: the mean of the wrong rows, in any precision; small: the highest of them."""
    for tau in (1e4, 1e7, 1e12):
        z, slope = hardest_at(tau, dtype)
        assert z == pytest.approx(0.3 - (-1.0 + 0.5 + 0.4) / 3, abs=2e-4 if tau == 1e4 else 1e-6)
        assert slope == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3], abs=2e-4)
    z, slope = hardest_at(1e-3, dtype)
    assert z == pytest.approx(0.3 - 0.5, abs=2e-3)
    assert slope[2] < -0.99
    z, slope = hardest_at(1e-9, dtype)
    assert z == pytest.approx(0.3 - 0.5, abs=1e-6)


@given(st.floats(0.1, 20.0))
def test_the_wrong_rows_share_the_gradient_by_softmax(tau):
    wrong = torch.tensor([-1.0, 0.5, 0.4], dtype=torch.float64)
    _, slope = hardest_at(tau, torch.float64)
    assert slope[1:] == pytest.approx((-(wrong / tau).softmax(0)).tolist(), rel=1e-9)
    assert slope[0] == 1.0


@pytest.mark.parametrize("tau", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_without_meaning_is_refused(tau):
    with pytest.raises(RecipeError, match="positive and finite"):
        AgainstHardest(tau)


def test_groups_without_both_kinds_stay_in_the_denominator():
    made = rows([1] * 5, [0, 0, 1, 2, 2], reward=[1.0, 1.0, 0.0, 1.0, 0.0])
    z, _ = AgainstHardest()(torch.zeros(5, dtype=torch.float64), made)
    assert z.shape == (1,)
    assert AgainstHardest().count(made) == 3
    assert Pairs().count(made) == 0


# ---- scores ------------------------------------------------------------------------------------------------------


def test_mean_log_prob():
    made = view(rows([3, 1, 0]))
    score = MeanLogProb()(made).tolist()
    per_row = nested(made.rows, made.get(LogProb(Policy())))
    assert score == pytest.approx([sum(x) / max(len(x), 1) for x in per_row])


GENERATORS = {
    # f' by the formula of each, as a function of u.
    ReverseKL(): lambda u: math.log(u) + 1,
    ForwardKL(): lambda u: -1 / u,
    JensenShannon(0.5): lambda u: 0.5 * math.log(2 * u / (1 + u)),
    Alpha(0.5): lambda u: 0.5 * u ** (-0.5) / (0.5 * -0.5),
}


@pytest.mark.parametrize("divergence", GENERATORS, ids=repr)
def test_implicit_rewards_differ_by_the_slope_of_the_generator(divergence):
    made = view(rows([3, 1]))
    ratio = [
        sum(a) - sum(b)
        for a, b in zip(
            nested(made.rows, made.get(LogProb(Policy()))),
            nested(made.rows, made.get(LogProb(Reference()))),
            strict=True,
        )
    ]
    reward = ImplicitReward(divergence, beta=0.3)(made)
    slope = GENERATORS[divergence]
    # Constants cancel in every contrast.
    assert float(reward[0] - reward[1]) == pytest.approx(0.3 * (slope(math.exp(ratio[0])) - slope(math.exp(ratio[1]))))
    clipped = ImplicitReward(divergence, beta=0.3, clip=0.1)(made)
    held = [max(-0.1, min(0.1, x)) for x in ratio]
    assert float(clipped[0] - clipped[1]) == pytest.approx(0.3 * (slope(math.exp(held[0])) - slope(math.exp(held[1]))))


def test_a_geometric_law_is_not_normalised_at_each_token():
    made = view(rows([3, 2]))
    law = Geometric(reference=0.25, teacher=0.75)
    ratio = ImplicitReward(beta=1.0, to=law).log_ratio(made)
    p, r, t = (made.get(LogProb(h)) for h in (Policy(), Reference(), Teacher()))
    torch.testing.assert_close(ratio, made.sum_rows(p - 0.25 * r - 0.75 * t))


@pytest.mark.parametrize("divergence", [TotalVariation(), ChiSquared(), CauchySchwarz()], ids=repr)
def test_divergences_without_an_implicit_reward(divergence):
    with pytest.raises(RecipeError, match=f"{type(divergence).__name__} gives no implicit reward: ."):
        ImplicitReward(divergence)


# ---- links -------------------------------------------------------------------------------------------------------


@given(st.floats(-30, 30), st.sampled_from([0.0, 0.1, 0.5]))
def test_links(z, smoothing):
    value = torch.tensor(z, dtype=torch.float64)
    up, down = math.log1p(math.exp(-z)), math.log1p(math.exp(z))
    assert float(Logistic(smoothing)(value)) == pytest.approx((1 - smoothing) * up + smoothing * down, rel=1e-9)
    assert float(Squared(0.5)(value)) == pytest.approx((z - 0.5) ** 2)
    assert float(Identity()(value)) == -z


def test_preference_takes_no_weight_per_token():
    with pytest.raises(RecipeError, match="Preference compares whole responses"):
        Preference(MeanLogProb(), weight=2.0)
    with pytest.raises(RecipeError, match="Preference compares whole responses"):
        Preference(MeanLogProb(), reduce=SequenceMean())
