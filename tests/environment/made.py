"""A second environment, as a user would write one: running sums, in the characters of the tests' tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from leibler.data import digest
from leibler.data.tasks import Part
from leibler.environment import Environment, Outcome, Session


class Counter(Session):
    """Answers with the last digit of everything said so far, and of the task."""

    def __init__(self, length: int) -> None:
        self.length = length

    def reset(self, task: str) -> str:
        self.sum = sum(int(c) for c in task if c in "0123456789")
        self.said = 0
        return task

    def step(self, action: str) -> Outcome:
        self.said += 1
        self.sum += sum(int(c) for c in action if c in "0123456789")
        over = self.said == self.length
        return Outcome(str(self.sum % 10), float(over and self.sum % 10 == 0), over)


@dataclass(frozen=True)
class Sums(Environment):
    """Say numbers until, after ``length`` turns, the last digit of their sum with the task's is 0."""

    name: ClassVar[str] = "sums"
    cue: ClassVar[str] = "="
    length: int = 3

    @property
    def turns(self) -> int:
        return self.length

    def session(self) -> Session:
        return Counter(self.length)

    def tasks(self, n: int, seed: int = 0, part: Part = "all") -> list[str]:
        odd = {"all": None, "train": 0, "heldout": 1}[part]
        numbers = (digest("sums", seed, row) % 1000 for row in range(n))
        return [str(v if odd is None else 2 * v + odd) for v in numbers]

    def script(self, task: str) -> Sequence[str]:
        left = -sum(map(int, task)) % 10
        return [*["0"] * (self.length - 1), str(left)]

    def reply(self, observation: str) -> str:
        return observation + self.cue
