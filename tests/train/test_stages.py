"""Stages on groups made by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from leibler.data import Dataset, Record
from leibler.errors import DataError, RecipeError
from leibler.objective import CHOSEN, REJECTED, Rows
from leibler.train import Answer, AnswerJudge, BestAndWorst, MuteEqual, Score, WinRate
from objective.made import rows as made_rows

NOTHING: Any = None


def rows(group: list[int], texts: list[str] | None = None, **columns: Any) -> Rows:
    texts = texts or [str(i) for i in range(len(group))]
    records = [Record(f"p{g}", answer=str(g)) for g in group]
    return replace(made_rows([2] * len(group), group, **columns), records=records, texts=texts)


class Around:
    """The part of a context that checkers look at."""

    def __init__(self, check: Any) -> None:
        self.data = Dataset((Record("p"),), "given", check=check)

    def dataset(self, name: str) -> Dataset:
        assert name == "train"
        return self.data


def test_score_by_a_function_and_by_the_data():
    made = rows([0, 1], ["0", "7"])
    scored = Score(lambda records, texts: [len(t) + int(r.answer or 0) for r, t in zip(records, texts, strict=True)])
    assert scored(made, NOTHING).columns["reward"].tolist() == [1.0, 2.0]
    around: Any = Around(lambda record, text: float(record.answer == text))
    assert Score(Answer())(made, around).columns["reward"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "the reward of '0' is missing: the reward returned 2 numbers"),
        ([1.0, float("nan")], "the reward of '1' is nan; return a finite number for every response"),
        ([1.0, float("-inf")], "the reward of '1' is -inf; return a finite"),
        ([1.0, None], "the reward of '1' is None; return a finite"),
        (["1.0", 1.0], "the reward of '0' is '1.0'; return a finite"),
        (None, "the reward of '0' is missing: TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_a_reward_that_is_none(values, message):
    """Where nobody takes what is set aside."""
    given = values if values != [1.0] else [1.0, 1.0, 1.0]

    def reward(records: Any, texts: Any) -> Any:
        return given if len(texts) == 2 or values is None else given[:2]

    with pytest.raises(DataError, match=re.escape(message)):
        Score(reward)(rows([0, 1]), NOTHING)


class Hearing:
    """The part of a context that hears of failures."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str, str]] = []

    def failed(self, record: Record, text: str, reason: str) -> None:
        self.heard.append((record.prompt, text, reason))


def scored(reward: Any, made: Rows) -> tuple[list[str], list[float], list[tuple[str, str, str]]]:
    context: Any = Hearing()
    left = Score(reward)(made, context)
    return list(left.texts), left.columns["reward"].tolist(), context.heard


def test_a_response_without_a_reward_is_set_aside_and_the_others_keep_theirs():
    def reward(records: Any, texts: Any) -> list[float]:
        return [1 / int(t) for t in texts]

    texts, values, heard = scored(reward, rows([0, 0, 0, 1, 1], ["1", "0", "2", "4", "5"]))
    assert (texts, values) == (["1", "2", "4", "5"], pytest.approx([1, 0.5, 0.25, 0.2]))
    assert heard == [("p0", "0", f"is missing: ZeroDivisionError: division by zero (test_stages.py:{line(reward)})")]


def line(function: Any) -> int:
    return function.__code__.co_firstlineno + 1


def test_numbers_of_any_make_are_numbers():
    for values in (torch.tensor([1.0, 2.0]), np.array([1, 2]), [np.float32(1), torch.tensor(2.0)], [True, 2]):
        assert scored(lambda records, texts, values=values: values, rows([0, 0]))[1:] == ([1.0, 2.0], [])


def test_a_nan_costs_no_second_call():
    calls = []

    def reward(records: Any, texts: Any) -> list[float]:
        calls.append(len(texts))
        return [float("nan") if t == "1" else 1.0 for t in texts]

    assert scored(reward, rows([0, 0, 0]))[0] == ["0", "2"]
    assert calls == [3]


def test_what_cannot_be_compared_any_more_goes_too():
    """A lone row of a group would be its own baseline; half a pair is no comparison."""

    def reward(records: Any, texts: Any) -> list[Any]:
        return [None if t == "x" else 1.0 for t in texts]

    assert scored(reward, rows([0, 0, 1, 1, 2], ["x", "a", "b", "c", "d"]))[0] == ["b", "c", "d"]
    pairs = replace(rows([0, 0, 1, 1], ["x", "a", "b", "c"]), role=torch.tensor([CHOSEN, REJECTED] * 2))
    assert scored(reward, pairs)[0] == ["b", "c"]
    four = replace(rows([0, 0, 0, 0], ["x", "a", "b", "c"]), role=torch.tensor([CHOSEN, REJECTED] * 2))
    assert scored(reward, four)[0] == []


def test_a_mistake_of_the_user_is_no_failed_reward():
    def reward(records: Any, texts: Any) -> list[float]:
        raise DataError("give answers.")

    with pytest.raises(DataError, match="give answers"):
        scored(reward, rows([0, 0]))


def test_data_that_cannot_be_checked():
    around: Any = Around(None)
    for stage in (Score(Answer()), WinRate(AnswerJudge())):
        with pytest.raises(DataError, match="has no checker; give every record an 'answer'"):
            stage(rows([0, 0]), around)


def test_win_rate_is_the_mean_over_siblings():
    def judge(record: Record, a: str, b: str) -> float:
        return 0.5 if len(a) == len(b) else float(len(a) > len(b))

    made = WinRate(judge)(rows([0, 0, 0, 1, 2, 2], ["aa", "a", "aa", "x", "yy", "y"]), NOTHING)
    assert made.columns["win_rate"].tolist() == [0.75, 0.0, 0.75, 0.5, 1.0, 0.0]


def test_the_answers_judge_prefers_the_right_one():
    around: Any = Around(lambda record, text: float(text == "right"))
    judge = AnswerJudge().bind(around)
    record = Record("p")
    assert [judge(record, a, b) for a, b in [("right", "no"), ("no", "right"), ("no", "nor")]] == [1.0, 0.0, 0.5]


def test_best_and_worst_make_pairs():
    made = rows([0, 0, 0, 1, 1, 2, 2], win_rate=[0.1, 0.9, 0.5, 0.5, 0.5, 0.7, 0.2])
    pairs = BestAndWorst()(made, NOTHING)
    assert pairs.texts == ["0", "1", "5", "6"]
    assert pairs.role.tolist() == [REJECTED, CHOSEN, CHOSEN, REJECTED]
    assert pairs.group.tolist() == [0, 0, 2, 2]
    assert made.role.tolist() == [0] * 7
    nothing = BestAndWorst()(rows([0, 0], win_rate=[0.5, 0.5]), NOTHING)
    assert len(nothing) == 0


@pytest.mark.parametrize("value", [0.1, 0.7, 1000.1, 0.0])
def test_mute_equal(value):
    reward = torch.tensor([value] * 3 + [0.0, 1.0, 0.0] + [5.0])
    made = MuteEqual()(rows([0, 0, 0, 1, 1, 1, 2], reward=reward), NOTHING)
    assert made.muted is not None
    assert made.muted.tolist() == [True] * 3 + [False] * 3 + [True]
    assert len(made) == 7
    more = MuteEqual()(replace(made, muted=torch.tensor([False] * 5 + [True] * 2)), NOTHING)
    assert more.muted is not None
    assert more.muted.tolist() == [True] * 3 + [False] * 2 + [True] * 2


@pytest.mark.parametrize(("stage", "column"), [(MuteEqual(), "reward"), (BestAndWorst(), "win_rate")])
def test_a_stage_before_the_one_that_writes_its_column(stage, column):
    with pytest.raises(RecipeError, match=f"no column '{column}'.*add the stage that writes it"):
        stage(rows([0, 0]), NOTHING)
