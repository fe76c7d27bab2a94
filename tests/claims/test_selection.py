"""The claims about choosing data hold, and are refuted by ways that choose otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from leibler.claims import selection as s
from leibler.data import Dataset
from leibler.data.selection import AboveMean, Selection, TopShare, select
from leibler.measure.scores import read
from leibler.measure.selecting import llkd, miniplm


def swapped(data: Dataset, teacher: Any, reference: Any, share: float) -> Selection:
    return miniplm(data, reference, teacher, share)


def by_confidence(data: Dataset, teacher: Any, student: Any) -> Selection:
    return select(data, {"confidence": read(teacher, data.records)["confidence"]}, AboveMean("confidence"))


def by_uncertainty(data: Dataset, teacher: Any, student: Any) -> Selection:
    return select(data, {"uncertainty": read(student, data.records)["uncertainty"]}, AboveMean("uncertainty"))


def by_surprise(data: Dataset, teacher: Any, reference: Any, share: float) -> Selection:
    return select(data, {"nll": read(teacher, data.records)["nll"]}, TopShare("nll", share))


@pytest.mark.parametrize("claim", [s.miniplm_keeps_the_hard_and_learnable, s.llkd_keeps_right_and_unknown_labels])
def test_it_holds(claim):
    shown, holds = claim()
    assert holds, shown


@pytest.mark.parametrize(
    ("claim", "broken"),
    [
        (s.miniplm_keeps_the_hard_and_learnable, swapped),
        (s.miniplm_keeps_the_hard_and_learnable, s._by_teacher),
        (s.miniplm_keeps_the_hard_and_learnable, by_surprise),
        (s.llkd_keeps_right_and_unknown_labels, by_confidence),
        (s.llkd_keeps_right_and_unknown_labels, by_uncertainty),
        (s.llkd_keeps_right_and_unknown_labels, lambda data, teacher, student: llkd(data, student, teacher)),
    ],
)
def test_another_choice_refutes_it(claim, broken):
    shown, holds = claim(broken)
    assert not holds, shown
