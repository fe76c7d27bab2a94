"""Stages: whole groups are scored, judged, filtered; no gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from leibler.errors import DataError
from leibler.objective.rows import CHOSEN, REJECTED, Rows, group_spread
from leibler.train.sources import Context

if TYPE_CHECKING:
    from leibler.data import Record

Reward = Callable[[Sequence["Record"], Sequence[str]], Sequence[float]]
"""``reward(records, responses) -> one number each``."""


@dataclass(frozen=True)
class Answer:
    """The exact checker of the data set that the prompts came from: 1 for a right answer, 0 otherwise."""

    data: str = "train"

    def bind(self, context: Context) -> Reward:
        dataset = context.dataset(self.data)
        check = dataset.check
        if check is None:
            raise DataError(
                f"{dataset.name} has nothing to check a response against; add the column 'answer' or give a reward."
            )
        return lambda records, texts: [float(check(r, t)) for r, t in zip(records, texts, strict=True)]


@dataclass(frozen=True)
class Score:
    """Writes the column ``reward``: an `Answer` checker, or any ``reward(records, responses)``."""

    by: Answer | Reward

    def __call__(self, rows: Rows, context: Context) -> Rows:
        reward = self.by.bind(context) if isinstance(self.by, Answer) else self.by
        values = [float(v) for v in reward(rows.records, rows.texts)]
        if len(values) != len(rows):
            raise DataError(
                f"the reward returned {len(values)} numbers for {len(rows)} responses; return one for each."
            )
        for value, text in zip(values, rows.texts, strict=True):
            if not math.isfinite(value):
                raise DataError(f"the reward of {text[:40]!r} is {value}; return a finite number for every response.")
        return rows.with_columns(reward=torch.tensor(values))


class Judge(Protocol):
    """``judge(record, a, b) -> P(a preferred over b)``."""

    def __call__(self, record: Record, a: str, b: str) -> float: ...


@dataclass(frozen=True)
class AnswerJudge:
    """Prefers the response that the data set's checker scores higher; equal ones are even."""

    data: str = "train"

    def bind(self, context: Context) -> Judge:
        reward = Answer(self.data).bind(context)

        def judge(record: Record, a: str, b: str) -> float:
            first, second = reward([record, record], [a, b])
            return 1.0 if first > second else 0.0 if first < second else 0.5

        return judge


@dataclass(frozen=True)
class WinRate:
    """Writes the column ``win_rate``: each response's mean chance of being preferred over its siblings."""

    judge: AnswerJudge | Judge

    def __call__(self, rows: Rows, context: Context) -> Rows:
        judge = self.judge.bind(context) if isinstance(self.judge, AnswerJudge) else self.judge
        rate = torch.zeros(len(rows))
        for group in range(rows.groups):
            members: list[int] = (rows.group_index == group).nonzero()[:, 0].tolist()
            for i in members:
                others = [j for j in members if j != i]
                wins = [judge(rows.records[i], rows.texts[i], rows.texts[j]) for j in others]
                rate[i] = sum(wins) / len(wins) if wins else 0.5
        return rows.with_columns(win_rate=rate)


@dataclass(frozen=True)
class BestAndWorst:
    """Keeps the best and the worst row of each group as a pair; groups without a difference are dropped.

    The selection biases the pairs away from two independent samples, as in the released configurations.
    """

    by: str = "win_rate"

    def __call__(self, rows: Rows, context: Context) -> Rows:
        value, keep, role = rows.column(self.by), [], rows.role.clone()
        for group in range(rows.groups):
            members = (rows.group_index == group).nonzero()[:, 0]
            best, worst = members[value[members].argmax()], members[value[members].argmin()]
            if value[best] > value[worst]:
                role[best], role[worst] = CHOSEN, REJECTED
                keep += [int(best), int(worst)]
        return replace(rows, role=role).select(torch.tensor(keep, dtype=torch.long))


@dataclass(frozen=True)
class MuteEqual:
    """Mutes groups whose rewards are all equal: no loss, but they stay in the denominators."""

    by: str = "reward"

    def __call__(self, rows: Rows, context: Context) -> Rows:
        muted = group_spread(rows.column(self.by), rows) == 0
        return replace(rows, muted=muted if rows.muted is None else rows.muted | muted)
