"""The claims about replay are refuted by recipes that are broken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from claims.breaking import Broken, case, refute, without
from leibler.claims import replay as r
from leibler.errors import DataError
from leibler.objective import MatchHidden, Objective
from leibler.represent import ActivationBand, margin_violation
from leibler.train import Measured, Recipe


def narrow(recipe: Recipe) -> Recipe:
    """No band at all: every activation must stay exactly where it was, on either side."""
    return replace(recipe, models={**recipe.models, "band": Measured("general", sigmas=-3.0)})


def slack(recipe: Recipe) -> Recipe:
    """Replay alone, whatever was asked for."""
    kept = (t for t in recipe.objective.terms if not isinstance(t, MatchHidden))
    return replace(recipe, objective=Objective(*kept), models={})


BROKEN = [
    case(r.the_band_holds_what_was, "gere", "no margin", without(MatchHidden)),
    case(r.the_band_holds_what_was, "gere", "crossed band", narrow),
]
BROKEN_FULL = [case(r.the_margin_forgets_less, "gere", "no margin", slack)]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_recipe_refutes_its_claim(broken: Broken):
    refute(broken)


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN_FULL)
def test_a_broken_method_refutes_its_behaviour(broken: Broken):
    refute(broken)


def test_the_band_is_that_of_all_events_however_they_are_batched():
    states = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-3 + 100.0
    whole = ActivationBand.of([states], 2.0)
    cut = ActivationBand.of([states[:7], states[7:7], states[7:40], states[40:]], 2.0)
    mean, reach = states.mean(0), 2.0 * states.std(0, unbiased=False)
    for band in (whole, cut):
        assert torch.allclose(band.low.double(), mean - reach, rtol=1e-7)
        assert torch.allclose(band.high.double(), mean + reach, rtol=1e-7)
    with pytest.raises(DataError, match="at least one token"):
        ActivationBand.of([states[:0]])


def test_what_is_stored_violates_nothing_and_the_gradient_pulls_back():
    source = torch.Generator().manual_seed(1)
    stored = torch.randn(40, 5, generator=source, dtype=torch.float64) * 2
    low, high = torch.full((5,), -1.0).double(), torch.full((5,), 1.0).double()
    assert margin_violation(stored, stored, low, high).abs().sum() == 0
    hidden = (stored + torch.randn(40, 5, generator=source, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: margin_violation(h, stored, low, high), hidden)
    margin_violation(hidden, stored, low, high).sum().backward()
    assert hidden.grad is not None
    moved = hidden.detach() - 1e-3 * hidden.grad
    assert (margin_violation(moved, stored, low, high) <= margin_violation(hidden.detach(), stored, low, high)).all()
