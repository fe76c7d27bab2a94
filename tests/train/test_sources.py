"""Where rows come from: whole groups, an order and randomness that depend on names alone, states that are JSON."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from leibler.data import Dataset, Record
from leibler.errors import DataError, RecipeError
from leibler.objective import (
    CHOSEN,
    REJECTED,
    SAMPLE,
    Arithmetic,
    LogLinear,
    Old,
    Rows,
    Teacher,
    Validation,
    concatenate,
)
from leibler.policy import logprobs
from leibler.train import Adaptive, Context, Data, Mixture, MuteEqual, OnPolicy, RaiseOnWorse, Sampled, Score
from leibler.train.buffer import pack, unpack
from leibler.train.sources import Source
from train.conformance import TEMPERATURE, reward, tiny

PLAIN = Dataset(tuple(Record(f"{i}+", completion=str(i) * (1 + i % 3)) for i in range(10)), "plain")
PAIRS = Dataset(tuple(Record(f"{i}+", chosen="12", rejected="345"[: 1 + i % 3]) for i in range(6)), "pairs")


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {"policy": tiny(0), "teacher": tiny(1, padding=3)}


def context(models: Any = None, **changes: Any) -> Context:
    given: dict[str, Any] = {
        "models": models, "data": {"train": PLAIN, "text": PLAIN}, "seed": 3, "draw": 0, "step": 0, "steps": 10,
        "rows": 8, "max_new_tokens": 5, "max_length": 64, "temperature": TEMPERATURE,
    }  # fmt: skip
    return Context(**{**given, **changes})


def prompts(rows: Rows) -> list[str]:
    return [r.prompt for r in rows.records]


# ---- data --------------------------------------------------------------------------------------------------------


def test_data_goes_through_every_epoch_in_its_own_order(models):
    state, seen = {}, []
    for draw in range(5):
        drawn, state = Data().draw(context(models, draw=draw), state)
        assert len(drawn["main"]) == 8
        seen += prompts(drawn["main"])
    epochs = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(e) == sorted(prompts_of(PLAIN)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4
    assert state == {"position": 40}
    # From the middle, with nothing but the position: the same rows.
    again, _ = Data().draw(context(models, draw=3), {"position": 24})
    assert prompts(again["main"]) == seen[24:32]


def prompts_of(data: Dataset) -> list[str]:
    return [r.prompt for r in data]


def test_completions_are_the_events(models):
    drawn, _ = Data().draw(context(models), {})
    rows = drawn["main"]
    for i, record in enumerate(rows.records):
        assert models["policy"].decode(rows.label[rows.row == i]) == record.completion
        assert int(rows.label[rows.row == i][-1]) == models["policy"].tokenizer.eos_token_id
    assert rows.role.tolist() == [SAMPLE] * 8
    assert rows.groups == 8
    assert rows.texts == [r.completion for r in rows.records]


def test_a_pair_is_one_group_of_two_rows(models):
    drawn, state = Data().draw(context(models, data={"train": PAIRS}, rows=9), {})
    rows = drawn["main"]
    assert len(rows) == 8
    assert state == {"position": 4}
    assert rows.role.tolist() == [CHOSEN, REJECTED] * 4
    assert rows.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert rows.texts[0] == rows.records[0].chosen
    assert rows.texts[1] == rows.records[0].rejected


def test_what_the_data_lacks_is_said(models):
    with pytest.raises(DataError, match=r"draws from the data 'other', which was not given; add data.other=FILE"):
        Data("other").draw(context(models), {})
    bare = Dataset((Record("1+"), Record("2+")), "bare")
    with pytest.raises(DataError, match="bare has no completion to learn from"):
        Data().draw(context(models, data={"train": bare}), {})
    with pytest.raises(DataError, match=r"a row of \d+ tokens .* exceeds the model's context of 4"):
        Data().draw(context(models, max_length=4), {})


# ---- rollouts ----------------------------------------------------------------------------------------------------


def test_rollouts_come_in_groups_with_the_samplers_log_probs(models):
    drawn, state = OnPolicy(4).draw(context(models), {})
    rows = drawn["main"]
    assert len(rows) == 8
    assert rows.group.tolist() == [0] * 4 + [1] * 4
    assert state == {"position": 2}
    logp = logprobs(models["policy"], rows.tokens, rows.attention, rows.mask, temperature=TEMPERATURE)
    torch.testing.assert_close(rows.columns["behaviour_logp"][rows.mask].double(), logp, rtol=1e-5, atol=1e-5)
    end = models["policy"].tokenizer.eos_token_id
    for i in range(8):
        mine = rows.label[rows.row == i].tolist()
        assert (mine[-1] == end) == bool(rows.columns["finished"][i])
        assert mine[-1] == end or len(mine) == 5
        assert rows.texts[i] == models["policy"].decode(mine)


def test_a_mixture_of_laws_is_sampled_token_by_token(models):
    law = Arithmetic({Old(): 0.7, Teacher(): 0.3})
    rows = OnPolicy(sampler=law).draw(context(models), {})[0]["main"]
    each = [
        logprobs(models[n], rows.tokens, rows.attention, rows.mask, temperature=TEMPERATURE)
        for n in ("policy", "teacher")
    ]
    mixed = torch.log(0.7 * each[0].exp() + 0.3 * each[1].exp())
    torch.testing.assert_close(rows.columns["behaviour_logp"][rows.mask].double(), mixed, rtol=1e-5, atol=1e-5)


def test_only_models_and_their_mixtures_are_sampled(models):
    with pytest.raises(RecipeError, match="a model or an Arithmetic mixture"):
        OnPolicy(sampler=LogLinear({Teacher(): 1.5, Old(): -0.5})).draw(context(models), {})


def test_a_draw_depends_on_its_number_only(models):
    def tokens(draw: int, **changes: Any) -> list[list[int]]:
        return OnPolicy(2).draw(context(models, draw=draw, **changes), {})[0]["main"].tokens.tolist()

    torch.manual_seed(1)
    first = tokens(4)
    torch.manual_seed(2)
    assert tokens(4) == first
    assert tokens(4, step=9) == first
    assert tokens(5) != first
    assert tokens(4, seed=4) != first


@pytest.mark.parametrize(
    "source", [Data(), OnPolicy(2), OnPolicy(2) >> Score(reward)], ids=["data", "rollouts", "scored"]
)
def test_processes_share_out_the_groups_of_one_draw(models, source: Source):
    """Together they hold the very rows of one process, each group whole."""
    (whole, state) = source.draw(context(models, rows=12), {})
    parts = [source.draw(context(models, rows=12, rank=r, world=3), {}) for r in range(3)]
    assert all(p[1] == state for p in parts)
    together = concatenate([p[0]["main"] for p in parts])

    def rows(of: Rows) -> list[Any]:
        return sorted(
            (of.records[i].prompt, of.tokens[i][of.attention[i]].tolist(), float(of.columns["reward"][i]))
            if "reward" in of.columns
            else (of.records[i].prompt, of.tokens[i][of.attention[i]].tolist())
            for i in range(len(of))
        )

    assert rows(together) == rows(whole["main"])
    assert together.groups == whole["main"].groups


def test_more_processes_than_groups_leave_an_empty_share(models):
    source = OnPolicy(4) >> Score(lambda records, texts: [1.0 for _ in texts]) >> MuteEqual()
    shares = [source.draw(context(models, rank=r, world=3), {})[0]["main"] for r in range(3)]
    assert [len(rows) for rows in shares] == [4, 4, 0]
    assert all({"reward", "behaviour_logp"} <= set(rows.columns) for rows in shares)
    assert shares[2].groups == 0
    assert len(concatenate([shares[0], shares[2]])) == 4


def test_a_limit_and_a_size_of_its_own(models):
    rows = OnPolicy(2, rows=4, max_new_tokens=2).draw(context(models), {})[0]["main"]
    assert len(rows) == 4
    assert int(rows.length.max()) <= 2
    # The first tokens are those of a longer limit.
    longer = OnPolicy(2, rows=4).draw(context(models), {})[0]["main"]
    first = [longer.label[longer.row == i].tolist()[:2] for i in range(4)]
    assert [rows.label[rows.row == i].tolist() for i in range(4)] == first


def test_a_stage_around_a_mixture_changes_nothing_about_its_streams():
    source = Mixture(data=Data(), own=OnPolicy(prompts="other") >> Score(reward))
    for seen in (source, source >> Score(reward)):
        assert seen.stream_data() == {"data": ("train",), "own": ("other",)}
        assert seen.fresh() == {"own"}
    assert OnPolicy().fresh() == {"main"}
    assert Data().fresh() == set()


def test_a_mixture_has_a_state_for_each_stream(models):
    source = Mixture(a=Data(rows=2), b=OnPolicy(2, rows=4) >> Score(reward))
    drawn, state = source.draw(context(models), source.init())
    assert {n: len(r) for n, r in drawn.items()} == {"a": 2, "b": 4}
    assert state == {"a": {"position": 2}, "b": {"position": 2}}
    assert "reward" in drawn["b"].columns
    assert set(source.streams()) == {"a", "b"}


# ---- adaptive ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Marked(Source):
    """Rows that say where they come from."""

    mark: str

    def draw(self, context: Context, state: dict[str, Any]) -> tuple[dict[str, Rows], dict[str, Any]]:
        count = state.get("count", 0)
        tokens = torch.tensor([[4, 5, 6, 2]] * context.rows)
        mask = torch.tensor([[False, True, True]] * context.rows)
        records = [Record(f"{self.mark}{count}") for _ in range(context.rows)]
        group = torch.arange(context.rows)
        made = Rows(tokens, torch.ones_like(tokens).bool(), mask, group, torch.zeros_like(group), records=records)
        return {"main": made}, {"count": count + 1}


def taken(phi: float, step: int, draws: int, models: Any, **changes: Any) -> tuple[list[str], dict[str, Any]]:
    source = Adaptive(Marked("data"), Marked("fresh"), **changes)
    state = {**source.init(), "phi": {"phi": phi, "raised_at": None}}
    found = []
    for draw in range(draws):
        before = state["rollouts"].get("count", 0)
        drawn, state = source.draw(context(models, draw=draw, step=step, rows=4), state)
        name = drawn["main"].records[0].prompt
        replayed = name.startswith("fresh") and state["rollouts"].get("count", 0) == before
        found.append("replay" if replayed else name.rstrip("0123456789"))
    return found, state


def test_adaptive_without_phi_is_data(models):
    assert set(taken(0.0, 5, 20, models)[0]) == {"data"}


def test_adaptive_starts_fresh_and_ends_replaying(models):
    assert set(taken(1.0, 0, 20, models)[0]) == {"fresh"}
    late = taken(1.0, 10, 20, models)[0]
    assert late[0] == "fresh", "the buffer is empty"
    assert set(late[1:]) == {"replay"}


def test_adaptive_shares(models):
    """Fresh with probability phi (1 - s), replayed with phi s, data otherwise; here phi = 0.6, s = 0.3."""
    found, state = taken(0.6, 3, 2000, models, capacity=10)
    share = {name: found.count(name) / 2000 for name in ("data", "fresh", "replay")}
    assert share == pytest.approx({"data": 0.4, "fresh": 0.42, "replay": 0.18}, abs=0.035)
    buffer = unpack(state["buffer"])
    assert len(buffer) == buffer.groups == 10
    newest = state["rollouts"]["count"] - 1
    assert buffer.records[-1].prompt == f"fresh{newest}"


def test_the_buffer_gives_back_what_it_was_given(models):
    rows = OnPolicy(2).draw(context(models), {})[0]["main"]
    for index in (None, torch.tensor([0, 2])):
        back, given = unpack(pack(rows), index), rows if index is None else rows.select(index)
        assert torch.equal(back.tokens, given.tokens)
        assert torch.equal(back.attention, given.attention)
        assert torch.equal(back.mask, given.mask)
        assert torch.equal(back.group, given.group)
        assert torch.equal(back.columns["behaviour_logp"], given.columns["behaviour_logp"])
        assert list(back.texts) == list(given.texts)
        assert prompts(back) == prompts(given)


def test_adaptive_is_of_no_single_law():
    source = Adaptive(Data(), OnPolicy())
    assert source.streams()["main"].law is None
    assert source.needs_validation
    assert (source >> Score(reward)).needs_validation
    assert Mixture(a=source).needs_validation
    assert source.datasets() == {"train": "both"}
    assert Adaptive(Data("a"), OnPolicy(prompts="b")).datasets() == {"a": "labels", "b": "prompts"}


def test_what_adaptive_draws_from_hears_of_validations():
    source = Adaptive(Data(), Adaptive(Data(), OnPolicy()))
    state = source.init()
    for nll in (2.0, 3.0):
        state = source.observe(state, Validation(1, {"nll": nll}))
    assert state["phi"]["phi"] == state["rollouts"]["phi"]["phi"] == 0.1


def test_phi_is_raised_when_validation_gets_worse_than_at_the_last_raise():
    phi = RaiseOnWorse(by=0.4, tolerance=0.1)
    state = phi.init()
    history = []
    for nll in (3.0, 2.0, 3.05, 3.1, 3.15, 2.0, 3.25, 3.4, 9.9):
        state = phi.observe(state, Validation(1, {"nll": nll}))
        history.append((round(state["phi"], 3), state["raised_at"]))
    assert history == [
        (0.0, 3.0), (0.0, 3.0), (0.0, 3.0), (0.4, 3.1), (0.4, 3.1), (0.4, 3.1), (0.8, 3.25), (1.0, 3.4), (1.0, 9.9),
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="validation has no metric 'nll'"):
        phi.observe(state, Validation(1, {"entropy": 1.0}))


def test_sampled_names_its_model():
    source = Sampled("teacher", 3)
    assert source.handles() == (Teacher(),)
    assert source.streams()["main"].law == Teacher()
    assert replace(source, group_size=2).group_size == 2


# ---- columns of data ---------------------------------------------------------------------------------------------


def _with(values: list[Any]) -> Dataset:
    records = [
        Record("1+", completion="12"[: 1 + i], source=f"f:{i + 1}", extra={"x": v}) for i, v in enumerate(values)
    ]
    return Dataset(tuple(records), "x")


def test_columns_of_the_data_become_columns_of_the_batch(models):
    one, _ = Data(rows=2, columns=("x",)).draw(context(models, data={"train": _with([0.25, 1])}), {})
    assert sorted(one["main"].columns["x"].tolist()) == [0.25, 1.0]
    each, _ = Data(rows=2, columns=("x",)).draw(context(models, data={"train": _with([[1, 2], [3, 4, 5]])}), {})
    rows = each["main"]
    found = {t: rows.columns["x"][i][rows.mask[i]].tolist() for i, t in enumerate(rows.texts)}
    assert found == {"1": [1.0, 2.0], "12": [3.0, 4.0, 5.0]}
    assert (rows.columns["x"][~rows.mask] == 0).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5, None], r"'x' of f:2 is None; give a number"),
        ([0.5, "much"], r"'x' of f:2 is 'much'"),
        ([True, 1.0], r"'x' of f:1 is True"),
        ([[1, 2], [3, 4]], r"'x' of f:2 has 2 numbers for 3 tokens \(the end token included\)"),
        ([0.5, [1, 2, 3]], r"numbers in some rows and lists in others"),
    ],
)
def test_a_column_that_does_not_fit_is_named_with_its_row(models, values, message):
    with pytest.raises(DataError, match=message):
        Data(rows=2, columns=("x",)).draw(context(models, data={"train": _with(values)}), {})


def test_every_process_keeps_the_rows_of_all_in_the_buffer(models):
    source = Adaptive(Data(), OnPolicy(2), phi=RaiseOnWorse(initial=1.0))
    alone = unpack(source.draw(context(models, rows=6), source.init())[1]["buffer"])
    given: list[Any] = []
    for rank in (0, 1):
        source.draw(
            replace(context(models, rows=6, rank=rank, world=2), gather=lambda item: given.append(item) or [item]),
            source.init(),
        )
    for rank in (0, 1):
        together = replace(context(models, rows=6, rank=rank, world=2), gather=lambda item: given)
        kept = unpack(source.draw(together, source.init())[1]["buffer"])
        assert kept.texts == alone.texts
        assert torch.equal(kept.tokens, alone.tokens)
