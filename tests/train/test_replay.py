"""The replay buffer: what goes in, what comes out, and that it is the same for any number of processes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from leibler.data import Record
from leibler.errors import RecipeError
from leibler.objective import Behaviour, Clip, GroupNormalised, Objective, PolicyGradient, Reward, Rows
from leibler.objective.rows import concatenate
from leibler.train import Data, Mixture, OnPolicy, Recipe, Replay, Source
from leibler.train.buffer import interleaved
from leibler.train.sources import Origin
from objective.made import rows as made_rows


@dataclass(frozen=True)
class Counting(Source):
    """Groups of two rows whose reward is the number of their draw."""

    groups: int = 3

    def streams(self) -> Any:
        return {"main": Origin(Behaviour())}

    def init(self) -> Any:
        return {"draws": 0}

    def draw(self, context: Any, state: Any) -> Any:
        mine = list(range(context.rank, self.groups, context.world))
        group = [i for i in range(len(mine)) for _ in range(2)]
        # Draws differ in length, so that the buffer must pad.
        rows = made_rows([2 + state["draws"] % 3] * len(group), group)
        reward = torch.tensor([10.0 * state["draws"] + mine[i] for i in group])
        logp = torch.where(rows.mask, reward[:, None], 0.0)
        records = [Record(f"p{state['draws']}.{mine[i]}", answer="a", extra={"x": 1}) for i in group]
        rows = replace(rows, records=records, texts=[r.prompt + "!" for r in records])
        return {"main": rows.with_columns(reward=reward, behaviour_logp=logp)}, {"draws": state["draws"] + 1}


class Around:
    """The part of a context that the source reads."""

    def __init__(self, draw: int, rank: int = 0, world: int = 1, others: Any = ()) -> None:
        self.seed, self.draw, self.rank, self.world = 3, draw, rank, world
        self.gather = lambda item: [item] if world == 1 else list(others)


def drawn(source: Replay, draws: int) -> tuple[list[Rows], Any]:
    state, out = source.init(), []
    for draw in range(draws):
        context: Any = Around(draw)
        rows, state = source.draw(context, state)
        out.append(rows["main"])
    return out, state


def test_the_first_draw_is_the_fresh_one_and_later_ones_are_mixed():
    out, _ = drawn(Replay(Counting(), capacity=100), 12)
    assert sorted(out[0].columns["reward"].tolist()) == [0, 0, 1, 1, 2, 2]
    assert all(rows.groups == 3 and len(rows) == 6 for rows in out)
    ages = [draw - int(r) // 10 for draw, rows in enumerate(out) for r in rows.columns["reward"].tolist()]
    assert min(ages) == 0
    assert max(ages) >= 4, "old rows come back"


def test_groups_stay_whole_and_carry_all_they_had():
    out, _ = drawn(Replay(Counting(), capacity=100), 6)
    for rows in out:
        reward = rows.columns["reward"]
        for group in range(rows.groups):
            members = reward[rows.group_index == group]
            assert len(members) == 2
            assert members[0] == members[1]
        for i in range(len(rows)):
            number = int(reward[i])
            assert rows.records[i].prompt == f"p{number // 10}.{number % 10}"
            assert rows.texts[i] == rows.records[i].prompt + "!"
            assert rows.mask[i].sum() == 2 + (number // 10) % 3
            assert torch.equal(
                rows.columns["behaviour_logp"][i][rows.mask[i]], reward[i].expand(int(rows.mask[i].sum()))
            )


def test_only_the_newest_stay():
    _, state = drawn(Replay(Counting(), capacity=9), 6)
    # Four groups of two rows fit: the three of the last draw and one of that before.
    assert sorted(set(state["buffer"]["columns"]["reward"].tolist())) == [42, 50, 51, 52]
    assert drawn(Replay(Counting(), capacity=1), 2)[1]["buffer"]["columns"]["reward"].tolist() == [12, 12]


def test_two_processes_draw_what_one_does():
    source = Replay(Counting(), capacity=14)
    whole, _ = drawn(source, 5)
    states = [source.init(), source.init()]
    for draw in range(5):
        fresh = []
        for rank in range(2):
            context: Any = Around(draw, rank, 2)
            fresh.append(source.source.draw(context, states[rank]["source"])[0]["main"])
        out = []
        for rank in range(2):
            context = Around(draw, rank, 2, fresh)
            rows, states[rank] = source.draw(context, states[rank])
            out.append(rows["main"])
        assert torch.equal(states[0]["buffer"]["tokens"], states[1]["buffer"]["tokens"])
        alone, together = whole[draw].columns["reward"], concatenate(out).columns["reward"]
        assert sorted(alone.tolist()) == sorted(together.tolist())
        assert len(out[0]) == 4


def test_the_law_of_a_replayed_row_is_what_the_sampler_reported():
    def term(surrogate: Clip) -> Objective:
        return Objective(PolicyGradient(Reward() >> GroupNormalised(), surrogate))

    Recipe(Replay(OnPolicy(4)), term(Clip(0.2, anchor=Behaviour())))
    with pytest.raises(RecipeError, match="use a surrogate with anchor=Behaviour"):
        Recipe(Replay(OnPolicy(4)), term(Clip(0.2)))
    assert Replay(Data()).streams()["main"].law is None


def test_what_it_cannot_hold():
    with pytest.raises(RecipeError, match="one stream; put it inside the Mixture"):
        Replay(Mixture(a=Data(), b=OnPolicy()))
    with pytest.raises(RecipeError, match="capacity=0 must be at least 1"):
        Replay(Data(), capacity=0)


def test_shares_are_put_together_as_one_process_would_have_drawn_them_even_where_a_stage_dropped_groups():
    """Of groups 0 to 4, process 0 has 0, 2, 4 and lost 2; process 1 has 1, 3 and lost 1."""

    def share(groups: list[int], names: list[int]) -> Rows:
        rows = made_rows([2] * len(groups), groups)
        return replace(rows, records=[Record(str(n)) for n in names], texts=[str(n) for n in names])

    both = interleaved([share([0, 2], [0, 4]), share([1], [3])])
    assert [r.prompt for r in both.records] == ["0", "3", "4"]
    assert both.group_index.tolist() == [0, 1, 2]
