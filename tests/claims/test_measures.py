"""The claims about measurements hold, and are refuted by measurements that count otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from leibler.claims import measures as m
from leibler.measure.fidelity import Fidelity, fidelity
from leibler.measure.memorisation import inheritance, recited


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
