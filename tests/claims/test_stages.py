"""The claims about ADPA, DCKD and ERPD are refuted by recipes, and by theory, that are broken."""

from __future__ import annotations

import pytest

from claims.breaking import Broken, case, flipped, refute, with_, without
from leibler.claims import stages as s
from leibler.divergence import ReverseKL
from leibler.objective import (
    Clip,
    GroupNormalised,
    Imitate,
    LogRatio,
    Match,
    Model,
    Old,
    PolicyGradient,
    Reward,
    Teacher,
)
from leibler.objective.terms import Term
from leibler.theory import moments

OUTCOME = Reward() >> GroupNormalised()
BROKEN = [
    case(s.adpa_climbs_the_expected_advantage, "adpa", "sign", flipped(Match)),
    case(s.adpa_climbs_the_expected_advantage, "adpa", "zero", without(Match)),
    case(s.adpa_climbs_the_expected_advantage, "adpa", "half", weight=1.0),
    case(s.adpa_climbs_the_expected_advantage, "adpa", "with-entropy", with_(Match, divergence=ReverseKL())),
    case(s.adpa_climbs_the_expected_advantage, "adpa", "without-base", with_(Match, to=Teacher())),
    case(s.adpa_climbs_the_expected_advantage, "adpa", "clipped", clip=0.5),
    case(s.adpa_bounds_the_advantage, "adpa", "unclipped", clip=None),
    case(s.adpa_bounds_the_advantage, "adpa", "always-clipped", clip=0.5),
    case(s.adpa_bounds_the_advantage, "adpa", "sign", flipped(Match)),
    case(s.dckd_is_held_on_both_responses, "adpa", "chosen-only", with_(Match, where="chosen")),
    case(s.dckd_is_held_on_both_responses, "adpa", "imitates-both", with_(Imitate, where=None)),
    case(s.dckd_is_held_on_both_responses, "adpa", "reverse", with_(Match, divergence=ReverseKL())),
    case(s.dckd_is_held_on_both_responses, "adpa", "sign", flipped(Match)),
    case(s.dckd_is_held_on_both_responses, "adpa", "without-likelihood", without(Imitate)),
    case(s.erpd_rests_on_the_path, "erpd/distil", "fixed", coefficient=2.0),
    case(s.erpd_rests_on_the_path, "erpd/distil", "unheld", without(Match)),
    case(s.erpd_rests_on_the_path, "erpd/distil", "sign", flipped(PolicyGradient)),
    case(s.erpd_rests_on_the_path, "erpd/distil", "bounded", bound=0.1),
    case(s.erpd_rests_on_the_path, "erpd/distil", "to-old", with_(Match, to=Model("extreme"))),
    case(
        s.erpd_rests_on_the_path, "erpd/distil", "moving-base",
        with_(PolicyGradient, advantage=LogRatio(Model("extreme"), Old())),
    ),
    case(s.erpd_filters_drift, "erpd/distil", "any-outcome", agree=False),
    case(s.erpd_filters_drift, "erpd/distil", "no-dead-zone", dead_zone=0.0),
    case(s.erpd_filters_drift, "erpd/distil", "unbounded", bound=50.0),
    case(s.erpd_filters_drift, "erpd/distil", "rewards", with_(PolicyGradient, advantage=OUTCOME)),
    case(s.erpd_filters_drift, "erpd/distil", "sign", flipped(PolicyGradient)),
    case(s.erpd_goes_far_on_fixed_responses, "erpd/extreme", "tight", high=0.2),
    case(s.erpd_goes_far_on_fixed_responses, "erpd/extreme", "symmetric", with_(PolicyGradient, surrogate=Clip(0.4))),
    case(s.erpd_goes_far_on_fixed_responses, "erpd/extreme", "sign", flipped(Term)),
    case(s.erpd_goes_far_on_fixed_responses, "erpd/extreme", "raw", with_(PolicyGradient, advantage=Reward())),
    case(s.erpd_goes_far_on_fixed_responses, "erpd/extreme", "free", low=50.0, high=50.0),
]  # fmt: skip

BROKEN_FULL = [
    case(s.adpa_helps_a_small_student, "adpa", "sign", flipped(Match)),
    case(s.adpa_helps_a_small_student, "adpa", "without-advantage", weight=0.0),
    case(s.erpd_keeps_the_cheap_part, "erpd/distil", "unheld", without(Match)),
    case(s.erpd_keeps_the_cheap_part, "erpd/distil", "half", coefficient=4.0),
]

OTHERWISE = [s.erpd_pays_most_at_first]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_method_refutes_its_claim(broken: Broken):
    refute(broken)


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN_FULL)
def test_a_broken_method_refutes_its_behaviour(broken: Broken):
    refute(broken)


def test_broken_theory_refutes_the_identities(monkeypatch):
    assert s.erpd_pays_most_at_first()[1]
    whole = s.divergence_along
    with monkeypatch.context() as patch:
        patch.setattr(s, "divergence_along", lambda *laws: 1.001 * whole(*laws))
        assert not s.erpd_pays_most_at_first()[1]
    with monkeypatch.context() as patch:  # a variance under the base, wherever on the path
        patch.setattr(s, "moments", lambda p, q, at: (moments(p, q, at)[0], moments(p, q, 0.0)[1]))
        assert not s.erpd_pays_most_at_first()[1]
