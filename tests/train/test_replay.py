"""The replay buffer: what goes in, what comes out, and that it is the same for any number of processes."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import pytest
import torch

from leibler.data import Dataset, Record
from leibler.errors import RecipeError, RunError
from leibler.objective import Behaviour, Clip, GroupNormalised, Objective, PolicyGradient, Reward, Rows
from leibler.objective.rows import concatenate
from leibler.train import Context, Data, Fixed, Mixture, OnPolicy, Recipe, Replay, Source
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
        records = [
            Record(f"p{state['draws']}.{mine[i]}", answer="a", extra={"x": 1, "when": date(2026, 1, 1)}) for i in group
        ]
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


@pytest.mark.parametrize("source", [Replay(Counting(), capacity=100), Fixed(Counting(), rows=12)])
def test_records_come_back_with_every_column_and_are_written_once(source):
    """What a later stage, a reward or `Routed` reads of a record is there on a row that was kept, as on a fresh one."""
    state = source.init()
    for draw in range(4):
        rows, state = source.draw(around(draw), state)
        assert [record.get("x") for record in rows["main"].records] == [1] * len(rows["main"])
        assert {record.get("when") for record in rows["main"].records} == {"2026-01-01"}, "fresh or not"
    packed = state["buffer"] if "buffer" in state else state["set"]
    assert len(packed["records"]) == len(packed["record"]) / 2, "one for a group of two rows"
    json.dumps(packed["records"])


# ---- a fixed set -----------------------------------------------------------------------------------------------------


def around(draw: int, rows: int = 4, rank: int = 0, world: int = 1, gather: Any = None, **more: Any) -> Context:
    """A context of a run of six steps."""
    given: dict[str, Any] = {"models": {}, "data": {}, "seed": 3, "draw": draw, "step": draw, "steps": 6}
    given |= {"rows": rows, "max_new_tokens": 4, "max_length": 64, "temperature": 1.0, "rank": rank, "world": world}
    return Context(**{**given, **more}, **({} if gather is None else {"gather": gather}))


def rewards(rows: Rows) -> list[float]:
    """The reward of each group, in the order of their numbers."""
    return [float(rows.columns["reward"][rows.group_index == g][0]) for g in range(rows.groups)]


def reward(rows: Rows) -> list[float]:
    return rows.columns["reward"].tolist()


def passes(source: Fixed, draws: int, **more: Any) -> tuple[list[Rows], Any]:
    state, out = source.init(), []
    for draw in range(draws):
        rows, state = source.draw(around(draw, **more), state)
        out.append(rows["main"])
    return out, state


def test_a_fixed_set_is_drawn_once_and_passed_over_group_by_group():
    """Three groups of two a draw: 12 rows are two draws, six groups; draws of two groups pass them in three."""
    out, state = passes(Fixed(Counting(), rows=12), 9)
    assert state["source"] == {"draws": 2}
    every = [0.0, 1.0, 2.0, 10.0, 11.0, 12.0]
    orders = []
    for epoch in range(3):
        seen = [r for rows in out[3 * epoch : 3 * epoch + 3] for r in rewards(rows)]
        assert sorted(seen) == every
        orders.append(tuple(seen))
    assert len(set(orders)) == 3, "each pass has an order of its own"
    for rows in out:
        for group in range(rows.groups):
            members = rows.columns["reward"][rows.group_index == group]
            assert len(members) == 2
            assert members[0] == members[1]
        for i in range(len(rows)):
            number = int(rows.columns["reward"][i])
            assert rows.records[i].prompt == f"p{number // 10}.{number % 10}"
            assert (rows.columns["behaviour_logp"][i][rows.mask[i]] == number).all()


def test_a_draw_may_lie_across_the_end_of_a_pass():
    """Two groups a draw of five: the third draw takes the last of one pass and the first of the next."""
    out, _ = passes(Fixed(Counting(groups=5), rows=10), 5)
    seen = [r for rows in out for r in rewards(rows)]
    assert sorted(seen[:5]) == sorted(seen[5:]) == [0, 1, 2, 3, 4]
    assert all(rows.groups == 2 for rows in out)


def test_the_size_of_a_fixed_set():
    @dataclass(frozen=True)
    class Few(Counting):
        rows: int = 2

    def size(source: Source = Counting(groups=2), **options: Any) -> int:
        return len(passes(Fixed(source >> (lambda rows, _: rows), **options), 1)[1]["set"]["group"])

    assert size(rows=9) == 12, "whole draws of four"
    assert size() == 24, "six steps of four rows"
    assert size(epochs=3) == 8
    assert size(epochs=100) == 4
    assert size(source=Few(groups=2)) == 12, "six steps of the two rows that the source is for"
    assert len(passes(Fixed(Few(groups=2)), 1)[0][0]) == 2
    ten = Dataset(tuple(Record(str(i)) for i in range(3)), "three")

    @dataclass(frozen=True)
    class Reading(Counting):
        def datasets(self) -> Any:
            return {"train": "prompts"}

    held = passes(Fixed(Reading(groups=2)), 1, data={"train": ten})[1]["set"]
    assert len(held["group"]) == 8, "each of three prompts once, two rows each, up to a whole draw"


def test_a_fixed_set_does_not_change_when_the_run_goes_on():
    """As after a resume: from the state of a draw, the next draws are the same, whatever the source would draw now."""
    whole, _ = passes(Fixed(Counting(), rows=12), 6)
    state = passes(Fixed(Counting(), rows=12), 3)[1]
    source = Fixed(Counting(groups=1), rows=12)
    for draw in range(3, 6):
        rows, state = source.draw(around(draw), state)
        assert torch.equal(rows["main"].tokens, whole[draw].tokens)
        assert rewards(rows["main"]) == rewards(whole[draw])


@pytest.mark.parametrize("rows_a_draw", [4, 6])
def test_two_processes_hold_one_fixed_set_and_share_each_draw(rows_a_draw):
    source = Fixed(Counting(groups=5), rows=10)
    whole, _ = passes(source, 6, rows=rows_a_draw)
    shares: list[list[Rows]] = [[], []]
    for rank in range(2):
        # What the other process drew for the set is drawn here too, in the order of the gatherings.
        counts = iter(range(9))

        def gather(item: Any, counts: Any = counts) -> list[Any]:
            at = {"draws": next(counts)}
            return [Counting(groups=5).draw(around(0, rank=r, world=2), at)[0]["main"] for r in range(2)]

        state = source.init()
        for draw in range(6):
            rows, state = source.draw(around(draw, rows=rows_a_draw, rank=rank, world=2, gather=gather), state)
            shares[rank].append(rows["main"])
    for alone, *parts in zip(whole, *shares, strict=True):
        assert sorted(rewards(alone)) == sorted(r for part in parts for r in rewards(part))
        # Optimiser batches are cut by these numbers, so they may not depend on how many processes there are.
        numbered = {int(g) * 2 + rank: r for rank, part in enumerate(parts) for g, r in zip(part.group, reward(part))}
        assert numbered == dict(zip(alone.group.tolist(), reward(alone), strict=True))
        assert set(numbered) == set(range(alone.groups))
        assert max(p.groups for p in parts) - min(p.groups for p in parts) <= 1


def test_a_long_wait_before_the_first_step_is_told(monkeypatch):
    said: list[str] = []
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr("leibler.train.replay.time.monotonic", lambda: float(next(clock)))
    passes(Fixed(Counting(), rows=18), 1, say=said.append)
    assert said
    assert "before the first step: 4 of 18 responses" in said[0] or "6 of 18" in said[0]
    assert "seconds left" in said[0]


def test_what_a_fixed_set_cannot_be():
    with pytest.raises(RecipeError, match="one stream; put it inside the Mixture"):
        Fixed(Mixture(a=Data(), b=OnPolicy()))
    with pytest.raises(RecipeError, match="is fixed already"):
        Fixed(Fixed(Data()))
    for wrong in ({"rows": 0}, {"epochs": 0}):
        with pytest.raises(RecipeError, match="of Fixed must be at least 1"):
            Fixed(Data(), **wrong)
    with pytest.raises(RunError, match="nothing is left of what was drawn before the first step"):
        passes(Fixed(Counting() >> (lambda rows, context: rows.select(torch.tensor([], dtype=torch.long))), rows=4), 1)
    assert Fixed(Data()).streams()["main"].law is None
    with pytest.raises(RecipeError, match="use a surrogate with anchor=Behaviour"):
        Recipe(Fixed(OnPolicy(4)), Objective(PolicyGradient(Reward() >> GroupNormalised(), Clip(0.2))))
