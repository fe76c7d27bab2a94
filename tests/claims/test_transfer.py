"""The claims about what students take over are refuted by recipes, and measures, that are broken."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import pytest

from claims.breaking import Broken, case, flipped, refute, with_
from leibler.claims import transfer as t
from leibler.measure.fidelity import Fidelity, fidelity
from leibler.objective import Match, Reference, Teacher

BROKEN_FULL = [
    case(t.delta_kd_keeps_the_students_world, "delta-kd", "sign", flipped()),
    case(t.delta_kd_keeps_the_students_world, "delta-kd", "to-the-teacher", with_(Match, to=Teacher())),
    case(t.delta_kd_keeps_the_students_world, "delta-kd", "no-shift", with_(Match, to=Reference())),
    case(t.delta_kd_keeps_the_students_world, "delta-kd", "backwards", alpha=-1.0),
    case(t.expansion_against_likelihood, "vocabulary-expansion", "pushed", with_(Match, to=Teacher())),
    case(t.expansion_against_likelihood, "vocabulary-expansion", "sign", flipped()),
]

OTHERWISE = [t.fidelity_on_digits]


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN_FULL)
def test_a_broken_method_refutes_its_behaviour(broken: Broken):
    refute(broken)


def of_everything(
    student: Sequence[Hashable], base: Sequence[Hashable], teacher: Sequence[Hashable], gold: Sequence[Hashable]
) -> Fidelity:
    """Takes the gold answers for the teacher's: what is inherited is no error then."""
    return fidelity(student, base, gold, gold)


@pytest.mark.slow
def test_another_measure_refutes_the_study_of_digits():
    observed, holds = t.fidelity_on_digits(of_everything)  # type: ignore[call-arg]
    assert not holds, observed
