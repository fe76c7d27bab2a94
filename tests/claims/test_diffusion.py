"""The claims about masked-diffusion language models are refuted by recipes that are broken."""

from __future__ import annotations

from dataclasses import replace

import pytest

from claims.breaking import Broken, case, changed, flipped, refute, with_
from leibler.claims import diffusion as d
from leibler.divergence import ReverseKL
from leibler.objective import Imitate, Match, Model
from leibler.objective.reduce import TokenMean

BROKEN = [
    case(d.llada_averages_over_orders, "llada", "sign", flipped()),
    case(d.llada_averages_over_orders, "llada", "unweighted", with_(Imitate, weight=1.0)),
    case(d.llada_averages_over_orders, "llada", "token-mean", with_(Imitate, reduce=TokenMean())),
    case(d.tad_parts_the_masked_positions, "tad", "sign", flipped()),
    case(d.tad_parts_the_masked_positions, "tad", "reverse", with_(Match, divergence=ReverseKL())),
    case(d.tad_parts_the_masked_positions, "tad", "everywhere", with_(Imitate, where=None)),
    case(d.tad_parts_the_masked_positions, "tad", "swapped", with_(Imitate, where="distant")),
    case(d.tad_parts_the_masked_positions, "tad", "further", lambda r: replace(r, source=replace(r.source, commit=2))),
    case(d.tad_parts_the_masked_positions, "tad", "no-hint", with_(Match, to=Model("initial"))),
    case(d.tad_needs_the_hint, "tad", "no-hint", with_(Match, to=Model("initial"))),
    case(d.tad_needs_the_hint, "tad", "no-teacher", changed(Match, lambda term: None), imitate=1.0),
]

BROKEN_FULL = [
    case(d.llada_needs_several_passes, "llada", "sign", flipped()),
    case(d.tad_keeps_coupled_tokens_together, "tad", "sign", flipped()),
    case(d.tad_keeps_coupled_tokens_together, "tad", "no-labels", imitate=0.0),
]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_method_refutes_its_claim(broken: Broken):
    refute(broken)


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN_FULL)
def test_a_broken_method_refutes_its_behaviour(broken: Broken):
    refute(broken)
