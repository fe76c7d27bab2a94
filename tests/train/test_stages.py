"""Stages on groups made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
    [([1.0], "returned 1 numbers for 2 responses"), ([1.0, float("nan")], "the reward of '1' is nan; return a finite")],
)
def test_a_reward_that_is_none(values, message):
    with pytest.raises(DataError, match=message):
        Score(lambda records, texts: values)(rows([0, 1]), NOTHING)


def test_data_that_cannot_be_checked():
    around: Any = Around(None)
    for stage in (Score(Answer()), WinRate(AnswerJudge())):
        with pytest.raises(DataError, match="has nothing to check a response against; add the column 'answer'"):
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
