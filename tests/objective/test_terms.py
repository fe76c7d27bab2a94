"""Terms and reductions on views made by hand."""

from __future__ import annotations

import pytest
import torch

from leibler.divergence import ForwardKL, ReverseKL
from leibler.errors import RecipeError
from leibler.estimate import K2, Exact
from leibler.objective import (
    Arithmetic,
    Clip,
    Column,
    EntropyBonus,
    Fit,
    Imitate,
    InReward,
    Linear,
    LogLinear,
    LogProb,
    LogRatio,
    Match,
    Objective,
    Old,
    Output,
    Policy,
    PolicyGradient,
    Ratio,
    Reference,
    Reward,
    SequenceMean,
    SquaredError,
    Teacher,
    TokenEntropy,
    TokenMean,
    View,
)
from leibler.objective.terms import Term
from objective.made import nested, rows, view


def total(term: Term, of: View) -> torch.Tensor:
    value, weight = term.loss(of)
    return (value * weight).sum() / term.count(of.rows)


def slope(term: Term, of: View, need=None) -> torch.Tensor:
    need = need or LogProb(Policy())
    leaf = of.get(need).clone().requires_grad_()
    total(term, of.with_values({need: leaf})).backward()
    return leaf.grad


def test_reductions():
    made = view(rows([3, 1, 0, 2]))
    nll = [[-x for x in row] for row in nested(made.rows, made.get(LogProb(Policy())))]
    flat = [x for row in nll for x in row]
    assert float(total(Imitate(), made)) == pytest.approx(sum(flat) / 6)
    # A row without events is no sequence; a mean of means weighs the events of short rows more.
    means = [sum(row) / len(row) for row in nll if row]
    assert float(total(Imitate(reduce=SequenceMean()), made)) == pytest.approx(sum(means) / 3)
    assert float(total(Imitate(reduce=SequenceMean("sum")), made)) == pytest.approx(sum(flat) / 3)


@pytest.mark.parametrize("reduce", [TokenMean(), SequenceMean(), SequenceMean("sum")], ids=repr)
def test_sums_of_parts_over_one_denominator(reduce):
    """A mean over parts of unequal size is not the mean; sums of parts over the whole's count are."""
    made = view(rows([3, 1, 2, 4]))
    term = Imitate(reduce=reduce)
    whole = float(total(term, made))
    parts = [made.select(torch.tensor(index)) for index in ([0, 1], [2], [3])]
    added = sum(float((lambda v, w: (v * w).sum())(*term.loss(p))) for p in parts) / term.count(made.rows)
    assert added == pytest.approx(whole, rel=1e-6)
    naive = sum(float(total(term, p)) for p in parts) / 3
    assert abs(naive - whole) > 1e-3


def test_weights_multiply_and_muted_rows_count():
    made = view(rows([2, 1], muted=[False, True], cost=[2.0, 3.0]))
    logp = made.get(LogProb(Policy()))
    assert float(total(Imitate(weight=Column("cost")), made)) == pytest.approx(float(-2 * logp[:2].sum() / 3))


def test_a_policy_gradient_to_the_policy_itself_is_its_score():
    made = view(rows([2, 1], reward=[2.0, -1.0]))
    term = PolicyGradient(Reward(), Ratio(anchor=Policy()))
    assert float(total(term, made)) == pytest.approx(-(2 + 2 - 1) / 3)
    assert slope(term, made).tolist() == pytest.approx([-2 / 3, -2 / 3, 1 / 3])


def test_a_policy_gradient_by_its_formula():
    made = view(rows([2, 1], reward=[2.0, -1.0]))
    ratio = (made.get(LogProb(Policy())) - made.get(LogProb(Old()))).exp()
    advantage = torch.tensor([2.0, 2.0, -1.0], dtype=torch.float64)
    expected = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    torch.testing.assert_close(total(PolicyGradient(Reward(), Clip(0.2)), made), expected)


def test_entropy_bonus_rewards_entropy():
    made = view(rows([2]))
    made = made.with_values({TokenEntropy(): torch.tensor([1.0, 0.5], dtype=torch.float64)})
    assert slope(EntropyBonus(), made, TokenEntropy()).tolist() == [-0.5, -0.5]


def test_fit():
    made = view(rows([2], each=torch.tensor([[0.0, 1.0, 3.0]])))
    made = made.with_values({Output("critic"): torch.tensor([2.0, 2.0], dtype=torch.float64)})
    term = Fit(SquaredError(), Output("critic"), Column("each", reach="token"))
    goal = made.column("each").double()
    torch.testing.assert_close(slope(term, made, Output("critic")), (2.0 - goal) / 2)


def test_match_measures_the_divergence_whatever_it_descends():
    """K2's value is another number; what is reported is unbiased: exact in the mean over the policy's own law."""
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    made = view(rows([3])).with_values({LogProb(Policy()): p.log(), LogProb(Teacher()): q.log()})
    term = Match(ReverseKL(), to=Teacher(), estimator=K2(), sampled_from="model")
    measured = term.measures(made)["divergence"]
    exact = float((p * (p / q).log()).sum())
    assert float((p * measured).sum()) == pytest.approx(exact)
    assert float((p * term.loss(made)[0]).sum()) != pytest.approx(exact, rel=0.05)
    assert slope(term, made).tolist() == pytest.approx(((p / q).log() / 3).tolist())


def test_match_measures_nothing_where_the_normaliser_is_missing():
    product = LogLinear({Teacher(): 1.5, Reference(): -0.5})
    assert Match(ReverseKL(), to=product, estimator=K2(), sampled_from="model").measures(view(rows([2]))) == {}


def test_match_names_itself():
    assert Match(ForwardKL(), to=Teacher()).name == "ForwardKL(teacher)"
    assert Match(ReverseKL(), to=LogLinear({Teacher(): 1.5, Reference(): -0.5})).name == "ReverseKL(teacher+reference)"


def test_match_without_a_law_is_no_term_yet():
    with pytest.raises(RecipeError, match="has no sampling law: it must be part of a Recipe"):
        Match(ReverseKL(), to=Teacher(), estimator=K2()).loss(view(rows([2])))


@pytest.mark.parametrize("credit", ["to_go", "sequence"])
def test_credit_of_sequences_needs_samples(credit):
    with pytest.raises(RecipeError, match=f"credit='{credit}' needs a sampled estimator"):
        Match(ReverseKL(), to=Teacher(), estimator=Exact(), credit=credit)


def test_an_untellable_target_is_refused_where_its_samples_are_read():
    mixture = Arithmetic({LogLinear({Teacher(): 1.5, Reference(): -0.5}): 0.5, Reference(): 0.5})
    for term in (
        Match(ReverseKL(), to=mixture, estimator=K2()),
        PolicyGradient(LogRatio(mixture, Old())),
        PolicyGradient(Reward(), Ratio(anchor=mixture)),
    ):
        with pytest.raises(RecipeError, match="cannot be told from sampled tokens"):
            [*term.needs(), *(n for s in term.signals() for n in s.needs())]
    assert Match(ReverseKL(), to=mixture).needs()


def test_an_objective_drops_what_has_no_coefficient():
    kept = Imitate(coefficient=0.5)
    assert Objective(kept, Match(ForwardKL(), to=Teacher(), coefficient=0.0)).terms == (kept,)
    assert Objective(Imitate(coefficient=0)).terms == ()
    assert len(Objective(Imitate(coefficient=Linear(0.0, 0.0, 1))).terms) == 1


def test_every_signal_is_walked_with_its_owner():
    schedule = Linear(0.1, 0.2, 3)
    kl = InReward(Reference(), schedule)
    advantage = Reward() >> kl
    term = PolicyGradient(advantage, weight=Column("w") * Linear(1.0, 0.0, 2), coefficient=Linear(1.0, 2.0, 3))
    found = list(Objective(term).walk())
    assert (schedule, kl) in found
    assert (Reward(), term) in found
    assert (Linear(1.0, 0.0, 2), term) in found
    assert (Linear(1.0, 2.0, 3), term) in found
