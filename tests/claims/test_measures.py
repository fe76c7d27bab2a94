"""The claims about measurements hold, and are refuted by measurements that count otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from claims.breaking import Broken, case, refute, without
from leibler.claims import measures as m
from leibler.measure.fidelity import Fidelity, fidelity
from leibler.measure.memorisation import foretold, inheritance, recited
from leibler.objective import Match


def swapped(**answers: Any) -> Fidelity:
    return fidelity(**{**answers, "student": answers["base"], "base": answers["student"]})


def any_error(**answers: Any) -> Fidelity:
    """Counts every error of the student where the teacher errs, copied or not."""
    both = [s != g for s, t, g in zip(answers["student"], answers["teacher"], answers["gold"]) if t != g]
    return replace(fidelity(**answers), error_inheritance=sum(both) / len(both))


def test_they_hold():
    for claim in (m.fidelity_tells_copied_errors, m.memorisation_counts_what_is_recited):
        shown, holds = claim()
        assert holds, shown


@pytest.mark.parametrize("broken", [swapped, any_error])
def test_other_fidelity_refutes(broken):
    assert not m.fidelity_tells_copied_errors(broken)[1]


@pytest.mark.parametrize(
    ("measure", "cells"),
    [
        (lambda model, places: [sum(a == b for a, b in zip(p.suffix, p.suffix)) for p in places], inheritance),
        (lambda model, places: [n - 1 for n in recited(model, places)], inheritance),
        (recited, lambda s, t, b: inheritance(s, b, t)),
        (recited, lambda s, t, b: replace(inheritance(s, t, b), easy=0)),
    ],
)
def test_other_memorisation_refutes(measure, cells):
    assert not m.memorisation_counts_what_is_recited(measure, cells)[1]


# A student that learns from the text alone has nothing from its teacher.
BROKEN_FULL = [case(m.students_recite_what_their_teacher_does, "kd", "text-only", without(Match), imitate=1.0)]


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN_FULL)
def test_a_student_without_a_teacher_refutes(broken: Broken):
    refute(broken)


@pytest.mark.slow
def test_students_recite_what_their_teacher_does_and_other_counts_refute():
    claim = m.students_recite_what_their_teacher_does
    shown, holds = claim()
    assert holds, shown
    for broken in (
        {"cells": lambda s, t, b: inheritance(s, b, t)},
        {"cells": lambda s, t, b: replace(inheritance(s, t, b), easy=0)},
        {"tell": lambda columns, known: foretold(columns, known[25:] + known[:25])},
    ):
        assert not claim(**broken)[1], broken
