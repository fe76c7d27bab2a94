"""Generalised advantage estimation against its recursion."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leibler.objective import GAE, InReward, LogProb, Old, Output, Reference, Returns, Reward
from objective.made import nested, rows, view

LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(lambda x: sum(x) > 0)


def critic(lengths: list[int], reward: list[float]):
    made = view(rows(lengths, reward=reward))
    values = torch.randn(made.row.shape[0], dtype=torch.float64)
    return made.with_values({Output("critic"): values})


@given(LENGTHS, st.sampled_from([0.0, 0.5, 0.95, 1.0]), st.sampled_from([0.0, 0.9, 1.0]))
def test_against_the_recursion(lengths, decay, discount):
    made = critic(lengths, [float(i) - 1 for i in range(len(lengths))])
    chain = Reward() >> InReward(Reference(), 0.3)
    got = nested(made.rows, (chain >> GAE("critic", decay, discount))(made))
    values = nested(made.rows, made.get(Output("critic")))
    kl = nested(made.rows, made.get(LogProb(Old())) - made.get(LogProb(Reference())))
    for i, (mine, value) in enumerate(zip(got, values, strict=True)):
        running, following = 0.0, 0.0
        for t in reversed(range(len(value))):
            paid = (float(i) - 1 if t == len(value) - 1 else 0.0) - 0.3 * kl[i][t]
            running = paid + discount * following - value[t] + discount * decay * running
            following = value[t]
            assert mine[t] == pytest.approx(running, rel=1e-6, abs=1e-6)


@given(LENGTHS)
def test_its_ends(lengths):
    """decay 1: return minus value; decay 0: one-step error. The fitted target is advantage plus value."""
    made = critic(lengths, [float(i) for i in range(len(lengths))])
    value = made.get(Output("critic"))
    whole = Reward() >> GAE("critic", decay=1.0)
    paid = made.to_events(made.rows.columns["reward"])
    torch.testing.assert_close(whole(made), paid - value)
    torch.testing.assert_close(Returns(whole)(made), paid)
    step = Reward() >> GAE("critic", decay=0.0)
    torch.testing.assert_close(Returns(step)(made), step(made) + value)


def test_rows_do_not_reach_into_each_other():
    together = critic([3, 2], [1.0, -1.0])
    chain = Reward() >> GAE("critic")
    alone = [together.select(torch.tensor([i])) for i in range(2)]
    torch.testing.assert_close(chain(together), torch.cat([chain(part) for part in alone]))


def test_needs():
    chain = Reward() >> GAE("value")
    assert Output("value") in chain.needs()
    assert Output("critic") in Returns(chain).needs()
    assert chain.reach == "token"
