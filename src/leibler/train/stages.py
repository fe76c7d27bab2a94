"""Stages: whole groups are scored, judged, filtered; no gradient."""

from __future__ import annotations

import math
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from leibler.errors import DataError, LeiblerError
from leibler.objective.rows import CHOSEN, REJECTED, SAMPLE, Rows, group_spread
from leibler.train.sources import Context

if TYPE_CHECKING:
    from leibler.data import Record

Reward = Callable[[Sequence["Record"], Sequence[str]], Sequence[float]]
"""``reward(records, responses) -> one finite number each``; it is to give the same numbers for the same responses."""


@dataclass(frozen=True)
class Answer:
    """The exact checker of the data set that the prompts came from: 1 for a right answer, 0 otherwise."""

    data: str = "train"

    def bind(self, context: Context) -> Reward:
        check = context.dataset(self.data).checker()
        return lambda records, texts: [float(check(r, t)) for r, t in zip(records, texts, strict=True)]


@dataclass(frozen=True)
class Score:
    """Writes the column ``reward``: an `Answer` checker, or any ``reward(records, responses)``."""

    by: Answer | Reward

    def __call__(self, rows: Rows, context: Context) -> Rows:
        reward = self.by.bind(context) if isinstance(self.by, Answer) else self.by
        found = _rewards(reward, rows.records, rows.texts)
        failed = [isinstance(f, Failure) for f in found]
        if not any(failed):
            return rows.with_columns(reward=torch.tensor(found))
        if context is None or context.failed is None:
            first = next(f for f in found if isinstance(f, Failure))
            raise DataError(f"the reward of {rows.texts[failed.index(True)][:40]!r} {first.reason}.")
        for record, text, each in zip(rows.records, rows.texts, found, strict=True):
            if isinstance(each, Failure):
                context.failed(record, text, each.reason)
        keep = torch.tensor(_comparable(rows, failed), dtype=torch.long)
        values = torch.tensor([0.0 if isinstance(f, Failure) else f for f in found])
        return rows.with_columns(reward=values).select(keep)


@dataclass(frozen=True)
class Failure:
    """Why a response has no reward."""

    reason: str


def _rewards(reward: Reward, records: Sequence[Record], texts: Sequence[str]) -> list[float | Failure]:
    """A number for each response, or why there is none.

    Where the call for all of them fails, each response is scored alone: the others keep their rewards.
    """
    if not texts:
        return []
    try:
        found = [_number(v) for v in reward(records, texts)]
        problem = Failure(f"is missing: the reward returned {len(found)} numbers for {len(texts)} responses")
    except LeiblerError:
        raise
    except Exception as error:
        found, problem = [], Failure(f"is missing: {_told(error)}")
    if len(found) == len(texts):
        return found
    if len(texts) == 1:
        return [problem]
    return [_rewards(reward, [r], [t])[0] for r, t in zip(records, texts, strict=True)]


def _number(value: object) -> float | Failure:
    """A finite number, or what it is instead; text is none, even if it spells one."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return Failure(f"is {value!r:.60}; return a finite number for every response")
    return number if math.isfinite(number) else Failure(f"is {number}; return a finite number for every response")


def _told(error: Exception) -> str:
    """An error with the place where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"


def _comparable(rows: Rows, failed: Sequence[bool]) -> list[int]:
    """The rows that are left: not a lone one of a group, nor half a pair."""
    index: list[int] = rows.group_index.tolist()
    before, left = Counter(index), Counter(g for g, f in zip(index, failed, strict=True) if not f)
    paired = {g for g, role in zip(index, rows.role.tolist(), strict=True) if role != SAMPLE}
    return [
        i for i, g in enumerate(index) if not failed[i] and (left[g] == before[g] or (left[g] > 1 and g not in paired))
    ]


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
class Keep:
    """Keeps the rows of one role, ``"chosen"`` say, or those with an event in a column of 0 and 1.

    What no term is about need not be read: half of a pair where only the other half is imitated.
    """

    where: str

    def __call__(self, rows: Rows, context: Context) -> Rows:
        return rows.select(rows.inside(self.where).any(dim=1).nonzero()[:, 0])


@dataclass(frozen=True)
class MuteEqual:
    """Mutes groups whose rewards are all equal: no loss, but they stay in the denominators."""

    by: str = "reward"

    def __call__(self, rows: Rows, context: Context) -> Rows:
        muted = group_spread(rows.column(self.by), rows) == 0
        return replace(rows, muted=muted if rows.muted is None else rows.muted | muted)
