"""Shapers that let some numbers through: by size, by the sign of another signal."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from leibler.errors import RecipeError
from leibler.objective import Column, DeadZone, GroupNormalised, LogRatio, Policy, Reference, Reward, SameSign, View
from objective.made import rows

NONE: Any = None


def test_small_numbers_are_taken_for_none():
    value = torch.tensor([-2.0, -0.5, -0.4, 0.0, 0.4, 0.5, math.inf, math.nan])
    found = DeadZone(0.5)(NONE, value, "token")
    assert found[:7].tolist() == [-2.0, -0.5, 0.0, 0.0, 0.0, 0.5, math.inf]
    assert found[7].isnan(), "for a guard to see"
    assert torch.equal(DeadZone(0.0)(NONE, value[:7], "token"), value[:7])
    for wrong in (-0.1, math.inf, math.nan):
        with pytest.raises(RecipeError, match="finite width"):
            DeadZone(wrong)


def test_a_token_counts_where_the_outcome_of_its_response_agrees():
    batch = rows([2, 1, 2, 2], [0, 0, 1, 1], reward=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    opinion = torch.zeros(batch.mask.shape).masked_scatter(
        batch.mask, torch.tensor([1.0, -1.0, -2.0, 3.0, -3.0, 4.0, -4.0])
    )
    view = View(batch.with_columns(opinion=opinion))
    signal = Column("opinion", reach="token") >> SameSign(Reward() >> GroupNormalised())
    assert signal.reach == "token"
    # First response up, second down; equal outcomes say nothing about the others.
    assert signal(view).tolist() == [1.0, 0.0, -2.0, 0.0, 0.0, 0.0, 0.0]


def test_numbers_per_response_and_what_does_not_fit():
    batch = rows([1, 1], [0, 0], reward=torch.tensor([1.0, 0.0]), other=torch.tensor([2.0, 3.0]))
    assert (Column("other") >> SameSign(Reward() >> GroupNormalised()))(View(batch)).tolist() == [2.0, 0.0]
    with pytest.raises(RecipeError, match="one number per sequence with one per token"):
        Reward() >> SameSign(Column("x", reach="token"))
    with pytest.raises(RecipeError, match=r"use Old\(\) in place of Policy\(\)"):
        LogRatio(Reference(), Reference()) >> SameSign(LogRatio(Policy(), Reference()))


def test_signs_alone_are_compared():
    """A product would underflow for the first, and be no number for the second; what is none already stays none."""
    batch = rows([1] * 4, reward=torch.tensor([1e-30, 0.0, 1.0, math.nan]))
    value = torch.tensor([1e-30, math.inf, math.nan, 1.0])
    found = SameSign(Reward())(View(batch), value, "sequence")
    assert found[:2].tolist() == [value[0].item(), 0.0]
    assert found[2:].isnan().all()


def test_what_it_reads_is_asked_for():
    outcome = LogRatio(Reference(), Reference())
    assert set(outcome.needs()) <= set((Column("x", reach="token") >> SameSign(outcome)).needs())
