"""Expressions over models: the sampled level and the whole vocabulary say the same."""

from __future__ import annotations

import math

import pytest
import torch

from leibler.errors import RecipeError
from leibler.objective import (
    Arithmetic,
    Behaviour,
    Geometric,
    Handle,
    LogLinear,
    Model,
    Old,
    Policy,
    Reference,
    Teacher,
    Tempered,
)
from leibler.objective.soft import Soft
from leibler.objective.targets import Target

NAMES = ("teacher", "reference", "base")
EXPRESSIONS = [
    Teacher(),
    LogLinear({Teacher(): 0.5, Reference(): 0.5}),
    LogLinear({Teacher(): 1.5, Reference(): -0.5}),
    LogLinear({Teacher(): 1.5, Reference(): -0.5}, clip=0.4),
    LogLinear({Teacher(): 1.0, "base": 2.0, Reference(): -2.0}, clip=1.0),
    Arithmetic({Teacher(): 0.3, Reference(): 0.7}),
    Tempered(Teacher(), 2.0),
    LogLinear({Arithmetic({Teacher(): 0.3, Reference(): 0.7}): 1.25, Model("base"): -0.25}),
    Tempered(Arithmetic({Teacher(): 0.3, "base": 0.7}), 0.5),
]


@pytest.fixture
def laws() -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(3)
    return {n: (2 * torch.randn(6, 9, generator=source, dtype=torch.float64)).log_softmax(-1) for n in NAMES}


@pytest.mark.parametrize("target", EXPRESSIONS, ids=repr)
def test_both_levels_agree_up_to_the_normaliser(target: Target, laws):
    """Bounds are nats at both levels; what a row lacks is one number, the log-normaliser."""
    leaves = tuple(laws[h.name] / math.log(2) for h in target.handles)
    before = [leaf.clone() for leaf in leaves]
    rows = leaves[0] if target.combine is None else target.combine(leaves)
    for token in range(9):
        score = target.sampled(lambda h, token=token: laws[h.name][:, token])
        torch.testing.assert_close(rows[:, token] * math.log(2), score, rtol=1e-9, atol=1e-9)
    if target.normalised:
        torch.testing.assert_close(torch.exp2(rows).sum(-1), torch.ones(6, dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))


def test_log_linear_by_its_formula(laws):
    t, r = laws["teacher"][:, 0], laws["reference"][:, 0]
    pair = {Teacher(): 1.25, Reference(): -0.25}

    def of(h: Handle) -> torch.Tensor:
        return laws[h.name][:, 0]

    torch.testing.assert_close(LogLinear(pair).sampled(of), 1.25 * t - 0.25 * r)
    # teacher ** (c + d) * (reference / teacher) ** d with the last log-ratio bounded
    torch.testing.assert_close(LogLinear(pair, clip=0.3).sampled(of), t - 0.25 * (r - t).clamp(-0.3, 0.3))
    torch.testing.assert_close(LogLinear(pair, clip=1e9).sampled(of), 1.25 * t - 0.25 * r)


def test_a_model_without_weight_is_not_read(laws):
    assert LogLinear({Teacher(): 1.0, Reference(): 0.0}).handles == (Teacher(),)
    assert Arithmetic({Teacher(): 1.0, Reference(): 0.0}).handles == (Teacher(),)
    assert Geometric(reference=1.0, previous=0.0).handles == (Reference(),)
    never = torch.full((6,), -math.inf, dtype=torch.float64)
    got = LogLinear({Teacher(): 1.0, Reference(): 0.0}).sampled(
        lambda h: laws["teacher"][:, 0] if h == Teacher() else never
    )
    assert bool(torch.isfinite(got).all())


def test_equal_expressions_are_one_key():
    assert LogLinear({Teacher(): 1.5, "reference": -0.5}) == LogLinear({Model("teacher"): 1.5, Reference(): -0.5})
    assert len({Old(), Model("old"), Handle("old")}) == 1
    assert len({Policy(), Old(), Behaviour(), Reference(), Teacher()}) == 5
    assert hash(Arithmetic({Old(): 0.8, Teacher(): 0.2})) == hash(Arithmetic({Old(): 0.8, Teacher(): 0.2}))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LogLinear({}), "LogLinear needs at least one model"),
        (lambda: LogLinear({Teacher(): 0.0}), "LogLinear needs at least one model"),
        (lambda: Arithmetic({Teacher(): 0.3, Reference(): 0.6}), "sum to 1, not 0.9"),
        (lambda: Arithmetic({Teacher(): 1.5, Reference(): -0.5}), "must be positive"),
        (lambda: Geometric(reference=0.3, previous=0.6), "weights of Geometric must sum to 1"),
    ],
)
def test_weights_that_make_no_law(build, message):
    with pytest.raises(RecipeError, match=message):
        build()


def test_what_is_normalised():
    assert Teacher().normalised
    assert Arithmetic({Teacher(): 0.5, Reference(): 0.5}).normalised
    assert not LogLinear({Teacher(): 1.5, Reference(): -0.5}).normalised
    assert not Tempered(Teacher(), 2.0).normalised
    product = LogLinear({Teacher(): 1.5, Reference(): -0.5})
    assert not Arithmetic({product: 0.5, Reference(): 0.5}).normalised


def test_a_mixture_of_unnormalised_laws_has_no_sampled_level(laws):
    mixture = Arithmetic({LogLinear({Teacher(): 1.5, Reference(): -0.5}): 0.5, Reference(): 0.5})
    with pytest.raises(RecipeError, match=r"normaliser.*use Exact"):
        mixture.sampled(lambda h: laws[h.name][:, 0])
    rows = mixture.combine(tuple(laws[h.name] / math.log(2) for h in mixture.handles))
    product = (1.5 * laws["teacher"] - 0.5 * laws["reference"]).softmax(-1)
    torch.testing.assert_close(torch.exp2(rows), 0.5 * product + 0.5 * laws["reference"].exp())


@pytest.mark.parametrize("combine", [LogLinear, Arithmetic])
def test_the_law_of_no_model_is_not_combined(combine):
    with pytest.raises(RecipeError, match="Soft is the law of no model"):
        combine({Soft("latents"): 0.5, Teacher(): 0.5})
