"""Rows and views: cutting them loses and mixes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leibler.errors import RecipeError
from leibler.objective import (
    Column,
    GroupAny,
    GroupNormalised,
    LogProb,
    LogRatio,
    Old,
    Policy,
    Reward,
    Teacher,
    ToGo,
    concatenate,
)
from leibler.objective.rows import group_mean, group_spread, group_sum
from objective.made import nested, rows, view

LENGTHS = st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(lambda x: sum(x) > 0)


def test_events_lie_end_to_end():
    made = rows([2, 0, 3])
    assert made.row.tolist() == [0, 0, 2, 2, 2]
    assert made.length.tolist() == [2, 0, 3]
    assert torch.equal(made.label, made.tokens[:, 1:][made.mask])
    assert made.groups == 3


def test_group_numbers_may_have_gaps():
    made = rows([1, 1, 1, 1], [7, 3, 7, 9])
    assert made.groups == 3
    assert made.group_index.tolist() == [1, 0, 1, 2]
    value = torch.tensor([1.0, 5.0, 4.0, 2.0])
    assert group_mean(value, made).tolist() == [2.5, 5.0, 2.5, 2.0]
    assert group_sum(value, made).tolist() == [5.0, 5.0, 5.0, 2.0]
    assert group_spread(value, made).tolist() == [3.0, 0.0, 3.0, 0.0]
    assert group_spread(-value, made).tolist() == [3.0, 0.0, 3.0, 0.0]


@given(LENGTHS, st.data())
def test_selecting_rows_keeps_their_numbers_together(lengths, data):
    made = rows(lengths, score=[float(i) for i in range(len(lengths))])
    made = made.with_columns(each=torch.arange(made.mask.numel(), dtype=torch.float64).reshape(made.mask.shape))
    whole = view(made)
    advantage = LogRatio(Teacher(), Old())
    whole = whole.with_signals({advantage: whole.get(LogProb(Teacher())), Reward(): made.columns["score"]})
    chosen = data.draw(st.sets(st.integers(0, len(lengths) - 1), min_size=1))
    # The order of the indices does not matter: rows stay in the batch's order.
    part = whole.select(torch.tensor(sorted(chosen, reverse=True)))
    kept = sorted(chosen)
    assert part.rows.length.tolist() == [lengths[i] for i in kept]
    for need in whole.values:
        before = nested(made, whole.get(need))
        assert nested(part.rows, part.get(need)) == [before[i] for i in kept]
    assert part.signals[Reward()].tolist() == kept
    assert nested(part.rows, part.signals[advantage]) == [nested(made, whole.signals[advantage])[i] for i in kept]
    assert nested(part.rows, part.column("each")) == [nested(made, whole.column("each"))[i] for i in kept]
    assert part.rows.tokens.shape[1] == int(part.rows.attention.sum(1).max())


@given(LENGTHS, LENGTHS)
def test_concatenate_and_select_are_inverse(first, second):
    a, b = (
        rows(first, [0] * len(first), score=first),
        rows(second, [0] * len(second), score=second, muted=[True] * len(second)),
    )
    both = concatenate([a, b])
    assert both.groups == 2
    assert both.length.tolist() == [*first, *second]
    assert both.muted is not None
    assert both.muted.tolist() == [False] * len(first) + [True] * len(second)
    back = both.select(torch.arange(len(first), len(both)))
    assert torch.equal(back.tokens, b.select(torch.arange(len(b))).tokens)
    assert back.columns["score"].tolist() == second


def test_no_row_at_all():
    empty = rows([2, 1], score=[1.0, 2.0]).select(torch.tensor([], dtype=torch.long))
    assert len(empty) == empty.groups == 0
    assert empty.row.shape == (0,)
    assert group_spread(empty.columns["score"], empty).shape == (0,)


def test_a_number_nobody_computed_is_named():
    with pytest.raises(RecipeError, match=r"teacher.*must list it in needs"):
        view(rows([1]), names=("policy",)).get(LogProb(Teacher()))
    with pytest.raises(RecipeError, match=r"no column 'reward' \(it has: score\); add the stage"):
        view(rows([1], score=[1.0])).column("reward")


def test_a_slice_offers_no_sum_over_a_sequence():
    whole = view(rows([3, 2]))
    assert whole.sum_rows(torch.ones(5)).tolist() == [3, 2]
    part = whole.slice(torch.tensor([1, 4]))
    assert part.row.tolist() == [0, 1]
    assert torch.equal(part.get(LogProb(Policy())), whole.get(LogProb(Policy()))[[1, 4]])
    with pytest.raises(RecipeError, match="couples='sequence'"):
        part.sum_rows(torch.ones(2))


def test_signals_spread_over_the_events_of_a_slice():
    whole = view(rows([3, 2], [0, 0], reward=[0.0, 4.0]))
    normal = Reward() >> GroupNormalised(std=None)
    per_row = normal(whole)
    assert per_row.tolist() == [-2.0, 2.0]
    part = whole.with_signals({normal: per_row}).slice(torch.tensor([0, 3, 4]))
    assert part.signal(normal).tolist() == [-2.0, 2.0, 2.0]
    assert part.signal(0.5).tolist() == [0.5, 0.5, 0.5]
    to_go = LogRatio(Teacher(), Old()) >> ToGo()
    part = whole.with_signals({to_go: torch.arange(5.0)}).slice(torch.tensor([1, 4]))
    assert part.signal(to_go).tolist() == [1.0, 4.0]
    assert part.signal(GroupAny() * 3.0).tolist() == [3.0, 3.0]


def test_a_column_must_say_its_level():
    made = rows([3, 2], reward=[0.0, 4.0], each=torch.rand(2, 4))
    whole = view(made)
    assert Column("each", reach="token")(whole).shape == (5,)
    with pytest.raises(RecipeError, match="holds one number per token; say Column"):
        Column("each")(whole)
    with pytest.raises(RecipeError, match="holds one number per sequence; say Column"):
        Column("reward", reach="token")(whole)


def test_detached_views_hold_no_graph():
    whole = view(rows([2]))
    whole = whole.with_values({n: v.requires_grad_() for n, v in whole.values.items()})
    assert not any(v.requires_grad for v in whole.detached().values.values())
    assert replace(whole, step=4).at(7, {}).step == 7
