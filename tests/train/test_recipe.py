"""A recipe checks itself when it is built: each mistake is one sentence that names the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from leibler.divergence import ForwardKL, JensenShannon, ReverseKL, TotalVariation
from leibler.errors import RecipeError
from leibler.estimate import K1, K2, K3, LowVarKL, ScoreFunction
from leibler.objective import (
    GAE,
    Arithmetic,
    Behaviour,
    Clip,
    Column,
    Fit,
    GroupNormalised,
    Hinge,
    Imitate,
    ImplicitReward,
    InReward,
    Linear,
    LogLinear,
    LogRatio,
    Match,
    Model,
    Objective,
    Old,
    Output,
    Policy,
    PolicyGradient,
    Preference,
    Reference,
    Returns,
    Reward,
    SquaredError,
    Teacher,
    ToGo,
    Whitened,
)
from leibler.train import (
    EMA,
    Adaptive,
    Answer,
    Data,
    Frozen,
    Mixture,
    OnPolicy,
    Recipe,
    Sampled,
    Schedule,
    Score,
    Snapshot,
    Trained,
    ValueHead,
    describe,
)

K = ReverseKL()
MIXED = OnPolicy(sampler=Arithmetic({Old(): 0.8, Teacher(): 0.2}))
SCORED = OnPolicy(4) >> Score(Answer())
MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "no term": (lambda: Recipe(Data(), Objective()), "has no term with a coefficient other than 0; add one"),
    "only zeros": (lambda: Recipe(Data(), Objective(Imitate(coefficient=0.0))), "has no term with a coefficient"),
    "unknown stream": (
        lambda: Recipe(Mixture(a=Data(), b=Data("text")), Objective(Imitate(on="c"))),
        "nll is on 'c', but the source has a, b",
    ),
    "unsaid stream": (
        lambda: Recipe(Mixture(a=Data(), b=Data("text")), Objective(Imitate())),
        "nll must say which stream it is on: a, b",
    ),
    "k3 in the loss": (
        lambda: Recipe(OnPolicy(), Match(K, to=Teacher(), estimator=K3())),
        r"K3\(\) descends ForwardKL, not ReverseKL; use K2\(\), K1\(weight='differentiable'\).* or Exact\(\)",
    ),
    "k1 in the loss": (
        lambda: Recipe(OnPolicy(), Match(K, to=Reference(), estimator=K1())),
        r"K1\(\) descends nothing, not ReverseKL; use K2\(\)",
    ),
    "k2 for another divergence": (
        lambda: Recipe(OnPolicy(), Match(JensenShannon(0.5), to=Teacher(), estimator=K2())),
        r"K2\(\) descends ReverseKL, not JensenShannon\(beta=0.5\); use Pathwise\(\), ScoreFunction\(\) or Exact\(\)",
    ),
    "k3 for an unnormalised target": (
        lambda: Recipe(
            OnPolicy(),
            Match(JensenShannon(0.5), to=LogLinear({Teacher(): 2.0, Reference(): -1.0}), estimator=ScoreFunction()),
        ),
        "needs a normalised target",
    ),
    "samples of a target for the other direction": (
        lambda: Recipe(Sampled("teacher"), Match(K, to=Teacher(), estimator=K2())),
        "On samples of the target K2",
    ),
    "a stale batch in a published form": (
        lambda: Recipe(OnPolicy(), Match(K, to=Teacher(), estimator=LowVarKL()), Schedule(2)),
        "descends",
    ),
    "an estimator on data": (
        lambda: Recipe(Data(), Match(K, to=Teacher(), estimator=K2())),
        r"ReverseKL\(teacher\) with K2\(\) needs sampled sequences, but its stream 'main' holds data; use Exact\(\)",
    ),
    "no implicit reward": (
        lambda: Preference(ImplicitReward(TotalVariation())),
        "TotalVariation gives no implicit reward: ",
    ),
    "output without a module": (
        lambda: Recipe(SCORED, PolicyGradient(Reward() >> GAE("critic"))),
        r"reads the output of 'critic', which no model rule trains; add models=\{'critic': Trained\(ValueHead\(\)\)\}",
    ),
    "output of a frozen model": (
        lambda: Recipe(SCORED, Fit(SquaredError(), Output("critic"), Reward()), models={"critic": Frozen()}),
        "reads the output of 'critic', which no model rule trains",
    ),
    "rows of the old policy": (
        lambda: Recipe(OnPolicy(), Match(K, to=Old())),
        r"a divergence over the whole vocabulary to 'old' needs its weights: name a model with the rule Snapshot\(\)",
    ),
    "rows of the sampler": (
        lambda: Recipe(OnPolicy(), Match(K, to=LogLinear({Behaviour(): 0.5, Teacher(): 0.5}))),
        "whole vocabulary to 'behaviour' needs its weights",
    ),
    "a ratio to no law": (
        lambda: Recipe(Adaptive(Data(), OnPolicy()) >> Score(Answer()), PolicyGradient(Reward(), Clip())),
        "responses of 'main' are of no single law, so no ratio makes a policy gradient",
    ),
    "a ratio to a law that was not sampled": (
        lambda: Recipe(MIXED >> Score(Answer()), PolicyGradient(Reward(), Clip())),
        r"ratio of the policy gradient on 'main' .* old policy.* use a surrogate with anchor=Behaviour\(\)",
    ),
    "a ratio to a law at another temperature": (
        lambda: Recipe(OnPolicy(4, temperature=2.0) >> Score(Answer()), PolicyGradient(Reward(), Clip())),
        "responses are sampled from another law",
    ),
    "a coefficient per event": (
        lambda: Recipe(Data(), Imitate(coefficient=Column("weight"))),
        "coefficient of nll gives one number per sequence, not one; make it the weight",
    ),
    "a hinge inside a signal": (
        lambda: Recipe(OnPolicy(), Match(ForwardKL(), to=Old(), estimator=K1(), coefficient=2.0 * Hinge(0.1, 1.0))),
        r"a Hinge must be the whole coefficient of a term, not a part of a signal of ForwardKL\(old\)",
    ),
    "a hinge inside the reward": (
        lambda: Recipe(SCORED, PolicyGradient(Reward() >> InReward(Reference(), Hinge(0.1, 1.0)) >> ToGo())),
        "a Hinge must be the whole coefficient",
    ),
    "a hinge on a likelihood": (
        lambda: Recipe(Data(), Imitate(coefficient=Hinge(0.1, 1.0))),
        "a Hinge bounds the divergence of a Match, and nll is none",
    ),
    "a hinge on a value that is another's": (
        lambda: Recipe(OnPolicy(), Match(K, to=Reference(), estimator=K2(), coefficient=Hinge(0.1, 1.0))),
        r"a Hinge reads the value of ReverseKL\(reference\), and K2\(\) does not average to it; use Exact\(\)",
    ),
    "credit of sequences on data of another": (
        lambda: Recipe(Sampled("teacher"), Match(K, to=Teacher(), estimator=K1(), credit="to_go")),
        r"credit='to_go' needs responses sampled from the policy itself",
    ),
    "credit of sequences on a mixture": (
        lambda: Recipe(MIXED, Match(K, to=Teacher(), estimator=K1(), credit="sequence")),
        r"credit='sequence' needs responses sampled from the policy itself",
    ),
    "credit with rows": (lambda: Match(K, to=Teacher(), credit="to_go"), "credit='to_go' needs a sampled estimator"),
    "statistics per step": (
        lambda: PolicyGradient(LogRatio(Teacher(), Policy()) >> Whitened()),
        r"Whitened looks at a whole draw, once.* use Old\(\) in place of Policy\(\)",
    ),
    "group statistics of tokens": (
        lambda: PolicyGradient(LogRatio(Teacher(), Old()) >> GroupNormalised()),
        "GroupNormalised works on one number per response",
    ),
    "no epoch": (lambda: Schedule(epochs=0), "epochs=0 must be at least 1"),
    "no batch": (lambda: Schedule(minibatches=0), "minibatches=0 must be at least 1"),
    "rounds inside a draw": (
        lambda: Schedule(minibatches=2, epochs=3, steps_per_round=100),
        "steps_per_round=100 must be a multiple of the 6 steps that each draw is used for",
    ),
}


@pytest.mark.parametrize(("build", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence_when_the_recipe_is_built(build, message):
    with pytest.raises(RecipeError, match=message) as caught:
        build()
    text = str(caught.value)
    assert "\n" not in text
    assert not re.search(r"[a-z)]\. [A-Z]", text), "one sentence"


# ---- what is inferred --------------------------------------------------------------------------------------------


def bound(source, term: Match, schedule: Schedule | None = None) -> Match:
    (made,) = Recipe(source, term, schedule or Schedule()).objective.terms
    assert isinstance(made, Match)
    return made


def test_the_sampling_law_is_inferred_from_stream_and_target():
    term = Match(K, to=Teacher(), estimator=K2())
    assert bound(OnPolicy(), term).sampled_from == "model"
    assert bound(OnPolicy(sampler=Policy()), term).sampled_from == "model"
    stale = bound(OnPolicy(), term, Schedule(epochs=2))
    assert (stale.sampled_from, stale.behaviour) == ("behaviour", Old())
    mixed = bound(MIXED, term)
    assert (mixed.sampled_from, mixed.behaviour) == ("behaviour", Behaviour())
    hot = bound(OnPolicy(temperature=2.0), term)
    assert (hot.sampled_from, hot.behaviour) == ("behaviour", Behaviour())
    forward = Match(ForwardKL(), to=Teacher(), estimator=K1())
    assert bound(Sampled("teacher"), forward).sampled_from == "target"
    assert bound(OnPolicy(), Match(ForwardKL(), to=Old(), estimator=K1()), Schedule(2)).sampled_from == "target"
    assert bound(Data(), Match(K, to=Teacher())).sampled_from is None


def test_stages_and_mixtures_keep_the_law():
    recipe = Recipe(
        Mixture(roll=OnPolicy(2) >> Score(Answer()), text=Data("text")),
        Objective(Match(K, to=Teacher(), estimator=K2(), on="roll"), Imitate(on="text")),
    )
    assert recipe.objective.terms[0].sampled_from == "model"
    assert recipe.source.datasets() == {"train": "prompts", "text": "labels"}
    assert recipe.source.stream_data() == {"roll": ("train",), "text": ("text",)}
    both = Mixture(roll=OnPolicy(), text=Data())
    assert both.datasets() == {"train": "both"}


def test_models_get_their_rules():
    recipe = Recipe(
        Sampled("previous") >> Score(Answer()),
        Objective(
            PolicyGradient(Reward(), Clip(anchor=Behaviour())),
            Match(K, to=Teacher()),
            Match(K, to=Reference()),
            Match(K, to=Model("slow")),
        ),
        models={"slow": EMA(0.1), "previous": Snapshot()},
    )
    assert recipe.models == {
        "slow": EMA(0.1),
        "previous": Snapshot(),
        "teacher": Frozen("teacher"),
        "reference": Frozen("initial"),
    }


def test_a_term_may_stand_alone_and_a_zero_term_reads_no_model():
    assert set(Recipe(Data(), Imitate()).models) == set()
    recipe = Recipe(Data(), Objective(Imitate(), Match(K, to=Teacher(), coefficient=0.0)))
    assert set(recipe.models) == set()
    assert "teacher" not in describe(recipe)


def test_a_single_use_draw_needs_no_old_policy():
    from leibler.objective import LogProb
    from leibler.train.plan import make_plan

    fresh = make_plan(Recipe(SCORED, PolicyGradient(Reward() >> GroupNormalised())), "main")
    assert fresh.substitute_old
    assert LogProb(Old()) not in fresh.constants
    again = make_plan(Recipe(SCORED, PolicyGradient(Reward() >> GroupNormalised()), Schedule(epochs=2)), "main")
    assert LogProb(Old()) in again.constants
    for advantage in (
        Reward() >> InReward(Reference(), 0.1) >> ToGo(),
        (Reward() >> InReward(Reference(), 0.1) >> ToGo()) * Linear(1.0, 0.5, 10),
    ):
        drawn = make_plan(Recipe(SCORED, PolicyGradient(advantage)), "main")
        assert LogProb(Old()) in drawn.constants
        assert not drawn.substitute_old


@pytest.mark.parametrize(
    ("recipe", "kind", "survey"),
    [
        (Recipe(Data(), Imitate()), "one pass", False),
        (Recipe(OnPolicy(), Match(ForwardKL(), to=Old(), estimator=K1(), coefficient=Hinge(0.1, 1.0)), Schedule(2)),
         "one pass", True),
        (Recipe(Data(), Preference(ImplicitReward())), "two-pass head", False),
        (Recipe(Data(), Objective(Preference(ImplicitReward()), Match(K, to=Teacher(), coefficient=Hinge(0.1, 1.0)))),
         "survey and replay", True),
    ],
)  # fmt: skip
def test_the_cheapest_plan(recipe, kind, survey):
    from leibler.train.plan import make_plan

    plan = make_plan(recipe, "main")
    assert (plan.kind, plan.survey) == (kind, survey)
    assert kind in describe(recipe)


def test_description_writes_signals_as_they_were_written():
    text = describe(Recipe(SCORED, PolicyGradient((Reward() >> GroupNormalised()) * Linear(1.0, 0.5, 10))))
    assert "advantage=((Reward() >> GroupNormalised()) * Linear(start=1.0, end=0.5, steps=10))" in text
    assert "Data(columns=('pass_rate',))" in describe(Recipe(Data(columns=("pass_rate",)), Imitate()))


def test_description_tells_what_is_biased():
    text = describe(Recipe(OnPolicy(), Match(K, to=Teacher(), estimator=K2())))
    assert "sampled from the model; the gradient is unbiased, the loss's value is biased" in text
    published = describe(Recipe(OnPolicy(), Match(K, to=Teacher(), estimator=K2(weight=None)), Schedule(epochs=2)))
    assert "the gradient is BIASED" in published
    credit = Match(K, to=Teacher(), estimator=K1(), credit="to_go")
    assert "unbiased at the first step of a draw" in describe(Recipe(OnPolicy(), credit, Schedule(epochs=2)))
    assert describe(Recipe(OnPolicy(), credit)).count("unbiased") == 1
    exact = describe(Recipe(Data(), Match(K, to=Teacher())))
    assert "exact over the vocabulary" in exact
    assert "2 forward, 2 backward" in exact


def test_critics_have_their_own_rate():
    recipe = Recipe(
        SCORED,
        Objective(
            PolicyGradient(Reward() >> GAE("critic")), Fit(SquaredError(), Output("critic"), Returns(Reward() >> GAE()))
        ),
        models={"critic": Trained(ValueHead(), learning_rate=1e-3)},
    )
    assert recipe.models["critic"].moves
