"""The claims about choosing data hold, and are refuted by ways that choose otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from leibler import recipes
from leibler.claims import selection as s
from leibler.data import Dataset
from leibler.data.selection import AboveMean, Difference, Selection, TopShare, select
from leibler.measure.scores import read
from leibler.measure.selecting import llkd, miniplm
from leibler.train import Recipe


def swapped(data: Dataset, teacher: Any, reference: Any, share: float) -> Selection:
    return miniplm(data, reference, teacher, share)


def by_confidence(data: Dataset, teacher: Any, student: Any) -> Selection:
    return select(data, {"confidence": read(teacher, data.records)["confidence"]}, AboveMean("confidence"))


def by_uncertainty(data: Dataset, teacher: Any, student: Any) -> Selection:
    return select(data, {"uncertainty": read(student, data.records)["uncertainty"]}, AboveMean("uncertainty"))


def by_surprise(data: Dataset, teacher: Any, reference: Any, share: float) -> Selection:
    return select(data, {"nll": read(teacher, data.records)["nll"]}, TopShare("nll", share))


@pytest.mark.parametrize(
    "claim",
    [
        s.miniplm_keeps_the_hard_and_learnable,
        s.llkd_keeps_right_and_unknown_labels,
        s.paced_weights_where_the_signal_is,
    ],
)
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


def with_settings(slug: str, **settings: Any) -> Any:
    return lambda **given: recipes.get(slug, **{**settings, **given})


def swapped_readers(**given: Any) -> Recipe:
    made = recipes.get("miniplm", **given)
    source: Any = made.source
    return replace(made, source=replace(source, by=Difference("reference_small", "teacher")))


@pytest.mark.parametrize("settings", [{"a": 0.0, "b": 0.0}, {"a": 2.0}, {"b": 0.5}])
def test_another_kernel_refutes_it(settings):
    shown, holds = s.paced_weights_where_the_signal_is(with_settings("paced", **settings))
    assert not holds, shown


FULL = [
    (s.miniplm_teaches_the_hard_text, swapped_readers),
    (s.llkd_learns_more_from_as_many, with_settings("llkd", confidence=0.0)),
    (s.llkd_learns_more_from_as_many, with_settings("llkd", uncertainty=0.0)),
    (s.llkd_learns_more_from_as_many, with_settings("llkd", confidence=0.0, uncertainty=0.0)),
    (s.paced_gets_further, with_settings("paced", a=0.0, b=0.0)),
    (s.paced_gets_further, with_settings("paced", a=2.0)),
]

OTHERWISE = [
    s.miniplm_keeps_the_hard_and_learnable,
    s.llkd_keeps_right_and_unknown_labels,
    s.paced_weights_where_the_signal_is,
    *dict.fromkeys(claim for claim, _ in FULL),
]
"""Claims that are refuted in this file."""


@pytest.mark.slow
@pytest.mark.parametrize("claim", dict.fromkeys(claim for claim, _ in FULL))
def test_it_is_seen_in_what_students_learn(claim):
    shown, holds = claim()
    assert holds, shown


@pytest.mark.slow
@pytest.mark.parametrize(("claim", "build"), FULL)
def test_another_choice_is_seen_too(claim, build):
    shown, holds = claim(build)
    assert not holds, shown
