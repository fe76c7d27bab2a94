"""Signals and shapers against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leibler.divergence import ForwardKL, ReverseKL
from leibler.errors import RecipeError
from leibler.objective import (
    AdaptiveKL,
    Behaviour,
    BetaKernel,
    Clipped,
    Column,
    Comparison,
    GroupAny,
    GroupNormalised,
    Importance,
    InReward,
    LeaveOneOut,
    Linear,
    LogProb,
    LogRatio,
    MatchHidden,
    Model,
    Old,
    PerViolation,
    Policy,
    Reference,
    Returns,
    Reward,
    Teacher,
    ToGo,
    View,
    Whitened,
)
from leibler.objective.advantages import SequenceCredit
from leibler.objective.signals import rollout_parts
from objective.made import nested, rows, view

LENGTHS = st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(lambda x: sum(x) > 0)


def values(made: View, name: str = "teacher") -> list[list[float]]:
    return nested(made.rows, made.get(LogProb({"teacher": Teacher(), "old": Old(), "reference": Reference()}[name])))


# ---- advantages of groups ----------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-5, 5)), min_size=1, max_size=10))
def test_group_normalised_against_a_loop(items):
    made = view(rows([1] * len(items), [g for g, _ in items], reward=[r for _, r in items]))
    for std in ("group", "batch", None):
        got = (Reward() >> GroupNormalised(std=std))(made).tolist()
        centred = []
        for group, reward in items:
            siblings = [r for g, r in items if g == group]
            centred.append(reward - sum(siblings) / len(siblings) if max(siblings) > min(siblings) else 0.0)
        for i, (group, _) in enumerate(items):
            siblings = [c for c, (g, _) in zip(centred, items, strict=True) if g == group]
            scale = {
                "group": math.sqrt(sum(c * c for c in siblings) / max(len(siblings) - 1, 1)) + 1e-6,
                "batch": math.sqrt(sum(c * c for c in centred) / len(centred)) + 1e-6,
                None: 1.0,
            }[std]
            assert got[i] == pytest.approx(centred[i] / scale, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("value", [0.1, 0.7, 1000.1, -3e7, 1e-30, 0.0])
@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("std", ["group", "batch", None])
def test_equal_rewards_give_exactly_zero(value, count, std):
    made = view(rows([1] * (count + 2), [0] * count + [1] * 2, reward=torch.tensor([value] * count + [0.0, 1.0])))
    got = (Reward() >> GroupNormalised(std=std))(made)
    assert got[:count].tolist() == [0.0] * count
    assert float(got[count:].abs().min()) > 0.1


def test_a_tiny_difference_still_counts():
    made = view(rows([1] * 2, [0, 0], reward=[1e-5, 3e-5]))
    assert (Reward() >> GroupNormalised())(made).tolist() == pytest.approx([-0.66, 0.66], abs=0.01)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6))
def test_leave_one_out(rewards):
    made = view(rows([1] * (len(rewards) + 1), [0] * len(rewards) + [1], reward=[*rewards, 3.0]))
    got = (Reward() >> LeaveOneOut())(made).tolist()
    for i, reward in enumerate(rewards):
        others = rewards[:i] + rewards[i + 1 :]
        assert got[i] == pytest.approx(reward - sum(others) / len(others), rel=1e-9, abs=1e-9)
    assert got[-1] == 3.0  # alone: there is nothing to compare with


def test_group_any_and_its_complement():
    made = view(rows([1] * 5, [0, 0, 1, 1, 2], reward=[0.0, 0.2, 0.0, 0.0, 1.0]))
    assert GroupAny()(made).tolist() == [1, 1, 0, 0, 1]
    assert made.signal(~GroupAny()).tolist() == [0, 0, 1, 1, 0]


def test_per_response_shapers_refuse_numbers_per_token_when_the_chain_is_built():
    per_token = LogRatio(Teacher(), Old())
    for shaper in (GroupNormalised(), LeaveOneOut()):
        with pytest.raises(RecipeError, match=f"{type(shaper).__name__} works on one number per response.* per token"):
            per_token >> shaper
        with pytest.raises(RecipeError, match="one number per response"):
            Reward() >> InReward(Reference(), 0.1) >> shaper
    with pytest.raises(RecipeError, match="GroupAny works on one number per response"):
        GroupAny(per_token)


# ---- sums over time ----------------------------------------------------------------------------------------------


@given(LENGTHS, st.integers(0, 3), st.sampled_from([None, "remaining"]))
def test_to_go_against_a_loop(lengths, start, per):
    made = view(rows(lengths))
    got = nested(made.rows, (LogRatio(Teacher(), Old()) >> ToGo(start, per))(made))
    for mine, teacher, old in zip(got, values(made), values(made, "old"), strict=True):
        ratio = [a - b for a, b in zip(teacher, old, strict=True)]
        for t in range(len(ratio)):
            rest = ratio[t + start :]
            expected = sum(rest) / (len(rest) if per and rest else 1)
            assert mine[t] == pytest.approx(expected, abs=1e-12)


@given(LENGTHS)
def test_a_reward_is_paid_at_the_last_event(lengths):
    reward = [float(i + 1) for i in range(len(lengths))]
    made = view(rows(lengths, reward=reward))
    got = nested(made.rows, (Reward() >> ToGo())(made))
    assert got == [[r] * n for r, n in zip(reward, lengths, strict=True)]
    late = nested(made.rows, (Reward() >> ToGo(start=1))(made))
    assert late == [[r] * (n - 1) + [0.0] * min(n, 1) for r, n in zip(reward, lengths, strict=True)]


@given(LENGTHS, st.floats(0, 2))
def test_the_divergence_inside_the_reward(lengths, coefficient):
    made = view(rows(lengths, reward=[float(i) for i in range(len(lengths))]))
    kl = InReward(Reference(), coefficient)
    got = nested(made.rows, (Reward() >> kl)(made))
    ratios = []
    for i, (old, reference) in enumerate(zip(values(made, "old"), values(made, "reference"), strict=True)):
        ratio = [a - b for a, b in zip(old, reference, strict=True)]
        paid = [0.0] * len(ratio)
        if paid:
            paid[-1] = float(i)
        assert got[i] == pytest.approx(
            [p - coefficient * r for p, r in zip(paid, ratio, strict=True)], rel=1e-6, abs=1e-6
        )
        ratios.append(sum(ratio))
    measured = kl.measures(made)
    assert measured["divergence_per_sequence"] == pytest.approx(sum(ratios) / len(ratios))
    assert measured["sequences"] == len(lengths)


def test_the_place_of_the_divergence_in_the_chain_matters():
    made = view(rows([2, 2], [0, 0], reward=[0.0, 1.0]))
    kl = InReward(Reference(), 0.1)
    after = (Reward() >> GroupNormalised() >> kl >> ToGo())(made)
    before = (Reward() >> kl >> ToGo() >> Whitened())(made)
    assert not torch.allclose(after, before)


@given(LENGTHS)
def test_credit_of_sequences(lengths):
    made = view(rows(lengths))
    ratio = LogRatio(Old(), Teacher())
    whole = nested(made.rows, (ratio >> SequenceCredit(ReverseKL(), "sequence"))(made))
    to_go = nested(made.rows, (ratio >> SequenceCredit(ReverseKL(), "to_go"))(made))
    plain = nested(made.rows, (ratio >> ToGo())(made))
    forward = nested(made.rows, (ratio >> SequenceCredit(ForwardKL(), "sequence"))(made))
    for i, (old, teacher) in enumerate(zip(values(made, "old"), values(made), strict=True)):
        total = sum(old) - sum(teacher)
        assert whole[i] == pytest.approx([total] * len(old), abs=1e-9)
        assert to_go[i] == pytest.approx(plain[i], abs=1e-9)
        assert forward[i] == pytest.approx([1 - math.exp(-total)] * len(old), rel=1e-9, abs=1e-9)


# ---- scales ------------------------------------------------------------------------------------------------------


def test_whitening_over_events_and_over_rows():
    made = view(rows([3, 1, 2], reward=[1.0, 5.0, 3.0]))
    for signal in (LogRatio(Teacher(), Old()) >> Whitened(), Reward() >> Whitened()):
        got = signal(made)
        assert float(got.mean()) == pytest.approx(0, abs=1e-12)
        assert float(got.std(unbiased=False)) == pytest.approx(1, abs=1e-6)
    shifted = (Reward() >> Whitened(centre=False))(made)
    assert float(shifted.mean()) == pytest.approx(3 / math.sqrt(8 / 3), rel=1e-6)


def test_clipped():
    made = view(rows([1] * 3, reward=[-7.0, 0.5, 7.0]))
    assert (Reward() >> Clipped(2.0))(made).tolist() == [-2.0, 0.5, 2.0]


def test_importance_weights():
    made = view(rows([3, 2]))
    ratio = (made.get(LogProb(Policy())) - made.get(LogProb(Behaviour()))).exp()
    torch.testing.assert_close(Importance()(made), ratio)
    assert float(Importance(most=0.7)(made).max()) == pytest.approx(0.7)
    assert Importance().clock == "step"
    assert Importance(model=Old()).clock == "rollout"
    far = made.with_values({LogProb(Policy()): torch.full((5,), 1e4, dtype=torch.float64)})
    assert bool(torch.isfinite(Importance()(far)).all())


# ---- composition -------------------------------------------------------------------------------------------------


def test_arithmetic_of_signals():
    made = view(rows([2, 1], [0, 0], reward=[1.0, 3.0], cost=[0.5, 0.25]))
    reward, cost = Reward(), Column("cost")
    cases = {
        reward + cost: [1.5, 3.25],
        reward - cost: [0.5, 2.75],
        reward * cost: [0.5, 0.75],
        -reward: [-1.0, -3.0],
        ~cost: [0.5, 0.75],
        reward * 2.0: [2.0, 6.0],
        2.0 * reward: [2.0, 6.0],
        1.0 + reward: [2.0, 4.0],
        1.0 - cost: [0.5, 0.75],
    }
    for signal, expected in cases.items():
        assert made.signal(signal, reach="sequence").tolist() == expected
        a, b = expected
        assert made.signal(signal).tolist() == [a, a, b]


def test_reach_and_clock_are_the_widest_of_the_parts():
    token, step = LogRatio(Teacher(), Old()), LogRatio(Teacher(), Policy())
    assert (Reward() + token).reach == "token"
    assert (GroupAny() * Reward()).reach == "sequence"
    assert (Reward() * Linear(0.0, 1.0, 5)).reach == "sequence"
    assert (Reward() + token).clock == "rollout"
    assert (Reward() * Linear(0.0, 1.0, 5)).clock == "previous"
    assert (token + step).clock == "step"
    assert (token >> ToGo()).clock == "rollout"
    assert (Reward() >> ToGo()).reach == "token"
    assert (step >> Clipped(1.0)).clock == "step"
    # A chain that looks at the draw is computed there, at the schedule's value of that step.
    assert ((Reward() * Linear(0.0, 1.0, 5)) >> GroupNormalised()).clock == "rollout"


def test_token_and_row_numbers_combine_by_event():
    made = view(rows([2, 1], reward=[10.0, 20.0]))
    token = LogRatio(Teacher(), Old())
    got = made.signal(token + Reward())
    torch.testing.assert_close(got, token(made) + torch.tensor([10.0, 10.0, 20.0], dtype=torch.float64))


@pytest.mark.parametrize("shaper", [Whitened(), ToGo(), InReward(Reference(), 0.1)], ids=lambda s: type(s).__name__)
def test_a_look_at_the_draw_cannot_follow_the_policy_of_each_step(shaper):
    with pytest.raises(RecipeError, match=f"{type(shaper).__name__} looks at a whole draw, once.* use Old\\(\\)"):
        LogRatio(Teacher(), Policy()) >> shaper


def test_nor_can_it_read_that_policy_by_itself():
    with pytest.raises(RecipeError, match="InReward looks at a whole draw"):
        Reward() >> InReward(Policy(), 0.1)


def test_the_parts_of_a_draw_are_found_inside_sums_of_the_step():
    advantage = Reward() >> GroupNormalised()
    whole = advantage * LogRatio(Teacher(), Policy()) + Linear(0.0, 1.0, 5) * Column("cost")
    assert list(rollout_parts(whole)) == [advantage, Column("cost")]
    assert list(rollout_parts(advantage)) == [advantage]


def test_controllers_inside_a_chain_are_parts_of_it():
    controller = AdaptiveKL(6.0)
    advantage = Reward() >> InReward(Reference(), controller) >> Whitened()
    assert controller in advantage.first.parts()  # type: ignore[attr-defined]
    assert Returns(advantage).parts() == (advantage,)


def test_a_beta_kernel_has_mean_one_over_even_pass_rates_and_its_peak_in_between():
    rate = torch.linspace(0, 1, 2001, dtype=torch.float64)
    for a, b in ((1.0, 1.0), (2.0, 0.5), (0.0, 0.0)):
        value = BetaKernel(a, b)(view(rows([1])), rate, "sequence")
        assert float(torch.trapezoid(value, rate)) == pytest.approx(1.0, abs=1e-4)
        if a + b:
            assert float(rate[value.argmax()]) == pytest.approx(a / (a + b), abs=1e-3)
    with pytest.raises(RecipeError, match="exponents of at least 0"):
        BetaKernel(-1.0)


def test_violations_are_counted_among_the_events_of_the_term():
    share = Comparison("band", Model("reference"), 1)
    batch = rows([2, 2], near=[[0, 1, 0, 0], [0, 0, 1, 0]])
    near = batch.inside("near")[batch.mask]
    assert near.sum() == 2
    counted = torch.where(near, torch.tensor([0.5]), torch.tensor([0.1]))
    seen = View(batch, {share: counted})
    assert PerViolation(share, "near")(seen) == pytest.approx(2.0)
    assert PerViolation(share)(seen) == pytest.approx(4 / 1.2)
    assert MatchHidden(where="near").signals()[0] == PerViolation(Comparison("band", Reference(), 1), "near")


def test_a_column_of_no_rows_is_of_any_kind():
    """A process that got no row of a small batch cannot tell what the others' columns hold."""
    none = rows([2]).select(torch.zeros(0, dtype=torch.long)).with_columns(weight=torch.zeros(0))
    for reach in ("token", "sequence"):
        assert Column("weight", reach=reach)(View(none)).shape == (0,)
    with pytest.raises(RecipeError, match="holds one number per sequence"):
        Column("weight", reach="token")(View(rows([2], weight=[1.0])))
