"""The published recipes: what each is made of, which parameters it takes, and what it refuses."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest

from leibler import recipes
from leibler.divergence import (
    AdaptiveKL,
    ChiSquared,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    TotalVariation,
)
from leibler.errors import RecipeError
from leibler.estimate import K1, K2
from leibler.objective import (
    GAE,
    AgainstHardest,
    Arithmetic,
    Behaviour,
    Clip,
    Fit,
    Geometric,
    GroupAny,
    GroupNormalised,
    Hinge,
    Identity,
    Imitate,
    ImplicitReward,
    Importance,
    InReward,
    Linear,
    Logistic,
    LogLinear,
    LogRatio,
    Match,
    MeanLogProb,
    Model,
    Old,
    Policy,
    PolicyGradient,
    Preference,
    Ratio,
    Reference,
    Returns,
    Reward,
    Squared,
    Teacher,
    ToGo,
    Whitened,
)
from leibler.objective import AdaptiveKL as Controller
from leibler.train import Adaptive, Data, Frozen, OnPolicy, Recipe, Schedule, Snapshot, Trained, describe, recipes_of
from leibler.train.sources import Source, Staged

every = pytest.mark.parametrize("slug", recipes.names())


def root(source: Source) -> Source:
    return root(source.source) if isinstance(source, Staged) else source


def terms(slug: str, **params):
    return recipes.get(slug, **params).objective.terms


@every
def test_it_builds_and_describes_itself(slug):
    method = recipes.get(slug)
    text = describe(method)
    for stage, recipe in recipes_of(method).items():
        assert isinstance(recipe, Recipe)
        assert describe(recipe) in text
        assert stage in text
        for term in recipe.objective.terms:
            assert term.name in text
        for name in recipe.models:
            assert name in text
    assert "BIASED" not in text
    assert method == recipes.get(slug), "recipes are values"


@every
def test_its_parameters_have_defaults_and_are_documented(slug):
    build = recipes.function(slug)
    doc = inspect.getdoc(build) or ""
    assert str(recipes.find(slug).year) in doc or slug in ("sft", "ppo", "f-dpo", "gkd", "kd")
    for name, parameter in inspect.signature(build).parameters.items():
        assert parameter.default is not inspect.Parameter.empty
        assert name in doc, f"{slug} does not say what {name} is"


@every
def test_building_is_short(slug):
    """A published method is a recipe of at most about thirty lines."""
    source = inspect.getsource(recipes.function(slug))
    code = source[source.rindex('"""') + 3 :]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30


@every
def test_an_unknown_parameter_is_refused(slug):
    with pytest.raises(RecipeError, match=f"{slug} has no parameter nonsense"):
        recipes.get(slug, nonsense=1)


# ---- distillation ------------------------------------------------------------------------------------------------


def test_maximum_likelihood():
    (term,) = terms("sft")
    assert term == Imitate(on="main")
    assert recipes.get("sft").models == {}


def test_knowledge_distillation():
    (term,) = terms("kd")
    assert term == Match(ForwardKL(), to=Teacher(), on="main")
    both = terms("kd", imitate=0.5)
    assert both[1] == Imitate(coefficient=0.5, on="main")
    assert recipes.get("kd").models == {"teacher": Frozen("teacher")}
    assert recipes.get("kd").source == Data()


def test_gkd_is_on_the_students_own_responses():
    recipe = recipes.get("gkd")
    assert recipe.source == OnPolicy()
    assert recipe.objective.terms == (Match(JensenShannon(0.5), to=Teacher(), on="main"),)


def test_akl():
    assert terms("akl", head_mass=0.3) == (Match(AdaptiveKL(0.3), to=Teacher(), on="main"),)


def test_distillm():
    recipe = recipes.get("distillm", lam=0.2, capacity=7)
    assert recipe.source == Adaptive(Data(), OnPolicy(), capacity=7)
    assert recipe.objective.terms == (Match(SkewForwardKL(0.2), to=Teacher(), on="main"),)
    text = recipes.get("distillm", text="corpus")
    assert text.objective.terms[1] == Imitate(on="text")
    assert text.source.stream_data() == {"main": ("train",), "text": ("corpus",)}


def test_minillm_in_three_pieces():
    recipe = recipes.get("minillm", teacher_share=0.3, text="corpus")
    sampler = Arithmetic({Old(): 0.7, Teacher(): 0.3})
    assert dict(recipe.source.sources)["main"] == OnPolicy(sampler=sampler)  # type: ignore[attr-defined]
    long, single, text = recipe.objective.terms
    assert isinstance(long, PolicyGradient)
    assert long.advantage == LogRatio(Teacher(), Old()) >> ToGo(1, "remaining") >> Whitened()
    assert long.surrogate == Clip(0.2, anchor=Behaviour())
    assert isinstance(single, Match)
    assert (single.divergence, single.to, single.exact) == (ReverseKL(), Teacher(), True)
    assert isinstance(single.weight, Importance)
    assert single.weight.sampled_from == Behaviour()
    assert text == Imitate(on="text")
    assert recipe.schedule == Schedule(epochs=4)
    released = terms("minillm", start=0)[0]
    assert released.advantage == LogRatio(Teacher(), Old()) >> ToGo(0, "remaining") >> Whitened()
    assert terms("minillm")[1].coefficient == 1.0


def test_kdrl():
    gradient, match = terms("kdrl")
    assert gradient == PolicyGradient(Reward() >> GroupNormalised(), Clip(0.2), on="main")
    assert (match.divergence, match.to, match.estimator) == (ReverseKL(), Teacher(), K2())
    assert match.coefficient == Linear(5e-3, 1e-3, steps=200)
    assert match.weight == 1.0
    assert terms("kdrl", guided=True)[1].weight == ~GroupAny()
    assert set(recipes.get("kdrl", coefficient=0.0).models) == set()


def test_g_opd():
    (term,) = terms("g-opd", scale=1.5, clip=None)
    assert term.advantage == LogRatio(LogLinear({Teacher(): 1.5, Model("base"): -0.5}), Policy())
    assert term.surrogate == Ratio()
    assert set(recipes.get("g-opd").models) == {"teacher", "base"}
    # Plain distillation needs no base at all.
    assert set(recipes.get("g-opd", scale=1.0).models) == {"teacher"}


# ---- rewards -----------------------------------------------------------------------------------------------------


def test_grpo():
    recipe = recipes.get("grpo", group_size=5, clip=0.1, coefficient=0.02, minibatches=2, epochs=3)
    assert root(recipe.source) == OnPolicy(5)
    gradient, match = recipe.objective.terms
    assert gradient == PolicyGradient(Reward() >> GroupNormalised(), Clip(0.1), on="main")
    assert (match.divergence, match.to, match.estimator, match.coefficient) == (ReverseKL(), Reference(), K2(), 0.02)
    assert match.sampled_from == "behaviour"
    assert recipe.schedule == Schedule(2, 3)
    assert recipe.models == {"reference": Frozen("initial")}
    assert terms("grpo")[1].sampled_from == "model"
    assert set(recipes.get("grpo", coefficient=0.0).models) == set()


def test_ppo():
    recipe = recipes.get("ppo", target=3.0, initial=0.2, horizon=99.0, value_coefficient=0.25)
    gradient, fit = recipe.objective.terms
    plain = Reward() >> InReward(Reference(), Controller(3.0, 0.2, 99.0)) >> GAE("critic", 0.95)
    assert gradient == PolicyGradient(plain >> Whitened(), Clip(0.2), on="main")
    assert isinstance(fit, Fit)
    assert (fit.target, fit.coefficient) == (Returns(plain), 0.25)
    assert isinstance(recipe.models["critic"], Trained)
    assert recipe.models["reference"] == Frozen("initial")


def test_disco():
    recipe = recipes.get("disco", tau=2.0, bound=0.1, slope=3.0)
    preference, match = recipe.objective.terms
    assert preference == Preference(MeanLogProb(), link=Identity(), contrast=AgainstHardest(2.0), on="main")
    assert (match.divergence, match.to, match.estimator) == (ForwardKL(), Old(), K1())
    assert match.coefficient == Hinge(0.1, 3.0)
    assert match.sampled_from == "target"
    assert not recipe.schedule.single_use, "with one step per draw the constraint would never act"
    assert recipe.models == {}


# ---- preferences -------------------------------------------------------------------------------------------------


def test_dpo():
    assert terms("dpo", beta=0.3, smoothing=0.1) == (
        Preference(ImplicitReward(beta=0.3), Logistic(0.1), on="main"),
    )  # fmt: skip
    assert recipes.get("dpo").models == {"reference": Frozen("initial")}


def test_f_dpo():
    (term,) = terms("f-dpo", divergence=ForwardKL(), beta=0.2, clip=3.0)
    assert term.score == ImplicitReward(ForwardKL(), 0.2, clip=3.0)
    assert terms("f-dpo")[0].score.divergence == JensenShannon(0.5)


@pytest.mark.parametrize("divergence", [TotalVariation(), ChiSquared()], ids=repr)
def test_f_dpo_refuses_what_gives_no_reward(divergence):
    with pytest.raises(RecipeError, match=f"{type(divergence).__name__} gives no implicit reward"):
        recipes.get("f-dpo", divergence=divergence)


def test_inpo():
    recipe = recipes.get("inpo", eta=0.01, tau=0.004, group_size=6, steps_per_round=50)
    assert root(recipe.source) == OnPolicy(6, sampler=Model("previous"))
    (term,) = recipe.objective.terms
    assert term.score == ImplicitReward(beta=1.0, to=Geometric(reference=0.4, previous=0.6))
    assert term.link == Squared(1 / (2 * 0.01))
    assert recipe.models == {"reference": Frozen("initial"), "previous": Snapshot(1)}
    assert recipe.schedule.steps_per_round == 50


def test_inpo_at_and_beyond_its_limit():
    assert terms("inpo", eta=0.01, tau=0.01)[0].score.to == Geometric(reference=1.0)
    with pytest.raises(RecipeError, match=r"tau=0.02 must be at most eta=0.01: .* is negative"):
        recipes.get("inpo", eta=0.01, tau=0.02)


def test_a_change_of_a_part_is_checked_again():
    recipe = recipes.get("grpo")
    with pytest.raises(RecipeError, match="holds data"):
        replace(recipe, source=Data())
