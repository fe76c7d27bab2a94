"""One optimiser step of recipes made for the purpose."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from leibler.divergence import ForwardKL, JensenShannon, ReverseKL
from leibler.estimate import K1, K2, ScoreFunction
from leibler.objective import (
    GAE,
    AdaptiveKL,
    Arithmetic,
    Behaviour,
    Clip,
    Clipped,
    EntropyBonus,
    Fit,
    GroupAny,
    GroupNormalised,
    Hinge,
    Imitate,
    ImplicitReward,
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
    Preference,
    Ratio,
    Reference,
    Returns,
    Reward,
    SequenceMean,
    SquaredError,
    Teacher,
    ToGo,
    Whitened,
)
from leibler.objective.targets import Tempered
from leibler.train import Data, OnPolicy, Recipe, Schedule, Score, Trained, ValueHead
from train.conformance import distance, gradient, ready, reward, size

SCORED = OnPolicy(4) >> Score(reward)
STALE = Schedule(epochs=2)
CRITIC = {"critic": Trained(ValueHead())}
A = Reward() >> GroupNormalised()
DRIFT = LogRatio(Policy(), Old())
KL = Reward() >> InReward(Reference(), AdaptiveKL(6.0)) >> ToGo() >> Whitened()

RECIPES = {
    "a statistic times a schedule": Recipe(SCORED, PolicyGradient(A * Linear(1.0, 0.0, 10)), STALE),
    "a statistic times a step's weight": Recipe(SCORED, PolicyGradient(A * DRIFT), STALE),
    "whitened, plus a log-ratio of the step": Recipe(SCORED, PolicyGradient(KL + 0.1 * DRIFT, Clip()), STALE),
    "the same on a single use": Recipe(SCORED, PolicyGradient(KL + 0.1 * LogRatio(Teacher(), Policy()), Clip())),
    "a clipped ratio of the step": Recipe(
        SCORED, PolicyGradient(LogRatio(Teacher(), Policy()) >> Clipped(0.5), Ratio())
    ),
    "a gate of groups": Recipe(SCORED, Match(ReverseKL(), to=Teacher(), weight=~GroupAny() + 0.5 * GroupAny())),
    "sequence means": Recipe(SCORED, PolicyGradient(A, Clip(), reduce=SequenceMean()), STALE),
    "a hinge over rows": Recipe(OnPolicy(4), Match(ForwardKL(), to=Teacher(), coefficient=Hinge(0.1, 10.0))),
    "a hinge beside pairs": Recipe(
        Data(),
        Objective(Preference(ImplicitReward()), Match(ReverseKL(), to=Teacher(), coefficient=Hinge(0.1, 10.0))),
    ),
    "entropy": Recipe(Data(), Objective(Imitate(), EntropyBonus(coefficient=0.3))),
    "critic and trunk": Recipe(
        SCORED,
        Objective(PolicyGradient(Reward() >> GAE()), Fit(SquaredError(), Output("critic"), Returns(Reward() >> GAE()))),
        models={"critic": Trained(ValueHead(through=True))},
    ),
    "a critic alone": Recipe(
        SCORED, Fit(SquaredError(), Output("critic"), Returns(Reward() >> GAE())), models=CRITIC
    ),
    "credit to go": Recipe(SCORED, Match(JensenShannon(0.5), to=Teacher(), estimator=ScoreFunction(), credit="to_go")),
    "credit of sequences, stale": Recipe(
        SCORED, Match(ReverseKL(), to=Teacher(), estimator=K1(), credit="sequence"), STALE
    ),
    "expressions": Recipe(
        SCORED,
        Objective(
            Match(ForwardKL(), to=LogLinear({Teacher(): 1.5, Reference(): -0.5}, clip=2.0)),
            Match(JensenShannon(0.3), to=Arithmetic({Teacher(): 0.5, Tempered(Reference(), 2.0): 0.5})),
            Match(ReverseKL(), to=LogLinear({Teacher(): 1.5, Reference(): -0.5}), estimator=K2()),
        ),
    ),
    "a sampler at a temperature of its own": Recipe(
        OnPolicy(4, temperature=2.0) >> Score(reward),
        Objective(PolicyGradient(A, Clip(anchor=Behaviour())), Match(ReverseKL(), to=Teacher(), estimator=K2())),
    ),
    "two equal terms": Recipe(Data(), Objective(Imitate(coefficient=0.5), Imitate(coefficient=0.5))),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_cuts_and_plans_change_nothing(name):
    made = ready(RECIPES[name])
    whole, before = gradient(made)
    assert size(whole) > 1e-4
    for micro_rows in (1, 5):
        cut, after = gradient(made, micro_rows=micro_rows)
        assert distance(cut, whole) < 1e-9
        assert after.metrics == pytest.approx(before.metrics, rel=1e-6, abs=1e-9)
    kinds = ["two-pass head", "survey and replay"] if made.engine().plans["main"].terms else []
    for plan in kinds:
        assert distance(gradient(made, plan=plan, micro_rows=2)[0], whole) < 1e-9


def test_a_hinge_is_the_gradient_of_its_square_in_any_cut():
    """By finite differences of ``slope / 2 * max(0, D - bound)^2`` along the gradient."""
    made = ready(Recipe(OnPolicy(4), Match(ForwardKL(), to=Teacher(), coefficient=Hinge(0.1, 10.0))))
    grads, _ = gradient(made, micro_rows=1)
    direction = {n: g / size(grads) for n, g in grads.items()}

    def value(step: float) -> float:
        with torch.no_grad():
            for name, p in made.parameters().items():
                p.add_(step * direction[name])
        divergence = gradient(made)[1].metrics["divergence/ForwardKL(teacher)"]
        with torch.no_grad():
            for name, p in made.parameters().items():
                p.sub_(step * direction[name])
        return 0.5 * 10.0 * max(0.0, divergence - 0.1) ** 2

    slope = (value(1e-4) - value(-1e-4)) / 2e-4  # the norms of the model work in float32
    assert slope == pytest.approx(sum(float((grads[n] * direction[n]).sum()) for n in grads), rel=1e-3)


def test_inside_its_bound_a_hinge_does_nothing():
    made = ready(Recipe(OnPolicy(4), Match(ForwardKL(), to=Teacher(), coefficient=Hinge(50.0, 10.0))))
    grads, step = gradient(made)
    assert size(grads) == 0
    assert step.metrics["coefficient/ForwardKL(teacher)"] == 0


def test_gradients_add_up_over_streams_and_calls():
    """The engine adds to what is there, as accumulation over draws would want."""
    made = ready(RECIPES["entropy"])
    once, _ = gradient(made)
    made.engine().accumulate(made.views)
    twice = {n: p.grad for n, p in made.parameters().items()}
    assert distance({n: 0.5 * g for n, g in twice.items()}, once) < 1e-12  # type: ignore[operator]


def test_the_loss_is_the_sum_of_its_terms():
    _, step = gradient(ready(RECIPES["entropy"]))
    assert step.metrics["loss"] == pytest.approx(step.metrics["loss/nll"] + 0.3 * step.metrics["loss/entropy_bonus"])
    assert step.metrics["entropy"] == pytest.approx(-step.metrics["loss/entropy_bonus"])
    made = ready(RECIPES["two equal terms"])
    _, step = gradient(made)
    assert step.metrics["loss"] == pytest.approx(0.5 * step.metrics["loss/nll"] + 0.5 * step.metrics["loss/nll#2"])
    assert step.metrics["tokens"] == float(made.views["main"].rows.mask.sum())


def test_an_infinite_divergence_is_counted_and_silent():
    """The teacher excludes an entry: reverse KL is infinite there, its gradient 0, the metrics stay finite."""
    made = ready(Recipe(OnPolicy(4), Objective(Match(ReverseKL(), to=Teacher()), EntropyBonus(coefficient=0.1))))
    teacher = made.models["teacher"]
    head = teacher.causal.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0], dtype=torch.float64), requires_grad=False)
    head.bias[5] = -torch.inf
    grads, step = gradient(made)
    events = step.metrics["tokens"]
    assert step.metrics["support_violations/ReverseKL(teacher)"] == events
    assert step.metrics["loss/ReverseKL(teacher)"] == 0
    only = ready(Recipe(OnPolicy(4), EntropyBonus(coefficient=0.1)))
    assert distance(grads, gradient(only)[0]) < 1e-9
    assert all(torch.isfinite(torch.tensor(v)) for v in step.metrics.values())


def test_dropout_of_a_survey_is_that_of_its_replay():
    """The same units are dropped in both passes, so the replayed gradient is that of the surveyed numbers."""
    recipe = RECIPES["a hinge beside pairs"]
    made = ready(recipe)
    for module in made.policy.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    first, _ = gradient(made, micro_rows=4)
    torch.manual_seed(77)
    again, _ = gradient(made, micro_rows=4)
    assert distance(again, first) == 0
    made.policy.requires_grad_(True)
    engine = made.engine(4)
    plan = engine.plans["main"]
    view = made.views["main"].at(3, made.states)
    cuts = engine._cut(view.rows, whole_groups=False)
    made.policy.train()
    surveyed = [engine._survey(plan, view, cuts) for _ in range(2)]
    for need in plan.wants:
        assert torch.equal(surveyed[0].values[need], surveyed[1].values[need])
    other = engine._survey(plan, replace(view, step=4), cuts)
    assert any(not torch.equal(surveyed[0].values[n], other.values[n]) for n in plan.wants)


def test_micro_batches_are_cut_by_tokens_where_no_number_is_given():
    made = ready(RECIPES["entropy"])
    engine = made.engine()
    engine.micro_tokens = 20
    rows = made.views["main"].rows
    cuts = engine._cut(rows, whole_groups=False)
    assert len(cuts) > 2
    longest = rows.attention.sum(1)
    for cut in cuts:
        assert len(cut) == 1 or int(longest[cut].max()) * len(cut) <= 20
    assert sorted(torch.cat(cuts).tolist()) == list(range(len(rows)))
    whole = engine._cut(ready(RECIPES["sequence means"]).views["main"].rows, whole_groups=True)
    groups = [set(ready(RECIPES["sequence means"]).views["main"].rows.group[c].tolist()) for c in whole]
    assert sum(map(len, groups)) == len(set().union(*groups))


def test_only_what_is_wanted_is_computed():
    """No old policy on a single use, no reference without a term, a constant once per draw."""
    made = ready(Recipe(SCORED, PolicyGradient(A)))
    assert made.views["main"].values == {}
    assert set(made.models) == {"policy"}
    stale = ready(Recipe(SCORED, PolicyGradient(A), STALE))
    assert len(stale.views["main"].values) == 1
    behaviour = ready(Recipe(SCORED, PolicyGradient(A, Clip(anchor=Behaviour())), STALE))
    (value,) = behaviour.views["main"].values.values()
    assert torch.equal(value, behaviour.views["main"].column("behaviour_logp"))


def test_controllers_are_measured_over_the_whole_draw():
    made = ready(RECIPES["whitened, plus a log-ratio of the step"])
    measured = made.engine().measured(made.views)
    view = made.views["main"]
    (own,) = measured.own.values()
    old, reference = view.get(LogProb(Old())), view.get(LogProb(Reference()))
    assert own["divergence_per_sequence"] == pytest.approx(float((old - reference).sum()) / len(view.rows))
    assert own["sequences"] == len(view.rows)
    assert measured.metrics == {"divergence_per_sequence/InReward": own["divergence_per_sequence"]}
